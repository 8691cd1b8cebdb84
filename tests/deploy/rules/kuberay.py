"""What KubeRay's operator refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.deploy.mutation import POD, WORKERS, Mutations, put
from tests.deploy.objects import Objects, Rule, of


def kuberay_would_agree(objects: Objects) -> Iterator[str]:
    """The rules of KubeRay's operator, which schemas don't have."""
    longest = {"RayCluster": 53, "RayService": 47}
    for item in of(objects, *longest):
        kind, name = item["kind"], item["metadata"]["name"]
        if len(name) > longest[kind] or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{kind} {name}: KubeRay takes no such name"
        spec = item["spec"].get("rayClusterConfig", item["spec"])
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            where = f"{kind} {name}/{group.get('groupName', 'head')}"
            if "labels" in group["rayStartParams"]:
                yield f"{where}: labels belong into the group's own field"
            if (
                spec.get("enableInTreeAutoscaling")
                and group["template"]["spec"].get("restartPolicy", "Never") != "Never"
            ):
                yield f"{where}: its pods are the autoscaler's to replace"
            if group.get("minReplicas", 0) > group.get("maxReplicas", 1):
                yield f"{where}: bounds"


RULES: tuple[Rule, ...] = (kuberay_would_agree,)
MUTATIONS: Mutations = {
    "a name too long": ("standard-rayservice", put("RayService", "metadata.name", "example-llm-" + "v" * 36)),
    "labels that KubeRay refuses": (
        "standard-kuberay",
        put("RayCluster", f"{WORKERS}.rayStartParams.labels", "pool=prefill"),
    ),
    "pods that restart themselves": ("standard-kuberay", put("RayCluster", f"{POD}.restartPolicy", "Always")),
    "bounds the wrong way round": ("standard-kuberay", put("RayCluster", f"{WORKERS}.maxReplicas", 0)),
}
