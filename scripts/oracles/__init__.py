"""Other people's tools, and comparisons of our files with what they make."""
