"""Decisions that are the same on every rank. Layer L3."""
