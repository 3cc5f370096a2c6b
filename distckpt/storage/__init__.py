"""Where the bytes of a checkpoint are stored: a file appears whole and durable, or not at all."""
