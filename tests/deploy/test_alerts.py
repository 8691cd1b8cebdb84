"""The alerting rules against the real promtool, the metrics that exist, the runbooks, and the operator's schema."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kserve_adapter.manifest.guards import CARRIED
from kserve_adapter.manifest.pools import DESIRED, QUEUE
from kserve_adapter.manifest.presets import PRESETS
from kserve_adapter.manifest.serving import RUNNING
from runtime.metric_reference import VLLM, families, series_of
from runtime.policy.scaling_records import REASONS
from scripts.prometheus_rule import SOURCE, prometheus_rule

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RULES = [rule for group in yaml.safe_load(SOURCE.read_text())["groups"] for rule in group["rules"]]
CASES: list[dict[str, Any]] = yaml.safe_load((HERE / "alerts.test.yaml").read_text())["tests"]

CARRIED_LABELS = {label.replace("-", "_") for label in CARRIED}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian's package prometheus)"
)


@needs_promtool
def test_rules_are_valid() -> None:
    """`promtool check rules` reads all of them and has nothing to say."""
    command = ["promtool", "check", "rules", "--lint=all", "--lint-fatal", str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(RULES)} rules found" in done.stdout


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    """`promtool test rules` over the cases of alerts.test.yaml."""
    done = subprocess.run(["promtool", "test", "rules", "alerts.test.yaml"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_every_alert_has_its_cases_and_its_runbook(alert: str) -> None:
    """Series that make it fire, others that don't, and a section in docs/operations.md."""
    expected = {
        bool(check["exp_alerts"]) for case in CASES for check in case["alert_rule_test"] if check["alertname"] == alert
    }
    assert expected == {False, True}
    assert f"\n#### {alert}\n" in (ROOT / "docs/operations.md").read_text()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_alert_tells_services_apart(rule: dict[str, Any]) -> None:
    """No aggregation drops what the manifests' monitors tell services and revisions apart by; who is paged reads it."""
    kept = re.findall(r"\b(?:max|sum|min|avg|count)\b(?: by \(([^)]*)\))?", rule["expr"])
    assert kept and all(set(labels.split(", ")) >= CARRIED_LABELS for labels in kept)
    assert rule["annotations"]["summary"].startswith(
        "{{ with $labels.baton_name }}{{ . }} {{ $labels.baton_revision }}: {{ end }}"
    )


EXPOSED = {series for name, family in families().items() for series in series_of(name, family.kind)}
"""The names of all series that Baton exposes."""


def test_rules_name_metrics_that_exist() -> None:
    """A metric or a reason that is renamed in the code has to be renamed here."""
    exprs = "\n".join(rule["expr"] for rule in RULES)
    assert set(re.findall(r"\bbaton_\w+", exprs)) <= EXPOSED | CARRIED_LABELS
    series = {entry["series"].partition("{")[0] for case in CASES for entry in case["input_series"]}
    assert series <= EXPOSED
    reasons = {one for found in re.findall(r'reason=~?"([^"]+)"', exprs) for one in found.split("|")}
    assert reasons <= set(REASONS)


def test_autoscalers_ask_for_metrics_that_exist() -> None:
    """As above: what KEDA scales the pools and the front ends by."""
    assert {DESIRED, QUEUE} <= EXPOSED
    assert RUNNING in VLLM


PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "metrics.md")


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.name))
def test_pages_name_metrics_that_exist(page: Path) -> None:
    """As above; with or without `_total`, or the beginning of several with `*` or `{` behind it."""
    known = EXPOSED | set(families())
    for name, several in re.findall(r"\b(baton_[a-z_]+)([*{]?)", page.read_text()):
        label = several == "{" and name in known
        found = any(one.startswith(name) for one in known) if several and not label else name in known
        assert found or name in CARRIED_LABELS, f"{page.name}: {name}"


def test_gpu_settings_keep_below_the_alert() -> None:
    """What vLLM takes at the start leaves room below the limit, or a healthy worker would alert."""
    (limit,) = [rule["expr"].rpartition("> ")[2] for rule in RULES if rule["alert"] == "BatonGpuMemoryHigh"]
    shipped = [*PRESETS.values(), *(yaml.safe_load(file.read_text()) for file in (ROOT / "deploy/config").iterdir())]
    on_gpus = [settings for settings in shipped if settings.get("decode", {}).get("num_gpus")]
    assert len(on_gpus) > 1
    assert all(settings["engine_args"]["gpu_memory_utilization"] <= float(limit) - 0.05 for settings in on_gpus)


def test_the_prometheus_rule_is_up_to_date() -> None:
    """`make docs` was run after the last change of the rules."""
    assert (ROOT / "deploy/alerts/prometheusrule.yaml").read_text() == prometheus_rule()
