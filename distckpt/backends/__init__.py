"""Which rank this process is, and the few collectives that the other packages need."""
