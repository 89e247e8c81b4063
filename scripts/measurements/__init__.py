"""Figures of quality that the documentation states and that limits rest on."""
