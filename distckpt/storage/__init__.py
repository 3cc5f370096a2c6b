"""Bytes <-> durable media. Layer L2."""
