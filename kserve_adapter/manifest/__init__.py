"""Kubernetes manifests from Baton's settings: the one source of the chart, of the kustomize bases and of what
`baton manifest` prints."""
