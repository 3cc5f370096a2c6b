"""Live objects -> a committed checkpoint file."""
