"""Ranks agree: phases in which errors travel, one vote per iteration, and a heartbeat beside the collectives.

This package knows no files.
"""
