"""Evidence over Prometheus's HTTP API, from the metrics that both revisions' front ends export."""

from __future__ import annotations

import math
import time
from typing import Any

import httpx

from kserve_adapter.canary.judge import Evidence, Histogram, NoEvidence

FINISHED = "request_success_total"
TTFT, ITL = "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"
TOKENS, DECODE_S = "generation_tokens_total", "request_decode_time_seconds_sum"
"""vLLM's metrics, without their prefix."""

OTHER = "answers, but not as Prometheus does"


class Prometheus:
    """A server. `selector` below are label matchers such as `baton_name="m",baton_revision="v2"`.

    Raises:
        NoEvidence: when `url` is none.
    """

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        try:
            self._client = httpx.Client(base_url=url.rstrip("/"), timeout=30, transport=transport)
        except httpx.InvalidURL as error:
            raise NoEvidence(f"{url}: {error}") from error

    def close(self) -> None:
        """Ask no more."""
        self._client.close()

    def evidence(self, selector: str, seconds: float, step_s: int = 60) -> Evidence:
        """What is known of a revision for the last `seconds`, its speed for each `step_s` of them.

        Raises:
            NoEvidence: when the server does not answer, or not as Prometheus does.
        """
        span = f"{max(1, round(seconds))}s"
        ended = vllm(FINISHED, f'{selector},finished_reason!="abort"')
        failed = vllm(FINISHED, f'{selector},finished_reason="error"')
        # An error before the response began is in both counts, one after it in the first, a refusal in the second.
        served = f'http_requests_total{{{selector},handler=~".*completions"}}'
        refused = f'http_requests_total{{{selector},handler=~".*completions",status="5xx"}}'
        return Evidence(
            requests=max(self._sum(ended, span), self._sum(served, span)),
            errors=max(self._sum(failed, span), self._sum(refused, span)),
            ttft=self._histogram(TTFT, selector, span),
            itl=self._histogram(ITL, selector, span),
            speeds=self._speeds(selector, seconds, step_s),
        )

    def _sum(self, series: str, span: str) -> float:
        answer = self._query("query", query=_summed(series, span))
        return float(answer[0]["value"][1]) if answer else 0.0

    def _histogram(self, name: str, selector: str, span: str) -> Histogram:
        answer = self._query("query", query=_summed(vllm(name, selector), span, "le"))
        upto = sorted((float(item["metric"]["le"]), float(item["value"][1])) for item in answer)
        counts, before = [], 0.0
        for _, cumulative in upto:
            counts.append(max(0.0, cumulative - before))
            before = max(before, cumulative)
        return Histogram(tuple(bound for bound, _ in upto), tuple(counts))

    def _speeds(self, selector: str, seconds: float, step_s: int) -> tuple[float, ...]:
        """A value for each whole step, 0 for one without any; two revisions' steps are the same ones."""
        now = math.floor(time.time() / step_s) * step_s
        times = [now - step_s * number for number in range(max(1, int(seconds // step_s)))][::-1]
        made, took = (f"sum(increase({vllm(name, selector)}[{step_s}s]))" for name in (TOKENS, DECODE_S))
        query = f"{made} / {took}"
        answer = self._query("query_range", query=query, start=times[0], end=times[-1], step=step_s)
        values = {round(float(at)): float(value) for item in answer for at, value in item["values"]}
        speeds = [values.get(round(at), 0.0) for at in times]
        return tuple(speed if math.isfinite(speed) else 0.0 for speed in speeds)

    def _query(self, kind: str, **params: Any) -> list[Any]:
        try:
            response = self._client.post(f"/api/v1/{kind}", data=params)
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise NoEvidence(f"{self._client.base_url}: {error}") from error
        if not isinstance(answer, dict):
            raise NoEvidence(f"{self._client.base_url}: {OTHER} ({response.status_code})")
        if answer.get("status") != "success":
            raise NoEvidence(f"{self._client.base_url}: {answer.get('error', response.status_code)}")
        data = answer.get("data")
        result = data.get("result") if isinstance(data, dict) else None
        told = "value" if kind == "query" else "values"
        if not isinstance(result, list) or not all(isinstance(item, dict) and told in item for item in result):
            raise NoEvidence(f"{self._client.base_url}: {OTHER}")
        return result


def _summed(series: str, span: str, *by: str) -> str:
    """What was counted in a span by all front ends. Each tells what the others have counted, too, once an instance."""
    told = f"sum by ({', '.join(('instance', 'front_end', *by))}) (increase({series}[{span}]))"
    return f"sum by ({', '.join(by)}) (max by ({', '.join(('front_end', *by))}) ({told}))"


def vllm(name: str, selector: str) -> str:
    """One of vLLM's series. Its colon arrives as `_` where Prometheus was given the OpenMetrics format."""
    return f'{{__name__=~"vllm[:_]{name}",{selector}}}'
