"""GPTQModel as a backend."""
