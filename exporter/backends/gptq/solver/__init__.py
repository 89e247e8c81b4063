"""The GPTQ solver: pure functions over tensors."""
