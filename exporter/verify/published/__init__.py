"""Verifies a published artifact."""
