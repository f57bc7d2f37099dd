"""Augmentation: one geometry, rendered on the CPU or, for a whole batch, on the device."""
