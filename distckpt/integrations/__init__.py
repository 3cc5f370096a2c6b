"""distckpt in training loops of other packages: a module for each, which imports it. No other package does."""
