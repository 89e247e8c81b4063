"""Weights read back and held against the merge."""
