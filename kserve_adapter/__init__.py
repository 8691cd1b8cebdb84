"""Baton behind KServe."""

import os

# Before anything imports gRPC. Its fork handlers run in every child of a predictor, Ray's processes among them, with
# other threads in gRPC: none of these children uses gRPC before it has become another program.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
