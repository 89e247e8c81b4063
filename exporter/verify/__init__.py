"""From token scores to a verdict."""
