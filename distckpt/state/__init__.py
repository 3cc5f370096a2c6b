"""Live objects <-> plain state. Layer L2."""
