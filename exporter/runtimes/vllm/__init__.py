"""vLLM as a runtime."""
