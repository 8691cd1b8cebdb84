"""Whether a new revision is as good as the one it is to replace: evidence from Prometheus, a sequential judgement."""
