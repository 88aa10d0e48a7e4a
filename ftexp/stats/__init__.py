"""What a difference between trials is worth: intervals, tests, noise, power, importance. Arrays in, dataclasses out."""
