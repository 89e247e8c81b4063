"""Adapter methods: one or two files each."""
