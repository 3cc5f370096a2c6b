"""Runtimes: which rank this process is, and the few collectives that the rest of distckpt needs."""
