"""The demo: a small Qwen3 and a LoRA adapter, trained here in two minutes."""
