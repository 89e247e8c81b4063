"""plan → tour → stage → verify → publish."""
