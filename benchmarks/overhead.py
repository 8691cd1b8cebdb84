"""What Baton itself costs: engines that take no time, behind Baton and behind vLLM's own API server.

    python -m benchmarks.overhead

Prints the time to first token of one client and the streamed tokens per second of 64, for both servers, measured in
turns, as medians with the quartiles, and the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import yaml

from benchmarks.servers import ROOT, running
from runtime.config_file import load

PROMPT = list(range(1000, 1100))


async def first_token_s(session: aiohttp.ClientSession, url: str, model: str, number: int) -> float:
    """Seconds from sending a request until its first token."""
    body = {"model": model, "prompt": [number, *PROMPT], "max_tokens": 2, "ignore_eos": True, "stream": True}
    started = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        await response.content.readuntil(b"\n\n")
        took = time.perf_counter() - started
        await response.read()
    return took


async def stream(session: aiohttp.ClientSession, url: str, model: str, number: int, tokens: int) -> None:
    """Read one stream to its end."""
    body = {"model": model, "prompt": [number, *PROMPT], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        end = b""
        async for chunk in response.content.iter_any():
            end = (end + chunk)[-400:]
        assert b"[DONE]" in end and b'"finish_reason":"length"' in end


async def measure(url: str, model: str, requests: int, streams: int, tokens: int) -> tuple[list[float], float]:
    """First-token times of one client, in seconds, and the tokens per second of many."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        firsts = [await first_token_s(session, url, model, number) for number in range(requests)]
        started = time.perf_counter()
        await asyncio.gather(*(stream(session, url, model, number, tokens) for number in range(streams)))
        return firsts, streams * tokens / (time.perf_counter() - started)


def spread(values: list[float], scale: float = 1.0) -> str:
    """Median with the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle * scale:.1f} ({low * scale:.1f} to {high * scale:.1f})"


def main() -> None:
    """Start both servers, measure them in turns, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="one after the other, in each round")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--preset", default="always-disaggregated", help="of routing: how Baton places requests")
    parser.add_argument("--config", type=Path, default=ROOT / "deploy/config/sim.yaml")
    asked = parser.parse_args()
    settings: dict[str, Any] = yaml.safe_load(asked.config.read_text())
    settings["simulator"] = {**settings.get("simulator", {}), "zero_time": True}
    settings["routing"] = {"preset": asked.preset}
    config = load(asked.config)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(yaml.safe_dump(settings))
        baton = [sys.executable, "-m", "runtime.cli", "serve", "--config", str(path), "--port", "8601"]
        model = config.engine_settings("decode").model
        vllm = [sys.executable, "-m", "benchmarks.zero_time_core", model, "8602"]
        with running(vllm, "Application startup complete", 8602) as theirs, running(baton, "ready: curl", 8601) as ours:
            servers = {"vllm": (theirs, "zero"), "baton": (ours, config.model_name)}
            firsts: dict[str, list[float]] = {name: [] for name in servers}
            rates: dict[str, list[float]] = {name: [] for name in servers}
            for number in range(asked.rounds + 1):
                for name, (url, served) in servers.items():
                    found, rate = asyncio.run(measure(url, served, asked.requests, asked.streams, asked.tokens))
                    if number:  # the first round warms both up
                        firsts[name] += found
                        rates[name].append(rate)
    print(f"{'':8}{'first token, ms':>28}{f'tokens/s, {asked.streams} streams':>34}")
    for name in servers:
        print(f"{name:8}{spread(firsts[name], 1000):>28}{spread(rates[name]):>34}")
    first = statistics.median(firsts["baton"]) / statistics.median(firsts["vllm"])
    rate = statistics.median(rates["baton"]) / statistics.median(rates["vllm"])
    print(f"baton / vllm: first token {first:.2f}, tokens/s {rate:.2f}")


if __name__ == "__main__":
    main()
