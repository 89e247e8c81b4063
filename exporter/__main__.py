"""`python -m exporter`."""

from __future__ import annotations

from exporter.cli.app import main

main()
