"""Evidence for decisions: what is kept, logged, counted and told over HTTP and on the command line."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from kv_transfer.costs import Cost as WorkerCost
from kv_transfer.engine import EngineFacts
from kv_transfer.load import Load, News
from runtime import placement as placement_module
from runtime.account import Account
from runtime.admission_settings import AdmissionSettings
from runtime.cache_view import CacheView
from runtime.cli import main
from runtime.edge import Edge
from runtime.explain_command import table
from runtime.insight import explain_route, placement_record
from runtime.placement import Placement
from runtime.policy.routing import REASONS
from runtime.policy.types import Cost, Local, Plan, Refused, RoutingSettings, Snapshot, WorkerView
from runtime.visit import Reception
from runtime.worker import State
from tests.conftest import ROOT

FACTS = EngineFacts(
    "d0", "decode", "/m", "bfloat16", "auto", 16, 1, 8192, 1000, "127.0.0.1", 1, max_streams=64, max_step_tokens=2048
)


def view(name: str, queued: int = 0, streams: int = 0) -> WorkerView:
    """A measured worker: reads 10,000 tokens a second."""
    costs = {"prefill": Cost(0.0, 1e-4), "step": Cost(0.01, 1e-4), "pull": Cost(0.005, 1e-6)}
    return WorkerView(name, 0, 0, queued, int(queued > 0), streams, max_step_tokens=2048, **costs)


SNAPSHOT = Snapshot((view("p0", queued=5000), view("p1")), (view("d0", streams=3), view("d1", streams=1)))


def request(name: str, tokens: int = 1000) -> Any:
    """A request as vLLM's front end makes it: `name` is what the client's response is called."""
    params = SamplingParams(max_tokens=4)
    return EngineCoreRequest(f"{name}-0-abcd1234", [1] * tokens, None, params, None, 0.0, None, None, None,
                             external_req_id=f"{name}-0")  # fmt: skip


def plan_with(placement: Placement, asked: Any, snapshot: Snapshot) -> Plan:
    """Plan a request as the cluster does."""
    look = placement.look(asked, [], snapshot)
    assert not isinstance(look.plan, Refused)
    placement.chose(asked, [], look, look.plan)
    return look.plan


@pytest.fixture
def placement() -> Placement:
    """A placement without a cache."""
    return Placement(RoutingSettings(), CacheView(1000))


def app(placement: Placement, *keys: str) -> Edge:
    """A front end's routes behind its edge."""
    account = Account(FACTS)
    account.news(News(Load(queued_tokens=320, queued_requests=2, streams=5, free_blocks=900,
                           prefill=WorkerCost(0.01, 1e-4)), legs=0))  # fmt: skip
    worker = SimpleNamespace(link=SimpleNamespace(facts=FACTS), account=account, state=State.READY)
    fleet = SimpleNamespace(snapshot=lambda: SNAPSHOT, workers={"d0": worker})
    cluster: Any = SimpleNamespace(fleet=fleet, placement=placement)

    async def fleet_route(_: Request) -> JSONResponse:
        return JSONResponse(placement_record(cluster))

    return Edge(
        Starlette(routes=[explain_route(cluster), Route("/baton/fleet", fleet_route)]),
        max_body_bytes=1000,
        api_keys=keys,
        reception=Reception(AdmissionSettings()),
    )


async def get(edge: Edge, path: str, client: tuple[str, int] = ("127.0.0.1", 1), **headers: str) -> httpx.Response:
    """Ask as some client."""
    transport = httpx.ASGITransport(edge, client=client)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.get(path, headers=headers)


def test_every_plan_leaves_a_line_and_a_count(placement: Placement, caplog: pytest.LogCaptureFixture) -> None:
    """Plan, reason, prediction and the measured first token, once per request."""
    labels = {"plan": "disaggregated", "reason": "least_ttft"}
    counted = REGISTRY.get_sample_value("baton_plans_total", labels) or 0.0
    asked = request("cmpl-1", tokens=8000)
    plan = plan_with(placement, asked, SNAPSHOT)
    assert REGISTRY.get_sample_value("baton_plans_total", {**labels, "reason": plan.reason}) == counted + 1
    with caplog.at_level(logging.INFO, "baton.placement"):
        placement.first_token(asked.request_id)
        placement.first_token(asked.request_id)
    assert len(caplog.messages) == 1
    fields = dict(field.split("=") for field in caplog.messages[0].split())
    assert fields["request"] == asked.request_id
    assert (fields["plan"], fields["prefill"], fields["reason"]) == ("disaggregated", "p1", plan.reason)
    assert float(fields["predicted_ttft_s"]) == pytest.approx(0.82, abs=0.05)
    assert 0 <= float(fields["ttft_s"]) < 1


def test_reasons_are_few() -> None:
    """Labels of a metric: a fixed set of short words."""
    assert len(REASONS) < 20
    assert all(len(reason) < 30 and reason.replace("_", "").isalpha() for reason in REASONS)


def test_the_docs_list_every_reason() -> None:
    """With the meaning that `explain` prints."""
    docs = (ROOT / "docs/placement.md").read_text()
    assert [reason for reason, meaning in REASONS.items() if f"| `{reason}` | {meaning} |" not in docs] == []


@pytest.mark.parametrize("name", ["cmpl-mine", "mine", "cmpl-mine-0", "cmpl-mine-0-abcd1234"])
def test_a_decision_is_found_by_any_of_its_names(placement: Placement, name: str) -> None:
    """The response's id, the client's X-Request-Id, vLLM's ids."""
    plan_with(placement, request("cmpl-other"), SNAPSHOT)
    plan_with(placement, request("cmpl-mine"), SNAPSHOT)
    found = placement.find(name)
    assert found is not None and found.external_id == "cmpl-mine-0"
    assert placement.find("cmpl-nobody") is None


