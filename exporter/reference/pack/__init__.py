"""The reference pack: the reference as files."""
