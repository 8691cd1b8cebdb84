"""What containers may do, and what they mount."""

from __future__ import annotations

from collections.abc import Iterator

from tests.deploy.mutation import HEAD, POD, Mutations, put
from tests.deploy.objects import Objects, Rule, pod_templates


def nothing_runs_as_root(objects: Objects) -> Iterator[str]:
    """Not root, nothing to gain, a root that can't be written, no unusual system calls, in every container."""
    for name, spec, _ in pod_templates(objects):
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            security = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
            if not security.get("runAsNonRoot") or not security.get("runAsUser") or not security.get("runAsGroup"):
                yield f"{name}/{container['name']} may run as root"
            if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
                yield f"{name}/{container['name']} may make any system call"
            if security.get("allowPrivilegeEscalation") is not False or security["capabilities"]["drop"] != ["ALL"]:
                yield f"{name}/{container['name']} can gain privileges"
            if not security.get("readOnlyRootFilesystem"):
                yield f"{name}/{container['name']} can write its root"
            if "memory" not in container["resources"]["limits"]:
                yield f"{name}/{container['name']} has no limit on memory"


def mounts_have_volumes(objects: Objects) -> Iterator[str]:
    """Every mount names a volume, no volume is there twice, no path is mounted twice, /tmp can be written."""
    for name, spec, _ in pod_templates(objects):
        volumes = [volume["name"] for volume in spec.get("volumes", [])]
        if len(volumes) != len(set(volumes)):
            yield f"{name} has a volume twice"
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            mounts = container["volumeMounts"]
            paths = [mount["mountPath"] for mount in mounts]
            if len(paths) != len(set(paths)):
                yield f"{name}/{container['name']} mounts a path twice"
            if "/tmp" not in paths:
                yield f"{name}/{container['name']} can't write anywhere"
            yield from (
                f"{name}/{container['name']} mounts {mount['name']}, which is no volume"
                for mount in mounts
                if mount["name"] not in volumes
            )


RULES: tuple[Rule, ...] = (nothing_runs_as_root, mounts_have_volumes)
MUTATIONS: Mutations = {
    "root": ("standard-kuberay", put("RayCluster", f"{POD}.securityContext.runAsUser", 0)),
    "root in Knative mode": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.initContainers.0.securityContext.runAsUser", None),
    ),
    "any system call": ("standard-kuberay", put("RayCluster", f"{HEAD}.securityContext.seccompProfile", None)),
    "a writable root": (
        "standard-kuberay",
        put("RayCluster", f"{POD}.containers.0.securityContext.readOnlyRootFilesystem", False),
    ),
    "no limit": ("standard-kuberay", put("RayCluster", f"{POD}.containers.0.resources.limits.memory", None)),
    "an unknown volume": ("standard-kuberay", put("RayCluster", f"{POD}.containers.0.volumeMounts.0.name", "x")),
}
