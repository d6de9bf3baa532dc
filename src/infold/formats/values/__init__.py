"""VALUES OF QUANTIZED MODULES: stored parts <-> float64. One file a format."""
