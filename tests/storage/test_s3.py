"""Weights from real S3 servers: pinned versions, damage, kills, two at once, a full cache."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from kserve_adapter.integrity import OF_NOTHING, SUMS
from tests.conftest import wait_for
from tests.storage.conftest import BUCKET, Store, baton_fetch, ended, fetched, make_model, unique


def same(left: Path, right: Path) -> bool:
    """Whether `right` holds exactly the files of `left`, and the cache's own mark."""
    names = {path.name for path in left.iterdir()}
    return {path.name for path in right.iterdir()} - {".used"} == names and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names
    )


def test_a_pinned_version_and_no_other(store: Store, tmp_path: Path) -> None:
    """`…/v1` is not `…/v10`, although S3 takes one for a prefix of the other."""
    model, name = make_model(tmp_path / "v1"), unique("llama")
    uri = store.upload(model, f"{name}/v1")
    store.upload(make_model(tmp_path / "v10"), f"{name}/v10")
    status, directory, err = fetched(uri, tmp_path / "cache", store.env(), "--link", str(tmp_path / "mnt" / "models"))
    assert status == 0, err
    assert same(model, Path(directory)) and same(model, (tmp_path / "mnt" / "models").resolve())


def test_a_second_fetch_needs_no_store(store: Store, tmp_path: Path) -> None:
    """What is in the cache is there without credentials, without a network."""
    uri = store.upload(make_model(tmp_path / "model"), unique("warm"))
    first = fetched(uri, tmp_path / "cache", store.env())
    assert first[0] == 0, first
    assert fetched(uri, tmp_path / "cache", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})[:2] == first[:2]


def test_without_weights(store: Store, tmp_path: Path) -> None:
    """A front end's fetch has everything but the weights, under a name of its own."""
    uri = store.upload(make_model(tmp_path / "model"), unique("small"))
    status, directory, err = fetched(uri, tmp_path / "cache", store.env(), "--without-weights")
    assert status == 0, err
    assert not list(Path(directory).glob("*.safetensors")) and (Path(directory) / "tokenizer.json").is_file()
    assert fetched(uri, tmp_path / "cache", store.env())[1] != directory


@pytest.mark.parametrize("wrong", ["prefix", "bucket", "credentials"])
def test_what_is_not_there_or_not_ours(store: Store, tmp_path: Path, wrong: str) -> None:
    """A missing prefix, a missing bucket and wrong credentials are told, and leave nothing that looks like a model."""
    uri, env = store.upload(make_model(tmp_path / "model"), unique("other")), store.env()
    if wrong == "prefix":
        uri += "-not"
    elif wrong == "bucket":
        uri = uri.replace(BUCKET, "no-such-bucket")
    else:
        env["AWS_SECRET_ACCESS_KEY"] = "wrong"
    status, _, err = fetched(uri, tmp_path / "cache", env)
    assert status == 1 and f"baton: {uri}: " in err
    assert "Traceback" not in err and store.env()["AWS_SECRET_ACCESS_KEY"] not in err
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_object(store: Store, tmp_path: Path, damage: str) -> None:
    """Damage that the store does not notice is named and not published; mended, only that file is fetched again."""
    model, name = make_model(tmp_path / "model"), unique("damaged")
    uri = store.upload(model, name)
    shard = "model-1.safetensors"
    whole = (model / shard).read_bytes()
    if damage == "missing":
        store.client.delete_object(Bucket=BUCKET, Key=f"{name}/{shard}")
    else:
        bad = whole[:-1] + bytes([whole[-1] ^ 1]) if damage == "flipped" else whole[:-7]
        store.client.put_object(Bucket=BUCKET, Key=f"{name}/{shard}", Body=bad)
    status, _, err = fetched(uri, tmp_path / "cache", store.env())
    assert status == 1 and shard in err, err
    store.client.put_object(Bucket=BUCKET, Key=f"{name}/{shard}", Body=whole)
    store.client.delete_object(Bucket=BUCKET, Key=f"{name}/model-0.safetensors")  # it is here already
    status, directory, err = fetched(uri, tmp_path / "cache", store.env())
    assert status == 0, err
    assert same(model, Path(directory))


