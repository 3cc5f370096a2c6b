"""Tests of distckpt. A package, so that no other top-level `tests` on the path can shadow it."""
