"""Nothing of a cluster that `baton serve` starts listens off loopback."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from tests.conftest import Server, marked
from tests.pools import Pools

LISTEN = "0A"


def address(text: str) -> str:
    """An address of /proc/net/tcp or tcp6 in words."""
    raw = bytes.fromhex(text.split(":")[0])
    words = struct.pack(f">{len(raw) // 4}I", *struct.unpack(f"<{len(raw) // 4}I", raw))
    return socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words)


def listening(pids: list[int]) -> dict[str, list[int]]:
    """Addresses that these processes listen on, and who does."""
    inodes: dict[str, int] = {}
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = str(file.readlink())
            except OSError:
                continue  # it was closed while we looked
            if target.startswith("socket:["):
                inodes[target[8:-1]] = pid
    found: dict[str, list[int]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                found.setdefault(address(fields[1]), []).append(inodes[fields[9]])
    return found


def test_only_loopback(server: Server, pools: Pools) -> None:
    """Front end, workers, engines and Ray itself; a client's way in is loopback, too, unless told otherwise."""
    assert pools.engines("prefill")
    commands = marked(server.mark)
    found = listening(list(commands))
    assert found, "nothing listens at all"
    elsewhere = {where: [commands[pid][:60] for pid in who] for where, who in found.items() if not _loopback(where)}
    assert not elsewhere


def _loopback(where: str) -> bool:
    return where == "::1" or where.removeprefix("::ffff:").startswith("127.")
