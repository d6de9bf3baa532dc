"""Training: one module for every method; where adapters go, attaching, saving, the loop."""
