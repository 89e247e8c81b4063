"""Reads checkpoints, tokenizers and chat templates."""
