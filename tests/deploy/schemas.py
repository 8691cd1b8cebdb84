"""Kubernetes' own schemas for its kinds, and those of the custom kinds, which drop nothing silently here.

An API server prunes fields that it does not know; a manifest with a misspelt one is accepted and does something else.
So unknown fields are errors.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

VERSION = "1.37"
CRDS = Path(os.environ.get("BATON_CRDS", "/nowhere"))
CUSTOM = ("serving.kserve.io", "ray.io", "keda.sh", "monitoring.coreos.com", "gateway.networking.k8s.io")
CUSTOM_GROUPS = (*CUSTOM, "networking.istio.io")

needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(),
    reason="BATON_CRDS names no folder with the CRDs of KServe, KubeRay, KEDA, Gateway API and Prometheus",
)


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's structural schema as JSON Schema, closed where an API server would prune."""
    made = {
        key: schema[key]
        for key in ("type", "enum", "required", "pattern", "minimum", "maximum", "format")
        if key in schema
    }
    made.pop("format", None)
    if schema.get("x-kubernetes-int-or-string"):
        made = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in schema:
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
    extra = schema.get("additionalProperties")
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(extra, dict):
        made["additionalProperties"] = strict(extra)
    elif made.get("type") == "object" and not open_ended and extra is None:
        made["additionalProperties"] = False
    if "items" in schema:
        made["items"] = strict(schema["items"])
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") else made


@functools.cache
def custom_schema(api_version: str, kind: str) -> dict[str, Any] | None:
    """The schema of a custom kind; None where its CRD is not to be had."""
    group, version = api_version.split("/")
    for path in sorted(CRDS.rglob("*.yaml")):
        if kind.lower() not in path.name.lower():
            continue
        for crd in yaml.load_all(path.read_text(), yaml.CSafeLoader):
            if not crd or crd.get("kind") != "CustomResourceDefinition":
                continue
            if crd["spec"]["group"] == group and crd["spec"]["names"]["kind"] == kind:
                (found,) = [item for item in crd["spec"]["versions"] if item["name"] == version]
                schema = strict(found["schema"]["openAPIV3Schema"])
                schema["properties"] |= {"metadata": {"type": "object"}, "apiVersion": {}, "kind": {}}
                return schema
    return None


def is_custom(item: dict[str, Any]) -> bool:
    """Whether a kind is not Kubernetes' own."""
    return str(item["apiVersion"]).split("/")[0] in CUSTOM_GROUPS


def problems(item: dict[str, Any]) -> list[str]:
    """What is wrong with an object by its schema."""
    if not is_custom(item):
        try:
            kubernetes_validate.validate(item, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{item['kind']}: {error.message}"]
        return []
    schema = custom_schema(item["apiVersion"], item["kind"])
    if schema is None:
        return [f"no schema for {item['apiVersion']} {item['kind']}"]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(item)
    return [f"{item['kind']} {error.json_path}: {error.message[:200]}" for error in errors]
