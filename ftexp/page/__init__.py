"""A sweep as one page: drawings, style, and the page itself; pure functions from what was read to text."""
