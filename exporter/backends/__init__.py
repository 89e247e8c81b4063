"""Backends write artifacts; each is a plug-in behind one protocol."""
