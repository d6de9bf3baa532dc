"""PROOF: re-reads the output and recomputes it by other means. May not import merge."""
