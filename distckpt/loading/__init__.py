"""A checkpoint file -> live objects: all of them, or none."""
