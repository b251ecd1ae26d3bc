"""Conversion of weights and checkpoints of other projects; run as `python -m convert`."""
