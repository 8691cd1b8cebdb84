"""The half of a request that reads the prompt."""
