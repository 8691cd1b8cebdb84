"""The half of a request that writes the answer."""
