"""Where bytes live: files that appear whole and durable, or not at all."""
