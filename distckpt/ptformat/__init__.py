"""The bytes of a ``.pt`` file."""
