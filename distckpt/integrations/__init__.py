"""Callbacks for training loops of other packages: one module each. Only modules here import those packages."""
