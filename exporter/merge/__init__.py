"""Merges base and adapters row block by row block."""
