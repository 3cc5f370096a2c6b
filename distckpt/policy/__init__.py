"""Pure functions: what to keep, what to call it, and which score counts."""
