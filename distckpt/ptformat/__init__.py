"""The bytes of a ``.pt`` file.

This package knows no ranks.
"""
