"""The presets in `deploy/chart/presets`, for Helm and kustomize: written by `make manifests`, never by hand.

They stand for a service called `example-llm`; chart and overlays put their own name, revision, image and weights in.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kserve_adapter.manifest.render import render, to_yaml
from runtime.config import Config
from runtime.config_file import parse

REVISION = "example-v1"
WEIGHTS = "s3://example-bucket/weights"
GPU_NODES: dict[str, Any] = {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]}


def _gpu_settings(**kubernetes: Any) -> dict[str, Any]:
    """Two GPUs a worker, the pools on node pools of their own, RDMA between them."""
    pods = {
        role: {
            **GPU_NODES,
            "node_selector": {"baton-pool": role},
            "rdma_resource": "rdma/hca",
            "memory": "128Gi",
            "max_replicas": 10,
        }
        for role in ("prefill", "decode")
    }
    return {
        "engine_args": {"dtype": "bfloat16", "gpu_memory_utilization": 0.85, "tensor_parallel_size": 2},
        "prefill": {"num_gpus": 2, "num_cpus": 1},
        "decode": {"num_gpus": 2, "num_cpus": 1},
        "transport": {"ucx_tls": "cuda_copy,cuda_ipc,rc,self,sm,tcp"},
        "kubernetes": {"model_uri": WEIGHTS, "model_secret": "model-store", "revision": REVISION, **pods, **kubernetes},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "standard-kuberay": _gpu_settings(),
    "standard-rayservice": _gpu_settings(pools="rayservice"),
    "standard-keda": _gpu_settings(pools="deployments", signal="queue", predictor={"autoscaler": "keda", "target": 64}),
    "knative-kuberay": _gpu_settings(mode="knative", predictor={"min_replicas": 1, "target": 64}),
    "cpu-embedded": {
        "engine_args": {"max_model_len": 8192, "block_size": 128, "kv_cache_memory_bytes": 2**30},
        "kubernetes": {
            "model_uri": WEIGHTS,
            "model_secret": "model-store",
            "revision": REVISION,
            "pools": "embedded",
            "cluster_runtime": True,
            "predictor": {"min_replicas": 1, "autoscaler": "none", "cpu": "4", "memory": "16Gi"},
        },
    },
}


def config(preset: str) -> Config:
    """A preset's settings."""
    return parse(PRESETS[preset], preset)


def files() -> dict[str, str]:
    """Every file of `deploy/chart/presets`, by its path there."""
    head = "# Written by `make manifests` from kserve_adapter/manifest/presets.py.\n"
    made = {}
    for preset in PRESETS:
        made[f"{preset}/objects.yaml"] = head + to_yaml(render(config(preset)))
        made[f"{preset}/kustomization.yaml"] = (
            f"{head}apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [objects.yaml]\n"
        )
    return made


def main(target: Path) -> int:
    """Write them below `target`."""
    for name, text in files().items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
