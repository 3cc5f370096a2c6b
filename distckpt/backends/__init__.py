"""Who am I among the ranks, and the few collectives the rest of distckpt needs. Layer L2."""
