"""What a model's URI stands for, whether what came is whole, and the node's cache of models."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kserve_adapter.integrity import SUMS, Damaged, check, sha256
from kserve_adapter.model_cache import USED, CacheFull, ModelCache
from kserve_adapter.storage import FetchError, check_pinned, directory, fetch, key, link


@pytest.mark.parametrize(
    "uri",
    [
        "hf://meta/llama",
        "hf://meta/llama:",
        "hf://meta/llama/",
        "oci://registry/llama",
        "oci://registry:5000/llama",
        "oci://registry/llama:latest",
        "pvc://claim/llama",
    ],
)
def test_what_is_not_pinned_is_refused(uri: str) -> None:
    """A cache would keep the first one it saw for ever; a volume is mounted, not fetched."""
    with pytest.raises(FetchError):
        check_pinned(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://models/llama-70b/v1.2.3",
        "gs://models/llama/v1",
        "hf://meta/llama:0123abc",
        "oci://registry:5000/llama:v1",
        "oci://registry/llama@sha256:" + "a" * 64,
        "https://host/llama-v1.tar.gz",
    ],
)
def test_what_is_pinned_is_taken(uri: str) -> None:
    """The forms of the operator's guide."""
    assert check_pinned(uri) == uri


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://m/llama/v1.2.3", "s3://m/llama/v1.2.3/"),
        ("s3://m/llama/v1/", "s3://m/llama/v1/"),
        ("gs://m/llama/v1", "gs://m/llama/v1/"),
        ("s3://m/llama-v1.tar.gz", "s3://m/llama-v1.tar.gz"),
        ("hf://meta/llama:abc", "hf://meta/llama:abc"),
    ],
)
def test_a_prefix_is_a_directory(uri: str, expected: str) -> None:
    """`…/v1` must not fetch `…/v10`; an archive is one object."""
    assert directory(uri) == expected


def test_keys_are_readable_and_unique() -> None:
    """One name for each URI, another without weights, none that hides in the cache or leaves it."""
    uris = ["s3://m/llama/v1", "s3://m/llama-v1", "s3://m/../../etc", "models:/m/1", "s3://m/.hidden"]
    keys = [key(uri) for uri in uris] + [key(uri, with_weights=False) for uri in uris]
    assert len(set(keys)) == len(keys)
    assert all("/" not in name and not name.startswith(".") for name in keys)
    assert "llama-v1" in keys[0]


def test_a_local_path_is_used_as_it_is(tmp_path: Path) -> None:
    """Nothing is copied; a directory without a model is refused."""
    with pytest.raises(FetchError):
        fetch(str(tmp_path), ModelCache(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    assert fetch(str(tmp_path), ModelCache(tmp_path / "cache")) == tmp_path


def test_a_link_is_replaced(tmp_path: Path) -> None:
    """A second link takes the first one's place."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        link(tmp_path / name, tmp_path / "mnt" / "models")
        assert (tmp_path / "mnt" / "models").resolve() == tmp_path / name
    assert len(list((tmp_path / "mnt").iterdir())) == 1


def safetensors(path: Path, size: int = 100) -> None:
    """A safetensors file with one tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"x" * size)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model with two shards and checksums."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for shard in ("a.safetensors", "b.safetensors"):
        safetensors(folder / shard)
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())))
    return folder


def test_a_whole_model_passes(model: Path) -> None:
    """With all its checks, and without weights."""
    check(model)
    for shard in model.glob("?.safetensors"):
        shard.unlink()
    check(model, with_weights=False)


