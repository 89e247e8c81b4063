"""Artifacts that are broken on purpose, to see that verification says so."""
