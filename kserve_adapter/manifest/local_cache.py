"""KServe's own caches of models on nodes: what LocalModelCache and LocalModelNodeGroup say."""

from __future__ import annotations

import hashlib

from kserve_adapter.manifest.pods import Object
from kserve_adapter.manifest.settings import KubernetesSettings, LocalModelCacheSettings
from runtime.errors import ConfigError


def local_model_caches(revisions: list[KubernetesSettings]) -> list[Object]:
    """KServe's own caches of the revisions' models on groups of nodes: `storageUri` finds them there.

    KServe refuses a second cache of one URI: they are named by it, so that revisions with the same weights share one.

    Raises:
        ConfigError: the revisions mean different things by one group of nodes, or by one model.
    """
    made: dict[tuple[str, str], Object] = {}
    for settings in revisions:
        if settings.local_model_cache is None:
            continue
        for item in (_node_group(settings.local_model_cache), _cached_model(settings, settings.local_model_cache)):
            key = (item["kind"], item["metadata"]["name"])
            if made.setdefault(key, item) != item:
                raise ConfigError(f"kubernetes.local_model_cache: the canary has another {key[0]} under the same name")
    return list(made.values())


def _cached_model(settings: KubernetesSettings, cache: LocalModelCacheSettings) -> Object:
    digest = hashlib.sha256(str(settings.model_uri).encode()).hexdigest()[:8]
    model = {"sourceModelUri": settings.model_uri, "modelSize": cache.size, "nodeGroups": [cache.node_group]}
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelCache",
        "metadata": {"name": f"{settings.name}-{digest}"},
        "spec": model,
    }


def _node_group(cache: LocalModelCacheSettings) -> Object:
    node_affinity = {
        "required": {
            "nodeSelectorTerms": [
                {"matchExpressions": [{"key": "kserve/localmodel", "operator": "In", "values": [cache.node_group]}]}
            ]
        }
    }
    common = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": cache.storage_class,
        "volumeMode": "Filesystem",
    }
    group = {
        "storageLimit": cache.limit,
        "persistentVolumeSpec": {
            **common,
            "capacity": {"storage": cache.limit},
            "local": {"path": cache.path},
            "nodeAffinity": node_affinity,
            "persistentVolumeReclaimPolicy": "Delete",
        },
        "persistentVolumeClaimSpec": {**common, "resources": {"requests": {"storage": cache.limit}}},
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelNodeGroup",
        "metadata": {"name": cache.node_group},
        "spec": group,
    }
