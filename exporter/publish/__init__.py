"""Manifest, model card, report and serving commands of an output folder."""
