"""Preference training on abstracts: `pairs` (the data), `training` (loss, loop, checkpoints), `tables` (and plot)."""
