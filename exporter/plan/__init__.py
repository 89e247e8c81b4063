"""The plan of a run as data, with its estimates."""
