"""What a request's headers say to admission."""

from __future__ import annotations

import hashlib
import time

import pytest

from runtime.admission_settings import AdmissionSettings
from runtime.errors import ConfigError, Refusal
from runtime.policy.admission import CLASSES
from runtime.visit import SHARED_TENANTS, Reception, Visit

KEY, OTHER = hashlib.sha256(b"key").digest(), hashlib.sha256(b"other").digest()
SETTINGS = AdmissionSettings.model_validate(
    {
        "tenant_header": "X-Tenant",
        "tenants": {"team": {"weight": 3, "api_keys_sha256": [KEY.hex()]}, "batch": {"best_priority": "low"}},
    }
)


def visit(digest: bytes | None = None, settings: AdmissionSettings = SETTINGS, **headers: str) -> Visit:
    """The visit of a request with these headers."""
    raw = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return Reception(settings).visit(raw, digest)


@pytest.mark.parametrize(
    ("digest", "headers", "tenant"),
    [
        (None, {}, ""),
        (KEY, {}, "team"),
        (None, {"x_tenant": "batch"}, "batch"),
        (KEY, {"x_tenant": "batch"}, "team"),  # a key can't be put on like a name
        (OTHER, {"x_tenant": "team"}, "team"),
    ],
)
def test_tenants_with_a_name(digest: bytes | None, headers: dict[str, str], tenant: str) -> None:
    """By the API key, else by the header."""
    assert visit(digest, **headers).tenant == tenant


def test_tenants_without_a_name_are_few() -> None:
    """Each key and each value of the header is a tenant of its own, up to a number that nobody can exceed."""
    assert visit(OTHER).tenant == visit(OTHER).tenant != visit(KEY, AdmissionSettings()).tenant  # type: ignore[call-arg]
    tenants = {visit(x_tenant=str(number)).tenant for number in range(20_000)}
    assert 900 < len(tenants) <= SHARED_TENANTS
    assert visit(x_tenant="a", settings=AdmissionSettings()).tenant == ""  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("header", "body", "tenant", "name"),
    [
        (None, 0, "", "normal"),
        (None, -3, "", "high"),
        (None, 3, "", "low"),
        ("high", 3, "", "high"),
        ("Low", 0, "", "low"),
        ("-1", 0, "", "high"),
        ("0", 5, "", "normal"),
        ("high", -1, "batch", "low"),
        (None, 0, "batch", "low"),
    ],
)
def test_priority(header: str | None, body: int, tenant: str, name: str) -> None:
    """The header wins over the body's `priority`, and nobody gets a better class than the tenant has."""
    headers = {"x_tenant": tenant, **({"x_baton_priority": header} if header else {})}
    assert CLASSES[visit(**headers).level_for(body)] == name


@pytest.mark.parametrize(
    ("header", "setting", "seconds"), [(None, None, None), ("1500", None, 1.5), (None, 2.0, 2.0), ("9000", 2.0, 2.0)]
)
def test_deadline(header: str | None, setting: float | None, seconds: float | None) -> None:
    """The client's, or the settings', whichever comes first."""
    settings = AdmissionSettings.model_validate({"deadline_s": setting})
    deadline = visit(None, settings, **({"x_baton_deadline_ms": header} if header else {})).deadline
    assert deadline is None if seconds is None else deadline == pytest.approx(time.monotonic() + seconds, abs=0.5)


@pytest.mark.parametrize(
    "headers",
    [{"x_baton_priority": "urgent"}, {"x_baton_deadline_ms": "soon"}, {"x_baton_deadline_ms": "-1"}],
    ids=str,
)
def test_a_wrong_header_is_told(headers: dict[str, str]) -> None:
    """Not ignored: the client believes that it asked for something."""
    with pytest.raises(Refusal) as caught:
        visit(**headers)
    assert caught.value.reason == "invalid_header"


def test_settings_are_checked() -> None:
    """A key of two tenants, a digest that is none, a misspelt key in a tenant."""
    from runtime.config_file import parse

    key = KEY.hex()
    for tenants, words in (
        ({"a": {"api_keys_sha256": [key]}, "b": {"api_keys_sha256": [key]}}, "one tenant only"),
        ({"a": {"api_keys_sha256": ["key"]}}, "api_keys_sha256"),
        ({"a": {"wieght": 2}}, "did you mean `weight`"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse({"admission": {"tenants": tenants}})
    assert parse({"admission": {"tenants": {"a": {"weight": 2}}}}).admission.policy().weight("a") == 2.0


def test_refused_once_and_not_after_the_start() -> None:
    """The first reason counts, and a response that has begun can't be taken back."""
    first, second = Refusal("overloaded", "a"), Refusal("deadline", "b")
    refused = visit()
    refused.refuse(first)
    refused.refuse(second)
    assert refused.refusal is first
    begun = visit()
    begun.started = True
    begun.refuse(first)
    assert begun.refusal is None