def test_truncation_shows_without_checksums(store: Store, tmp_path: Path) -> None:
    """A model that was published without a list of checksums: its files' own headers tell."""
    model = make_model(tmp_path / "model")
    (model / SUMS).unlink()
    path = model / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    status, _, err = fetched(store.upload(model, unique("short")), tmp_path / "cache", store.env())
    assert status == 1 and "not as long as their headers say: model-0.safetensors" in err


def test_an_empty_file(store: Store, tmp_path: Path) -> None:
    """A model is whole with the empty files that it was published with."""
    model = make_model(tmp_path / "model")
    (model / "code").mkdir()
    (model / "code" / "__init__.py").touch()
    with (model / SUMS).open("a") as sums:
        sums.write(f"{OF_NOTHING}  code/__init__.py\n")
    uri = unique("empty")
    for path in filter(Path.is_file, model.rglob("*")):
        key = f"{uri}/{path.relative_to(model)}"
        store.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
    status, directory, err = fetched(f"s3://{BUCKET}/{uri}", tmp_path / "cache", store.env())
    assert status == 0, err
    assert (Path(directory) / "code" / "__init__.py").read_bytes() == b""


def test_keys_that_lead_outside(store: Store, tmp_path: Path) -> None:
    """A store may hold any key; nothing is written outside of the cache."""
    name = unique("outside")
    uri = store.upload(make_model(tmp_path / "model"), name)
    try:
        store.client.put_object(Bucket=BUCKET, Key=f"{name}/a/../../../victim", Body=b"x")
    except ClientError:
        pytest.skip("this store's objects are files, and it takes no such key")
    status, _, err = fetched(uri, tmp_path / "cache", store.env())
    assert status == 1 and "outside of itself" in err, err
    assert not list(tmp_path.rglob("victim"))


def test_killed_and_resumed(store: Store, tmp_path: Path) -> None:
    """SIGKILL in the middle: nothing is published, and the next one fetches only what is missing."""
    model, name = make_model(tmp_path / "model", weights=12, size=4_000_000), unique("killed")
    uri, cache = store.upload(model, name), tmp_path / "cache"
    env = {**store.env(), "S3_MAX_FILE_CONCURRENCY": "1"}
    process = baton_fetch(uri, cache, env)

    def complete() -> list[Path]:
        return list(cache.glob(".*.partial/*.safetensors"))

    try:
        assert wait_for(lambda: len(complete()) >= 2, 300)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    kept = {path.name for path in complete()}
    assert 2 <= len(kept) < 12
    assert not [path for path in cache.iterdir() if not path.name.startswith(".")]
    for shard in kept:
        store.client.delete_object(Bucket=BUCKET, Key=f"{name}/{shard}")  # to be fetched again they are not there
    status, directory, err = fetched(uri, cache, env)
    assert status == 0, err
    assert same(model, Path(directory))


def test_two_at_once_fetch_it_once(store: Store, tmp_path: Path) -> None:
    """Prefill and decode on one node: the second waits for the first and finds the model."""
    model = make_model(tmp_path / "model", weights=6, size=2_000_000)
    uri, cache = store.upload(model, unique("both")), tmp_path / "cache"
    processes = [baton_fetch(uri, cache, store.env()) for _ in range(2)]
    results = [ended(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sum(err.count("fetching") for _, err in results) == 1, results
    assert same(model, Path(results[0][0].strip()))


def test_a_full_cache(store: Store, tmp_path: Path) -> None:
    """A model that does not fit is refused before it is fetched; with what is idle removed it fits."""
    cache, bound = tmp_path / "cache", ("--max-bytes", "600000")
    first = store.upload(make_model(tmp_path / "first"), unique("first"))
    second = store.upload(make_model(tmp_path / "second"), unique("second"))
    status, directory, err = fetched(first, cache, store.env(), *bound)
    assert status == 0, err
    status, _, err = fetched(second, cache, store.env(), *bound)
    assert status == 1 and Path(directory).name in err and "fetching" not in err
    assert Path(directory).is_dir()
    status, _, err = fetched(second, cache, store.env(), *bound, "--keep-hours", "0")
    assert status == 0, err
    assert not Path(directory).exists()
