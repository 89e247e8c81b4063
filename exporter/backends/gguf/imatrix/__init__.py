"""The importance matrix: its plan and its file."""
