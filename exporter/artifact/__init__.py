"""Staging, publishing and the manifest."""
