"""Evidence over Prometheus's HTTP API, from the metrics that both revisions' front ends export."""

from __future__ import annotations

import math
import time
from typing import Any

import httpx

from kserve_adapter.canary.judge import Evidence, Histogram, NoEvidence

FINISHED = "vllm:request_success_total"
HTTP = "http_requests_total"
TTFT, ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
TOKENS, DECODE_S = "vllm:generation_tokens_total", "vllm:request_decode_time_seconds_sum"
STEP_S = 60


class Prometheus:
    """A server. `selector` below are label matchers such as `baton_name="m",baton_revision="v2"`."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self._client = httpx.Client(base_url=url.rstrip("/"), timeout=30, transport=transport)

    def evidence(self, selector: str, seconds: float) -> Evidence:
        """What is known of a revision for the last `seconds`.

        Raises:
            NoEvidence: when the server does not answer.
        """
        span = f"{max(1, round(seconds))}s"
        ended = f'{FINISHED}{{{selector},finished_reason!="abort"}}'
        failed = f'{FINISHED}{{{selector},finished_reason="error"}}'
        # An error before the response began is in both counts, one after it in the first, a refusal in the second.
        served = f'{HTTP}{{{selector},handler=~".*completions"}}'
        refused = f'{HTTP}{{{selector},handler=~".*completions",status="5xx"}}'
        return Evidence(
            requests=max(self._sum(ended, span), self._sum(served, span)),
            errors=max(self._sum(failed, span), self._sum(refused, span)),
            ttft=self._histogram(TTFT, selector, span),
            itl=self._histogram(ITL, selector, span),
            speeds=self._speeds(selector, seconds),
        )

    def _sum(self, series: str, span: str) -> float:
        answer = self._query("query", query=f"sum(increase({series}[{span}]))")
        return float(answer[0]["value"][1]) if answer else 0.0

    def _histogram(self, name: str, selector: str, span: str) -> Histogram:
        answer = self._query("query", query=f"sum(increase({name}_bucket{{{selector}}}[{span}])) by (le)")
        upto = sorted((float(item["metric"]["le"]), float(item["value"][1])) for item in answer)
        counts, before = [], 0.0
        for _, cumulative in upto:
            counts.append(max(0.0, cumulative - before))
            before = max(before, cumulative)
        return Histogram(tuple(bound for bound, _ in upto), tuple(counts))

    def _speeds(self, selector: str, seconds: float) -> tuple[float, ...]:
        """A value for each whole minute, 0 for one without any."""
        now = math.floor(time.time() / STEP_S) * STEP_S
        steps = max(1, int(seconds // STEP_S))
        times = [now - STEP_S * number for number in range(steps)][::-1]
        query = f"sum(increase({TOKENS}{{{selector}}}[{STEP_S}s])) / sum(increase({DECODE_S}{{{selector}}}[{STEP_S}s]))"
        answer = self._query("query_range", query=query, start=times[0], end=times[-1], step=STEP_S)
        values = {round(float(at)): float(value) for item in answer for at, value in item["values"]}
        speeds = [values.get(round(at), 0.0) for at in times]
        return tuple(speed if math.isfinite(speed) else 0.0 for speed in speeds)

    def _query(self, kind: str, **params: Any) -> list[Any]:
        try:
            response = self._client.post(f"/api/v1/{kind}", data=params)
            answer = response.json()
        except (httpx.TransportError, ValueError) as error:
            raise NoEvidence(f"{self._client.base_url}: {error}") from error
        if answer.get("status") != "success":
            raise NoEvidence(f"{self._client.base_url}: {answer.get('error', response.status_code)}")
        result: list[Any] = answer["data"]["result"]
        return result
