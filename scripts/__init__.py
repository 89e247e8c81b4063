"""Programs for people who work on the exporter: the demo, oracles, benchmarks, measurements, sabotage."""
