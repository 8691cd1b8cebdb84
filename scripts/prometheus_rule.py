"""The alerting rules as a PrometheusRule of the Prometheus Operator: `python scripts/prometheus_rule.py`."""

from __future__ import annotations

from pathlib import Path

import yaml

SOURCE = Path(__file__).parent.parent / "deploy" / "alerts" / "baton.rules.yaml"


def prometheus_rule() -> str:
    """The manifest, in YAML."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "baton", "labels": {"app.kubernetes.io/name": "baton"}},
        "spec": yaml.safe_load(SOURCE.read_text()),
    }
    return "# Written from baton.rules.yaml by `make docs`.\n" + yaml.safe_dump(manifest, sort_keys=False, width=120)


if __name__ == "__main__":
    print(prometheus_rule(), end="")