def test_only_the_last_decisions_are_kept(placement: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded."""
    monkeypatch.setattr(placement_module, "KEPT", 3)
    for number in range(5):
        plan_with(placement, request(f"cmpl-{number}"), SNAPSHOT)
    assert [placement.find(f"cmpl-{number}") is not None for number in range(5)] == [False, False, True, True, True]


async def test_explains_a_past_request_from_its_own_snapshot(placement: Placement) -> None:
    """Whatever the fleet looks like now."""
    busy = Snapshot((view("p0"), view("p1", queued=50_000)), (view("d0", streams=3), view("d1", streams=1)))
    asked = request("cmpl-1", tokens=8000)
    plan_with(placement, asked, busy)
    placement.first_token(asked.request_id)
    answer = (await get(app(placement), "/baton/explain?request=cmpl-1")).json()
    assert (answer["answer"]["plan"], answer["answer"]["prefill"]) == ("disaggregated", "p0")
    assert answer["ttft_s"] > 0
    assert answer["candidates"][0]["why"].startswith("wins: ")
    others = {c["prefill"]: c for c in answer["candidates"][1:]}
    assert others["p1"]["backlog_s"] == pytest.approx(5.0)
    assert others["p1"]["why"].endswith("s slower")
    assert "p1" in table(answer) and "wins: " in table(answer)
    assert (await get(app(placement), "/baton/explain?request=nobody")).status_code == 404


async def test_explains_a_hypothetical_prompt(placement: Placement) -> None:
    """A length, and what a worker would hold of it."""
    answer = (await get(app(placement), "/baton/explain?tokens=8000&cached=p0:7500")).json()
    assert (answer["answer"]["prefill"], answer["answer"]["reason"]) == ("p0", "follows_cache")
    assert answer["answer"]["uncached_tokens"] == 500
    assert answer["candidates"][0]["cached_tokens"] == 7500
    for wrong in ("", "?tokens=x", "?tokens=5&cached=p0"):
        assert (await get(app(placement), f"/baton/explain{wrong}")).status_code == 400


async def test_the_fleet_is_told_in_stable_fields(placement: Placement) -> None:
    """What `baton top` and others read. A change here is a change of the format's version."""
    record = (await get(app(placement), "/baton/fleet")).json()
    assert set(record) == {
        "version", "time", "routing", "handoff_s", "index", "workers",
    }  # fmt: skip
    assert record["version"] == 1
    assert record["workers"] == [
        {
            "engine_id": "d0", "role": "decode", "state": "ready", "requests": 0, "tokens": 0,
            "queued_tokens": 320, "queued_requests": 2, "backlog_s": 0.052, "streams": 5, "pulling_tokens": 0,
            "free_blocks": 900, "num_blocks": 1000, "block_tokens": 16, "max_streams": 64, "max_step_tokens": 2048,
            "prefill": {"fixed_s": 0.01, "each_s": 1e-4}, "step": None, "pull": None,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "client", "headers", "status"),
    [
        ((), ("127.0.0.1", 1), {}, 200),
        ((), ("::1", 1), {}, 200),
        ((), ("10.0.0.5", 1), {}, 403),
        ((), ("127.0.0.1", 1), {"X-Forwarded-For": "10.0.0.5"}, 403),
        (("k",), ("127.0.0.1", 1), {}, 401),
        (("k",), ("10.0.0.5", 1), {"Authorization": "Bearer k"}, 200),
    ],
)
async def test_who_may_look_inside(
    placement: Placement, keys: tuple[str, ...], client: tuple[str, int], headers: dict[str, str], status: int
) -> None:
    """This machine where there are no keys; whoever has a key where there are some."""
    for path in ("/baton/fleet", "/baton/explain?tokens=5"):
        assert (await get(app(placement, *keys), path, client, **headers)).status_code == status


def test_baton_explain_prints_a_table(
    placement: Placement, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command asks the route with its key, and prints each candidate."""
    import runtime.explain_command as command
    from runtime.insight import explained
    from runtime.policy.types import RequestView

    asked: list[tuple[str, str | None]] = []

    def answer(url: str, key: str | None) -> tuple[int, dict[str, Any]]:
        asked.append((url, key))
        return 200, json.loads(json.dumps(explained(RequestView(300), SNAPSHOT, placement.routing)))

    monkeypatch.setattr(command, "_get", answer)
    monkeypatch.setenv("BATON_API_KEY", "k")
    line = ["explain", "--url", "http://h:1/", "--tokens", "300", "--cached", "p0=128"]
    assert main(line) == 0
    assert asked == [("http://h:1/baton/explain?tokens=300&cached=p0%3A128", "k")]
    printed = capsys.readouterr().out
    assert "prompt of 300 tokens" in printed and "d1" in printed and "wins: " in printed
    assert main([*line[:-1], "p0"]) == 2


def test_baton_explain_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    """A plain sentence, not a traceback."""
    assert main(["explain", "--url", "http://127.0.0.1:1", "--tokens", "5"]) == 2
    assert "no server of Baton answers at http://127.0.0.1:1" in capsys.readouterr().err


def test_a_short_prompt_says_why_it_stays_whole(placement: Placement) -> None:
    """Reason and prediction are those of the policy."""
    plan = plan_with(placement, request("cmpl-1", tokens=50), SNAPSHOT)
    assert isinstance(plan, Local) and plan.reason == "short_prompt" and plan.decode == "d1"
