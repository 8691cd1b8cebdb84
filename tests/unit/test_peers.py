"""What an engine makes goes to the front end that asked for it, and to nobody else."""

from __future__ import annotations

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from kv_transfer.load import Load, News
from kv_transfer.peer import Peer
from kv_transfer.peers import Peers


def last(leg_id: str) -> EngineCoreOutput:
    """The end of a prefill leg, with a handoff."""
    return EngineCoreOutput(leg_id, [1], finish_reason=FinishReason.LENGTH, kv_transfer_params={"of": leg_id})


def joined(peers: Peers, name: str, *leg_ids: str) -> Peer:
    """A front end with these legs in the engine."""
    peer = peers.join(name)
    for leg_id in leg_ids:
        peers.took(leg_id, name, peer)
    return peer


async def ids(peer: Peer) -> list[str]:
    """Whose outputs are on their way to a front end."""
    return [o.request_id for step in await peer.batch() if isinstance(step, EngineCoreOutputs) for o in step.outputs]


async def test_a_step_is_split() -> None:
    """Each front end gets its part; a leg that was aborted after it had finished leaves a handoff that is nobody's."""
    peers = Peers()
    one, other = joined(peers, "one", "a", "b", "aborted"), joined(peers, "other", "c")
    peers.over("aborted")
    steps = [last("a"), EngineCoreOutput("b", [1]), last("c"), last("aborted"), EngineCoreOutput("unknown", [1])]
    assert peers.hand_out(EngineCoreOutputs(outputs=steps)) == [{"of": "aborted"}]
    assert (await ids(one), await ids(other)) == (["a", "b"], ["c"])
    assert peers.owners == {"b": "one"} and one.legs == {"b"} and not other.legs
    assert peers.handoffs() == [{"of": "a"}, {"of": "c"}]


def test_an_old_stream_ends_late() -> None:
    """The front end that came since by the same name stays."""
    peers = Peers()
    old, new = peers.join("one"), peers.join("one")
    peers.leave("one", old)
    assert peers.get("one") is new
    peers.leave("one", new)
    assert not peers


async def test_news_is_told_once() -> None:
    """To each front end that has not heard it; how many of its own legs the load counts is part of it."""
    peers = Peers()
    one, other = peers.join("one"), peers.join("other")
    for _ in range(2):
        peers.tell(Load(streams=1))
    peers.took("a", "one", one)
    peers.tell(Load(streams=1))
    assert await one.batch() == [News(Load(streams=1), 0), News(Load(streams=1), 1)]
    assert await other.batch() == [News(Load(streams=1), 0)]
