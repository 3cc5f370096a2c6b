"""Fixtures of the tests of the heartbeat."""

from tests.unit.coordination.simulated_jobs import clock, job

__all__ = ["clock", "job"]
