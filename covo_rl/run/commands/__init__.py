"""Commands that are not a room of their own."""