@pytest.mark.parametrize("name", ["config.json", "a.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_damage_to_any_file_is_found(model: Path, name: str, damage: str) -> None:
    """By the checksums: every file that they list, and the file is named."""
    if damage == "gone":
        (model / name).unlink()
    else:
        data = bytearray((model / name).read_bytes())
        data[-1] ^= 1
        (model / name).write_bytes(data)
    with pytest.raises(Damaged) as found:
        check(model)
    assert name in str(found.value)


@pytest.mark.parametrize("damage", ["short", "long", "empty", "header", "gone"])
def test_without_checksums_the_files_tell(model: Path, damage: str) -> None:
    """Length against header, shards against index."""
    (model / SUMS).unlink()
    shard = model / "b.safetensors"
    whole = shard.read_bytes()
    changed = {"short": whole[:-1], "long": whole + b"x", "empty": b"", "header": b"\xff" * 20}
    shard.write_bytes(changed[damage]) if damage in changed else shard.unlink()
    with pytest.raises(Damaged) as found:
        check(model)
    assert found.value.files == ("b.safetensors",)


def test_checksums_that_are_none(model: Path) -> None:
    """A list that can't be read is damage, not a list of nothing."""
    (model / SUMS).write_text("<html>not found</html>")
    with pytest.raises(Damaged):
        check(model)


@pytest.mark.parametrize("name", ["../../victim", "/{}/victim", "a/../../../victim", "."])
@pytest.mark.parametrize("place", ["sums", "index"])
def test_a_model_that_names_files_outside(model: Path, tmp_path: Path, name: str, place: str) -> None:
    """Its publisher's names reach nothing outside of its directory, to check, to fetch again or to remove."""
    name = name.format(tmp_path)
    if place == "sums":
        (model / SUMS).write_text(f"{'0' * 64}  {name}\n")
    else:
        (model / SUMS).unlink()
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(Damaged, match="outside of itself") as found:
        check(model)
    assert not found.value.files


def test_a_link_leads_there_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cache was given relative to the working directory."""
    (tmp_path / "cache" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    link(Path("cache/m"), tmp_path / "mnt" / "models")
    assert (tmp_path / "mnt" / "models").is_dir()


def fill(size: int) -> object:
    """A `fill` that puts one file of `size` bytes there."""

    def put(target: Path) -> None:
        (target / "weights").write_bytes(b"x" * size)

    return put


def age(model: Path, seconds: float) -> None:
    """Let a model have been asked for `seconds` ago."""
    os.utime(model / USED, (time.time() - seconds,) * 2)


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    """Only as much as is needed, only what nobody asked for lately."""
    cache = ModelCache(tmp_path, max_bytes=300, keep_s=50)
    for name, seconds in (("old", 200), ("older", 300), ("used", 10)):
        age(cache.model(name, fill(100)), seconds)  # type: ignore[arg-type]
    cache.model("new", fill(100))  # type: ignore[arg-type]
    assert sorted(path.name for path in cache.models()) == ["new", "old", "used"]
    with pytest.raises(CacheFull):
        cache.model("large", fill(201))  # type: ignore[arg-type]
    assert sorted(path.name for path in cache.models()) == ["new", "old", "used"]
    assert not list(tmp_path.glob(".large.partial"))


def test_asking_counts_as_use(tmp_path: Path) -> None:
    """A model that is asked for again is not idle any more."""
    cache = ModelCache(tmp_path, max_bytes=200, keep_s=50)
    age(cache.model("a", fill(100)), 100)  # type: ignore[arg-type]
    cache.model("a", lambda target: pytest.fail("it is there"))
    cache.model("b", fill(100))  # type: ignore[arg-type]
    with pytest.raises(CacheFull):
        cache.model("c", fill(100))  # type: ignore[arg-type]


def test_what_is_known_to_be_too_large_is_not_fetched(tmp_path: Path) -> None:
    """The size is asked for first."""
    with pytest.raises(CacheFull):
        ModelCache(tmp_path, max_bytes=10).model("a", lambda target: pytest.fail("fetched"), lambda: 11)


def test_a_failed_fill_publishes_nothing_and_is_gone_on_with(tmp_path: Path) -> None:
    """What an attempt left is there for the next."""
    cache = ModelCache(tmp_path)

    def half(target: Path) -> None:
        (target / "first").write_text("x")
        raise RuntimeError("lost")

    def rest(target: Path) -> None:
        assert (target / "first").exists()
        (target / "second").write_text("y")

    with pytest.raises(RuntimeError):
        cache.model("a", half)
    assert cache.models() == []
    assert {path.name for path in cache.model("a", rest).iterdir()} == {"first", "second", USED}


def test_what_killed_fetches_left_makes_room(tmp_path: Path) -> None:
    """It counts, and goes before any model does; not so what somebody is fetching."""
    cache = ModelCache(tmp_path, max_bytes=200, keep_s=50)
    age(cache.model("idle", fill(50)), 100)  # type: ignore[arg-type]
    for name in ("killed", "held"):
        (tmp_path / f".{name}.partial").mkdir()
        (tmp_path / f".{name}.partial" / "weights").write_bytes(b"x" * 70)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".held.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout and holder.stdout.readline()
        cache.model("new", fill(80))  # type: ignore[arg-type]
        assert sorted(path.name for path in cache.models()) == ["idle", "new"]
        assert [path.name for path in tmp_path.glob(".*.partial")] == [".held.partial"]
        cache.model("newer", fill(50))  # type: ignore[arg-type]
        assert sorted(path.name for path in cache.models()) == ["new", "newer"]
        holder.communicate(b"\n")


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"


def test_a_removal_that_was_killed_is_ended(tmp_path: Path) -> None:
    """Half of a model that was on its way out does not keep another of its name from going."""
    cache = ModelCache(tmp_path, max_bytes=100, keep_s=50)
    (tmp_path / ".a.doomed").mkdir()
    (tmp_path / ".a.doomed" / "weights").write_bytes(b"x")
    age(cache.model("a", fill(100)), 100)  # type: ignore[arg-type]
    cache.model("b", fill(100))  # type: ignore[arg-type]
    assert [path.name for path in cache.models()] == ["b"]
    assert not list(tmp_path.glob(".*.doomed"))
