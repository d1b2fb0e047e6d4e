"""Outputs about a run: progress, events, result.json, status, and the HTML report."""
