"""Engines, and KV blocks on their way between them."""
