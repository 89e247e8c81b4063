"""Folders that `from_pretrained` takes: small files, shards, index."""
