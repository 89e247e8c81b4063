"""Texts, windows of tokens, prompts."""
