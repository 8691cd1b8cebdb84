"""Baton behind KServe."""
