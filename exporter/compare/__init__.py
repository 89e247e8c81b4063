"""Compares published folders side by side."""
