"""Weights of photo, read by ``dynamic_llava.load("photo")``; there is no code in here."""
