"""The layer-at-a-time walk through the model's own code."""
