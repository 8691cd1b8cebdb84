"""Whether a downloaded model is whole: its own list of checksums, and what its files say of themselves.

Every check reads what is on the disk and knows nothing of where it came from.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

SUMS = "SHA256SUMS"
"""A file in the format of `sha256sum`, published with the model: the strongest check there is."""

OF_NOTHING = hashlib.sha256().hexdigest()
"""The checksum of an empty file."""

INDEX = "*.safetensors.index.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx")
"""Files that hold weights: a front end needs none of them."""


class Damaged(Exception):
    """A model that is not whole.

    Attributes:
        files: the files that are wrong, relative to the model; they are to be fetched again.
    """

    def __init__(self, message: str, files: tuple[str, ...] = ()) -> None:
        super().__init__(message, files)
        self.message, self.files = message, files

    def __str__(self) -> str:
        return self.message


def inside(model: Path, name: str) -> Path:
    """The file of a model that goes by this name.

    Raises:
        Damaged: for a name that leads out of the model's directory, or is that itself. Whoever published it wrote the
            name.
    """
    path = model / name
    if model.resolve() not in path.resolve().parents:
        raise Damaged(f"it names a file outside of itself: {name!r}")
    return path


def check(model: Path, *, with_weights: bool = True) -> None:
    """Check a model in Hugging Face layout.

    Raises:
        Damaged: on the first kind of damage that is found, with all the files that have it.
    """
    if not (model / "config.json").is_file():
        raise Damaged("it has no config.json, so it is not a model in Hugging Face layout")
    _check_sums(model, with_weights)
    if with_weights:
        _check_shards(model)
    _check_safetensors(model)


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums(model: Path) -> dict[str, str]:
    """The checksums that the model was published with, by file."""
    if not (model / SUMS).is_file():
        return {}
    lines = (model / SUMS).read_text().splitlines()
    parts = [line.split(maxsplit=1) for line in lines if line.strip()]
    if wrong := [part for part in parts if len(part) != 2 or len(part[0]) != 64]:
        raise Damaged(f"{SUMS} can't be read: {' '.join(wrong[0])[:80]!r}", (SUMS,))
    found = {name.lstrip("*").removeprefix("./"): digest.lower() for digest, name in parts}
    for name in found:
        inside(model, name)
    return found


def is_weights(name: str) -> bool:
    """Whether a file holds weights."""
    return any(Path(name).match(pattern) for pattern in WEIGHTS)


def _check_sums(model: Path, with_weights: bool) -> None:
    expected = {name: digest for name, digest in sums(model).items() if with_weights or not is_weights(name)}
    if missing := tuple(name for name in expected if not (model / name).is_file()):
        raise Damaged(f"files of {SUMS} are missing: {', '.join(missing)}", missing)
    if wrong := tuple(name for name, digest in expected.items() if sha256(model / name) != digest):
        raise Damaged(f"the checksum is not that of {SUMS}: {', '.join(wrong)}", wrong)


def _check_shards(model: Path) -> None:
    for index in model.glob(INDEX):
        try:
            shards = set(map(str, json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise Damaged(f"{index.name} can't be read: {error}", (index.name,)) from error
        if missing := tuple(sorted(shard for shard in shards if not inside(model, shard).is_file())):
            raise Damaged(f"shards of {index.name} are missing: {', '.join(missing)}", missing)


def _check_safetensors(model: Path) -> None:
    """The header of a safetensors file tells how long the file has to be."""
    wrong = tuple(str(path.relative_to(model)) for path in model.rglob("*.safetensors") if not _is_whole(path))
    if wrong:
        raise Damaged(f"not as long as their headers say: {', '.join(wrong)}", wrong)


def _is_whole(path: Path) -> bool:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError):
            return False
    return bool(8 + length + max(ends, default=0) == size)
