"""Training: a vision and a dense stage make a small model, the Dynamic stage makes it sparse."""
