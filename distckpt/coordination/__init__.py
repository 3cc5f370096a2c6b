"""How the ranks agree: phases that carry errors, one vote per iteration, and heartbeats outside the collectives."""
