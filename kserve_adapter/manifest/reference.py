"""`docs/kubernetes.md`, generated from the code: `python -m kserve_adapter.manifest.reference`."""

from __future__ import annotations

from kserve_adapter.manifest.settings import KubernetesSettings
from runtime.config_reference import rows

HEAD = """# Settings of the cluster

The `kubernetes` section of a settings file, which `baton manifest` alone reads. [kserve.md](kserve.md) says what for.
This page is generated from the code by `make docs`.

| key | default | meaning |
|---|---|---|"""


def reference() -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *rows(KubernetesSettings, "kubernetes.")]) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
