"""Attention with weighted keys, for training, and a look at its weights."""
