"""The spool: results of paid steps on this machine's disk before they are offered to the store.

The picture. A result that was paid for must outlive the store being away, and this process dying
meanwhile. So the writer hands it over the moment it exists, and no commit that carries it begins
before it is fsynced here; results that wait behind a commit which hangs are on the disk, too. Once
the store has a result it is forgotten here. What is left, of an earlier life of this folder or
because the store did not take it from us, is an `Offer`: whoever holds the run now may adopt it as
an entry of its own epoch if the step is still open, else it is money lost. Not decided here.

The trust window. What `written` has acknowledged survives kill -9 and, as far as the disk keeps its
promises, a power cut. It does not survive the loss of the machine: that is the store's part.

The failure cases. A disk that is full, gone or silent is reported once, and the commit alone
protects: the spool never stands in the way of the store. An offer may have landed all the same,
when its commit was under way at the end (and after a power cut, as forgetting is not fsynced): then
its step is finished, with this very payload. One living process has a folder (`spool.lock`); its
files are `<node>.<number>.spool`, appended to, and emptied or removed when nothing in them is
wanted any more: usually there is one, 0 bytes long.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import platform
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import ConfigError, StoreError
from llm_orchestrator.model import MICROSECONDS, Draft
from llm_orchestrator.store.spool_file import Offer, SpoolFile, make_folder
from llm_orchestrator.store.sqlite_file import EngineLock
from llm_orchestrator.store.sqlite_thread import DatabaseThread
from llm_orchestrator.store.writer import Copy, Head

logger = logging.getLogger(__name__)
FILE_BYTES_MAX = 16 << 20
"""A file that has grown beyond this and is still needed is followed by another."""
OFFER_AGE_MAX_S = 7 * 24 * 3600
ANCESTOR = "ancestor"
"""Kind of the records that name the incarnations out of which a restore has made a store: results
that were meant for them are its."""
STALL_S = 5.0
"""A disk that has not answered for so long is treated as one that cannot be written."""


class Spool:
    """A Sink. All methods but `open` belong to the event loop; the disk has a thread of its own."""

    def __init__(
        self,
        folder: Path,
        node_id: str,
        *,
        store_id: str,
        ancestors: Collection[str],
        clock: Clock,
        lock: EngineLock | None,
        stall_s: float,
    ) -> None:
        self.folder = folder
        self._name = re.sub(r"[^\w.-]", "_", node_id)[:100]
        self._store_id = store_id
        self._own = {store_id, *ancestors}
        self._clock = clock
        self._lock = lock
        self._stall_s = stall_s
        self._thread = DatabaseThread("spool")
        self._is_off = lock is None
        self._is_failing = False
        self._is_stalled = False
        self._waiting: dict[_Record, None] = {}
        self._in_flight: Sequence[_Record] = ()
        self._current: _File | None = None
        self._numbers = itertools.count(1)
        self._offers: dict[str, list[_Record]] = {}
        self._gone: dict[_File, list[int]] = {}
        self._held: set[_Record] = set()

    @property
    def held(self) -> tuple[int, int]:
        """How many results no store has taken yet, and their bytes."""
        return len(self._held), sum(len(record.offer.payload) for record in self._held)

    @property
    def oldest_at(self) -> int | None:
        """When the oldest of them was made, microseconds on the store's clock; None without any."""
        return min((record.offer.made_at for record in self._held), default=None)

    @classmethod
    def open(
        cls,
        folder: Path,
        node_id: str,
        *,
        store_id: str,
        ancestors: Collection[str] = (),
        clock: Clock,
        stall_s: float = STALL_S,
    ) -> Self:
        """Take the folder and read what earlier lives left in it.

        `store_id`: the store's incarnation; `ancestors`: those that it was restored from.

        Raises ConfigError when another living process has it. A folder that cannot be written is
        reported, and then the spool keeps nothing.
        """
        lock, reason = EngineLock(folder / "spool"), ""
        try:
            make_folder(folder)
            owner = f"node {node_id}, process {os.getpid()} on {platform.node()}"
            if not lock.acquire(owner):
                raise ConfigError(
                    f"{folder} is in use by another process: {lock.owner() or 'it is starting'}",
                    hint="--data DIR or LLM_ORCHESTRATOR_DATA",
                )
        except (OSError, StoreError) as error:
            reason = str(error)
        spool = cls(
            folder,
            node_id,
            store_id=store_id,
            ancestors=ancestors,
            clock=clock,
            lock=None if reason else lock,
            stall_s=stall_s,
        )
        if reason:
            spool._complain(reason)
        else:
            spool._recover()
        return spool

    # -- Sink ----------------------------------------------------------------------------------

    def put(self, head: Head, draft: Draft) -> Copy:
        offer = Offer(
            head.run_id,
            draft.step,
            draft.attempt,
            head.epoch,
            self._store_id,
            head.seq,
            head.digest,
            self._clock.now_us(),
            draft.payload,
        )
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        record = _Record(offer, done, self._settle)
        if self._is_off or self._is_stalled:
            record.release()
        if not self._is_off:
            self._held.add(record)
            self._waiting[record] = None
            if not self._in_flight:
                self._flush()
        return record

    # -- offers --------------------------------------------------------------------------------

    def offers(self) -> dict[str, list[Offer]]:
        """By run, oldest first: what is left of earlier lives, and what no store took in this one.

        Only of this store; what was meant for another one waits for a life that serves it.
        """
        return {
            run_id: [record.offer for record in records] for run_id, records in self._offers.items()
        }

    def offers_of(self, run_id: str) -> list[Offer]:
        """Of one run, oldest first."""
        return [record.offer for record in self._offers.get(run_id, ())]

    def forget(self, run_id: str, step: str) -> None:
        """The step's offers were adopted, had landed, or are superseded."""
        records = self._offers.pop(run_id, [])
        kept = [record for record in records if record.offer.step != step]
        if kept:
            self._offers[run_id] = kept
        for record in records:
            if record.offer.step == step:
                self._let_go(record)

    def renew(self, store_id: str) -> None:
        """Results from now on are of a store that was restored: offers of before are not its."""
        self._store_id = store_id

    async def close(self) -> None:
        """Write what waits, then let go of the folder. What no store took stays in it."""
        while (pending := (*self._in_flight, *self._waiting)) and not self._is_stalled:
            await pending[0].written()
        self._tidy()
        self._is_off = True
        if not self._is_stalled:  # else the thread waits for the disk, and ends with the process
            file, self._current = self._current, None
            if file is not None:
                await self._submit(file.close if file.live else file.remove)
            self._thread.stop()
        if self._lock is not None:
            self._lock.release()

    # -- how: opening --------------------------------------------------------------------------

    def _recover(self) -> None:
        oldest = self._clock.now_us() - OFFER_AGE_MAX_S * MICROSECONDS
        dropped: list[Offer] = []
        others = 0
        for path in sorted(self.folder.glob("*.spool")):
            file = _File(path)
            try:
                found = file.read()
            except OSError as error:
                logger.error("%s cannot be read and stays as it is: %s", path, error.strerror)
                continue
            for number, offer in found.items():
                if offer.made_at < oldest:
                    dropped.append(offer)
                    continue
                record = _Record(offer, None, self._settle)
                self._held.add(record)
                file.admit(record, number)
                if offer.store_id in self._own:
                    self._offers.setdefault(offer.run_id, []).append(record)
                else:
                    others += 1
            if not file.live:
                _try(file.remove)
        for records in self._offers.values():
            records.sort(key=lambda record: record.offer.made_at)
        self._report(dropped, others)

    def _report(self, dropped: Sequence[Offer], others: int) -> None:
        if self._offers:
            count = sum(map(len, self._offers.values()))
            logger.info("%s: %d results of paid steps may still be wanted", self.folder, count)
        if others:
            logger.warning("%s: %d results of paid steps are another store's", self.folder, others)
        if dropped:
            logger.warning(
                "%s: %d results of paid steps (%.4f USD) were not wanted for %d days: dropped",
                self.folder,
                len(dropped),
                sum(offer.cost_usd for offer in dropped),
                OFFER_AGE_MAX_S // 86_400,
            )

    # -- how: writing --------------------------------------------------------------------------

    def _flush(self) -> None:
        """Everything that waits shares one fsync, while the next ones gather."""
        records, self._waiting = tuple(self._waiting), {}
        file = self._file()
        for record in records:
            file.admit(record, next(self._numbers))
        self._in_flight = records
        watch = asyncio.get_running_loop().call_later(self._stall_s, self._give_up)
        offers = {record.number: record.offer for record in records}
        future = self._thread.submit(partial(file.append, offers))
        future.add_done_callback(partial(self._written, file, watch))

    def _file(self) -> _File:
        """Where to write: the current file, or the next one."""
        file = self._current
        if file is not None and file.size > FILE_BYTES_MAX and file.live:
            self._submit(file.close)
            file = None
        while file is None:
            path = self.folder / f"{self._name}.{next(self._numbers)}.spool"
            file = None if path.exists() else _File(path)
        self._current = file
        return file

    def _written(
        self, file: _File, watch: asyncio.TimerHandle, future: asyncio.Future[None]
    ) -> None:
        watch.cancel()
        records, self._in_flight, self._is_stalled = self._in_flight, (), False
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self._complain(str(error))
            self._abandon(file, records)
        elif self._is_failing:
            self._is_failing = False
            logger.warning("results of paid steps are kept in %s again", self.folder)
        for record in records:
            record.release()
        if self._waiting:
            self._flush()

    def _abandon(self, file: _File, failed: Iterable[_Record]) -> None:
        """After an error nobody knows what is in a file's pages: go on in another one."""
        self._current = None
        for record in failed:
            record.file = None
            file.live.discard(record)
        self._submit(file.close if file.live else file.remove)

    def _give_up(self) -> None:
        """The disk does not answer: nobody waits for it until it does."""
        self._is_stalled = True
        self._complain(f"no answer for {self._stall_s:g} s")
        for record in (*self._in_flight, *self._waiting):
            record.release()

    def _complain(self, reason: str) -> None:
        if self._is_failing:
            return
        self._is_failing = True
        logger.error(
            "results of paid steps cannot be kept in %s (%s); until then only the store has them",
            self.folder,
            reason,
        )

    # -- how: forgetting -----------------------------------------------------------------------

    def _settle(self, record: _Record, *, is_landed: bool) -> None:
        if is_landed:
            self._let_go(record)
        else:
            self._offers.setdefault(record.offer.run_id, []).append(record)

    def _let_go(self, record: _Record) -> None:
        self._held.discard(record)
        self._waiting.pop(record, None)
        file, record.file = record.file, None
        if file is None:
            return
        file.live.discard(record)
        if not self._gone:
            asyncio.get_running_loop().call_soon(self._tidy)
        self._gone.setdefault(file, []).append(record.number)

    def _tidy(self) -> None:
        """Make the files say what has been forgotten since the last time."""
        gone, self._gone = self._gone, {}
        for file, numbers in gone.items() if not self._is_off else ():
            if file.live:
                self._submit(partial(file.mark, numbers))
            else:
                self._submit(file.empty if file is self._current else file.remove)

    def _submit(self, tidy: Callable[[], None]) -> asyncio.Future[None]:
        """Ask for something that does no harm when it fails. The thread keeps the order."""
        return self._thread.submit(partial(_try, tidy))


class _Record:
    """One result: waiting, on its way to the disk, there, or (an offer) left there."""

    __slots__ = ("_done", "_settle", "file", "number", "offer")

    def __init__(
        self, offer: Offer, done: asyncio.Future[None] | None, settle: Callable[..., None]
    ) -> None:
        self.offer = offer
        self.file: _File | None = None
        self.number = 0
        self._done = done
        self._settle = settle

    def release(self) -> None:
        """Nobody waits for the disk any more."""
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def written(self) -> None:
        if self._done is not None:
            await self._done

    def settle(self, *, is_landed: bool) -> None:
        self._settle(self, is_landed=is_landed)


class _File(SpoolFile):
    """A file with the records for which it is kept; these are the event loop's business."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.live: set[_Record] = set()

    def admit(self, record: _Record, number: int) -> None:
        """The record is, or is about to be, in this file, under a number of its own there."""
        record.file, record.number = self, number
        self.live.add(record)


def _try(tidy: Callable[[], None]) -> None:
    try:
        tidy()
    except OSError as error:
        logger.debug("the spool cannot tidy up: %s", error)  # if it matters, `append` fails, too
