"""Save live objects as a committed checkpoint file."""
