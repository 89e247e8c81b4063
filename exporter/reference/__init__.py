"""What the trained model predicts: the reference."""
