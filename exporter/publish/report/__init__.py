"""`report.html`: the manifest as a page for people."""
