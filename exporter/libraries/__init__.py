"""Keeps other libraries quiet and in bounds."""
