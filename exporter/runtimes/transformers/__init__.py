"""transformers as a runtime."""
