"""Volumization: an image as a stack of its patches in a chosen order, networks over such stacks, and their training."""
