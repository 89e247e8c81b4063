"""Time, memory and disk, measured."""
