"""Decisions as pure functions over a snapshot."""
