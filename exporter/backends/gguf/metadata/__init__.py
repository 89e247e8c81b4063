"""Metadata of a GGUF file: written, and checked."""
