"""Serving runtimes that score artifacts."""
