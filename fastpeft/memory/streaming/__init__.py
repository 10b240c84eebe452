"""Frozen weights that wait in host memory and are on the device in their layer's turn."""
