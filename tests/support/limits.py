"""The time limit of a program that a test starts."""

from typing import Final

PROGRAM_LIMIT_S: Final = 600.0
"""Seconds until a program, or a wait in it, is taken to hang. None should come near it, on however busy a machine."""
