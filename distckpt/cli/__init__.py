"""The command ``distckpt``: list, inspect, verify, compare, convert and prune checkpoints.

It imports no ignite, loads no object, and executes no code from a file. Each command is a module with a function
``run``, imported when the command is called; :mod:`distckpt.cli.command_line` has their arguments.
"""

from distckpt.cli.command_line import main

__all__ = ["main"]
