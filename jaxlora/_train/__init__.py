"""Gradients and optimizers for the trainable leaves."""
