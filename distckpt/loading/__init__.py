"""Load a checkpoint file into live objects: all of them, or none."""
