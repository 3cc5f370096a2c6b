"""The one signal that the test machinery keeps for itself. Imported by both sides of the pipe."""

import signal

STACK_SIGNAL = signal.SIGRTMAX - 2
"""Makes a rank write its stacks. A real-time signal: USR1, USR2 and TERM belong to the tests."""
