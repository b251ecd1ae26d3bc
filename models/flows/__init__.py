"""Normalizing flows; this folder needs nothing but Paddle and NumPy and can be copied out."""
