"""Blocks of the GGUF types: layouts, scales, and the quantizer of ggml."""
