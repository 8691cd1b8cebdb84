"""Random SIGKILLs on real Ray Serve with simulated engines, under load over HTTP."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import MODEL, ROOT, Server, baton_serve, wait_for
from tests.pools import Pools

SEED = int(os.environ.get("BATON_CHAOS_SEED", "1"))
KILLS = int(os.environ.get("BATON_CHAOS_KILLS", "12"))
WORKERS, CLIENTS = 2, 12
SETTINGS = {
    **yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text()),
    "prefill": {"replicas": WORKERS},
    "decode": {"replicas": WORKERS},
    "transport": {"lease_s": 600},
    "limits": {"retry_budget": 20},
    "simulator": {"step_base_s": 0.02},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers a pool, and streams that take seconds."""
    path: Path = tmp_path_factory.mktemp("chaos") / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    with baton_serve(path) as server:
        yield server


def stream(client: httpx.Client, prompt: list[int], tokens: int) -> str:
    """The text of a stream, which must end properly."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    text, reasons, done = "", [], False
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "choices" in event, line
                text += event["choices"][0]["text"]
                reasons.append(event["choices"][0]["finish_reason"])
            done = done or line == "data: [DONE]"
    assert done and [reason for reason in reasons if reason] == ["length"]
    return text


def test_no_stream_is_lost(server: Server) -> None:
    """Every stream ends once, with the text of an undisturbed one; then nothing is held and all are back."""
    chance = random.Random(SEED)
    prompts = [chance.choices(range(2000, 20000), k=chance.randint(5, 1500)) for _ in range(24)]
    lengths = [chance.randint(20, 150) for _ in prompts]
    pools = Pools()
    with httpx.Client(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        with ThreadPoolExecutor(CLIENTS) as threads:
            expected = list(threads.map(lambda p, n: stream(client, p, n), prompts, lengths))
        calm = threading.Event()
        answered = [0]

        def work(number: int) -> None:
            turn = number
            while not calm.is_set():
                which = turn % len(prompts)
                assert stream(client, prompts[which], lengths[which]) == expected[which]
                answered[0] += 1
                turn += CLIENTS

        with ThreadPoolExecutor(CLIENTS) as threads:
            workers = [threads.submit(work, number) for number in range(CLIENTS)]
            killed = 0
            while killed < KILLS and not any(worker.done() for worker in workers):
                role = chance.choice(("prefill", "decode"))
                pids = server.pids(role)
                if len(pids) == WORKERS or chance.random() < 0.2:  # now and then the last one of a pool
                    os.kill(chance.choice(pids), signal.SIGKILL) if pids else None
                    killed += bool(pids)
                calm.wait(chance.uniform(0.5, 3))
            calm.set()
            for worker in workers:
                worker.result(300)
    print(f"seed {SEED}: {killed} kills, {answered[0]} streams")
    assert killed == KILLS
    assert wait_for(lambda: all(len(pools.engines(role)) == WORKERS for role in ("prefill", "decode")), 120)
    assert not pools.wait_until_free(5)
    assert pools.state("prefill")["leases_expired"] == 0
    pools.close()
