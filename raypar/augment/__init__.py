"""Augmentation: one geometry, rendered on the CPU."""
