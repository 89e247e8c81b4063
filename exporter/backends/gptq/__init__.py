"""GPTQ: second moments, solver and packing as pure functions over tensors."""
