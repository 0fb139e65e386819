"""Helpers that know JAX's arrays and trees, and nothing of LoRA."""
