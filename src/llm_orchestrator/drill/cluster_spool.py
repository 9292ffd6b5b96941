"""Damage to what a node of a ClusterTarget has kept on its own disk: its spool.

A record of the spool is promised to nobody but the purse: its run is told nothing of it before the
store has it. So no run is excused here as touched; what was in flight may be asked again, as after
every crash, and nothing else. What is intact must be adopted, what is not must be said.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llm_orchestrator.drill.lab.host import Host
from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.drill.target import Broken, Injected, NotConfirmed
from llm_orchestrator.errors import OperatorError
from llm_orchestrator.store.spool_file import Offer, parse

if TYPE_CHECKING:
    from llm_orchestrator.drill.cluster import ClusterTarget

_SPOOL = Path("data", "spool")
_RESULTS = 4
_SPOOLED_S = 30.0
_SAID_S = 60.0
_POLL_S = 0.05
_BIT = 0x01
_PAYLOAD = b'"payload":"'
_ADOPTED = re.compile(r"results in the spool (\d+) are adopted")


class _Damage(NamedTuple):
    """What was done to a file: the runs whose results are spoilt, and how many are intact."""

    runs: frozenset[str]
    intact: int


async def spool_damage(target: ClusterTarget, fault: Fault) -> Injected:
    """The databases refuse; both nodes die with results in the spool; two of one's are damaged.

    A bit flips in its first record, and its last one loses its tail. Then the databases and this
    node come back; the other one stays away until it is undone, so that all runs are this one's.
    Confirmed: read back, just these two are spoilt. Broken: the node does not say so, or adopts
    none of the others. t0 is the moment at which both come back.
    """
    hosts = target.lab.hosts.values()
    databases = [host for host in hosts if "patroni" in host.processes]
    nodes = [host for host in hosts if "node" in host.processes]
    node, port = nodes[0], target.lab.plan.ports["postgres"]
    await asyncio.gather(*(host.refuse(port) for host in databases))
    enough = f"{node.name} has not kept {_RESULTS} results"
    await _until(
        target, lambda: len(_kept(node)) >= _RESULTS, error=NotConfirmed(enough), limit_s=_SPOOLED_S
    )
    for each in nodes:
        await asyncio.to_thread(each.processes["node"].kill, is_held=True)
    damage = await asyncio.to_thread(_damage, node)
    before = len(_said(node))
    await asyncio.gather(*(host.heal() for host in databases))
    node.processes["node"].release()
    at_s = target.clock.monotonic()
    await _confirm(target, lambda: _said(node)[before:])
    evidence = f"of {damage.intact + len(damage.runs)} results in {node.name}'s spool a bit is "
    return Injected(at_s, evidence + "flipped in the first and the last is cut; both were named")


async def _confirm(target: ClusterTarget, said: Callable[[], str]) -> None:
    for words, wrong in (
        ("damaged records are left out", "the flipped bit was not noticed"),
        ("the last line was cut off", "the cut tail was not noticed"),
    ):
        await _until(target, partial(_holds, said, words), error=Broken(wrong))
    adopted = Broken("no result of the spool that was intact was adopted")
    await _until(target, lambda: any(map(int, _ADOPTED.findall(said()))), error=adopted)


def _holds(said: Callable[[], str], words: str) -> bool:
    return words in said()


async def _until(
    target: ClusterTarget,
    happens: Callable[[], bool],
    *,
    error: OperatorError,
    limit_s: float = _SAID_S,
) -> None:
    end_s = target.clock.monotonic() + limit_s
    while not await asyncio.to_thread(happens):
        if target.clock.monotonic() > end_s:
            raise error
        await target.clock.sleep(_POLL_S)


def _said(node: Host) -> str:
    return node.processes["node"].log.read_text(errors="replace")


def _files(node: Host) -> list[tuple[Path, dict[int, Offer]]]:
    found = [(path, path.read_bytes()) for path in sorted((node.folder / _SPOOL).glob("*.spool"))]
    return [(path, parse(content)[0]) for path, content in found]


def _kept(node: Host) -> list[Offer]:
    return [offer for _, offers in _files(node) for offer in offers.values()]


def _damage(node: Host) -> _Damage:
    """Spoil two records of the fullest file, and read it back. Raises NotConfirmed."""
    path, _ = max(_files(node), key=lambda each: len(each[1]))
    content, runs = spoil(path.read_bytes())
    path.write_bytes(content)
    left = _kept(node)
    if runs & {offer.run_id for offer in left}:
        raise NotConfirmed(f"{path.name}: what was spoilt is there")
    return _Damage(runs, len(left))


def spoil(content: bytes) -> tuple[bytes, frozenset[str]]:
    """A file with a bit of its first wanted record flipped and the last one's tail cut off.

    Besides, the runs whose results these were. Raises NotConfirmed when others are spoilt, or not
    just two, or there are too few.
    """
    before, _, _ = parse(content)
    lines = [line for line in content.split(b"\n") if line]
    wanted = [index for index, line in enumerate(lines) if parse(line)[0].keys() & before.keys()]
    if len(wanted) < _RESULTS:
        raise NotConfirmed(f"{len(wanted)} results are kept, not {_RESULTS}")
    first, last = wanted[0], lines.pop(wanted[-1])
    place = lines[first].index(_PAYLOAD) + len(_PAYLOAD) + 20
    flipped = bytearray(lines[first])
    flipped[place] ^= _BIT
    lines[first] = bytes(flipped)
    spoilt = b"".join(b"\n" + line + b"\n" for line in lines) + b"\n" + last[: len(last) // 2]
    after, bad, is_torn = parse(spoilt)
    gone = before.keys() - after.keys()
    if len(gone) != 2 or bad != 1 or not is_torn:
        raise NotConfirmed(f"{len(gone)} records are spoilt, not two")
    return spoilt, frozenset(before[number].run_id for number in gone)
