"""Every set of objects that is checked."""

from __future__ import annotations

import copy
import json
from typing import Any

from kserve_adapter.manifest.presets import PRESETS, config
from kserve_adapter.manifest.render import render
from runtime.config_file import parse
from tests.deploy.objects import Objects


def changed(preset: str, **kubernetes: Any) -> dict[str, Any]:
    """A preset's settings with some of the cluster's changed."""
    data = copy.deepcopy(PRESETS[preset])
    data["kubernetes"].update(kubernetes)
    return data


GATEWAY = {"parent": "public", "namespace": "gateway-system", "hostname": "llm.example.org"}
CANARY = {"revision": "v2", "model_uri": "s3://example-bucket/example-llm/v2"}
CACHE = {"node_group": "gpu", "size": "140Gi", "limit": "1Ti"}


def sets() -> dict[str, Objects]:
    """Everything that is checked: the presets, and each choice that they don't make."""
    made = {preset: render(config(preset)) for preset in PRESETS}
    for preset in ("standard-kuberay", "knative-kuberay", "standard-keda"):
        canary = parse(changed(preset, **CANARY))
        made[f"{preset} canary"] = render(config(preset), canary, 10)
    for istio in (False, True):
        gateway = {"gateway": {**GATEWAY, "istio": istio}}
        first, second = (
            parse(changed("standard-kuberay", **gateway)),
            parse(changed("standard-kuberay", **gateway, **CANARY)),
        )
        made[f"route istio={istio}"] = render(first)
        made[f"route canary istio={istio}"] = render(first, second, 5)
    longer = parse({**changed("standard-kuberay", **CANARY), "limits": {"drain_s": 600.5, "wait_for_worker_s": 10}})
    made["a canary that drains longer"] = render(config("standard-kuberay"), longer, 10)
    newer = changed("standard-kuberay", **CANARY, image="example-registry/baton:0.2.0", api_keys_secret="keys")
    made["a canary of another image"] = render(config("standard-kuberay"), parse(newer), 10)
    made["local model cache"] = render(parse(changed("standard-kuberay", local_model_cache=CACHE)))
    cached = [parse(changed("standard-kuberay", local_model_cache=CACHE, **more)) for more in ({}, CANARY)]
    made["local model cache canary"] = render(*cached, 10)
    made["knative embedded"] = render(parse(changed("cpu-embedded", mode="knative")))
    made["desired"] = render(
        parse(changed("standard-keda", signal="desired", namespace="models", api_keys_secret="keys"))
    )
    return made


SETS = sets()


def fresh(name: str) -> Objects:
    """A copy in which no two objects share a part."""
    made: Objects = json.loads(json.dumps(SETS[name]))
    return made
