"""Many trials from one command."""
