"""The law of streams, on a world of lives that die, texts that differ, looks that come late.

What a reader holds of a step after applying resets is the recorded text in the end, and each entry
comes once, in order: whichever nodes it asked, whenever it was cut off.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest

from llm_orchestrator.engine.attempt import GENERATIONS
from llm_orchestrator.errors import InputError
from llm_orchestrator.model import Entry, Kind
from llm_orchestrator.server.feed import Told
from llm_orchestrator.server.streams import LOOKS_MAX, Reader
from llm_orchestrator.server.streams_entries import Event
from llm_orchestrator.server.streams_text import Position, proved
from llm_orchestrator.store.base import Progress
from llm_orchestrator.store.journal import encode

RUN = "run"
SEEDS = 40
STEPS = ("say", "map/0/say", "map/1/say")


@dataclass
class Step:
    """One step in the life that runs it."""

    attempt: int = 1
    generation: int = 0
    text: str = ""
    saved: int = -1
    """How much of the text is in the row of this generation; -1: there is no row."""
    has_begun: bool = False
    is_open: bool = False
    is_done: bool = False

    @property
    def row(self) -> int:
        return self.attempt * GENERATIONS + self.generation


@dataclass
class World:
    """One run: its journal, its kept texts, and the node that drives it (engine/attempt.py)."""

    chance: random.Random
    entries: list[Entry] = field(default_factory=list)
    kept: dict[str, dict[int, str]] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    epoch: int = 0
    driver: int = 0
    listeners: list[tuple[int, deque[Any]]] = field(default_factory=list)
    recorded: dict[str, str] = field(default_factory=dict)
    redone: set[str] = field(default_factory=set)
    is_over: bool = False

    def write(self, kind: Kind, step: str = "", attempt: int = 0, **data: Any) -> None:
        seq = len(self.entries) + 1
        entry = Entry(RUN, seq, self.epoch, kind, step, attempt, encode(data), b"", 0)
        self.entries.append(entry)

    def tell(self, what: str, step: str, **data: Any) -> None:
        one = self.steps[step]
        data |= {"row": one.row, "epoch": self.epoch}
        for node, queue in self.listeners:
            if node == self.driver:
                queue.append(Told(RUN, what, step, one.attempt, data))

    def claim(self, node: int) -> None:
        """A first life, or one after a death: what was not kept is lost."""
        self.epoch += 1
        self.driver = node
        self.write(Kind.CLAIMED, node=f"node-{node}")
        for name in STEPS:
            one = self.steps.setdefault(name, Step())
            if one.is_done:
                continue
            rows = {} if name in self.redone else self.kept.get(name, {})
            self.steps[name] = one = Step(one.attempt, has_begun=one.has_begun)
            if one.has_begun and rows:
                newest = max(rows)
                one.generation = max(0, newest - one.row + 1)
                one.text = rows[newest]
                one.saved = 0

    def begin(self, name: str) -> None:
        one = self.steps[name]
        one.is_open = one.has_begun = True
        self.write(Kind.INTENT, name, one.attempt)
        if name in self.redone:
            self.redone.remove(name)
            self.kept.pop(name, None)
        if one.text:
            one.saved = -1
            self.tell("reset", name, offset=len(one.text))
        if self.chance.random() < 0.5:
            self.keep(name)

    def say(self, name: str) -> None:
        one = self.steps[name]
        # Two lives agree on every other word: texts differ, but not at once.
        here = len(one.text)
        word = f"{here:04d} " if here % 10 < 5 else f"{self.chance.randrange(3):04d} "
        offset, one.text = here, one.text + word
        self.tell("chunk", name, offset=offset, text=word)

    def keep(self, name: str) -> None:
        one = self.steps[name]
        self.kept.setdefault(name, {})[one.row] = one.text
        one.saved = len(one.text)

    def void(self, name: str) -> None:
        """reset_stream: another answer begins."""
        one = self.steps[name]
        self.kept.pop(name, None)
        one.generation += 1
        one.text, one.saved = "", -1
        self.tell("reset", name, offset=0)

    def fail(self, name: str) -> None:
        one = self.steps[name]
        one.is_open = False
        self.write(Kind.ATTEMPT_FAILED, name, one.attempt, final=False, error={})
        one.attempt += 1

    def finish(self, name: str) -> None:
        one = self.steps[name]
        if self.chance.random() < 0.2:  # the last words were not streamed
            one.text += "the end"
        result = {"text": one.text, "model": "m", "tokens": 1}
        self.write(Kind.STEP_FINISHED, name, one.attempt, result=result)
        self.kept.pop(name, None)
        self.recorded[name] = one.text
        one.is_open, one.is_done = False, True

    def rewind(self) -> None:
        to_seq = self.chance.randrange(1, len(self.entries) + 1)
        self.epoch += 1
        hidden = {entry.step for entry in self.entries if entry.seq > to_seq}
        self.write(Kind.REWOUND, to_seq=to_seq)
        for name in hidden & set(self.steps):
            self.steps[name] = Step()
            self.recorded.pop(name, None)
            self.redone.add(name)
        self.claim(self.chance.randrange(2))

    def move(self) -> None:
        """Something happens."""
        name = self.chance.choice(STEPS)
        one, dice = self.steps[name], self.chance.random()
        if dice < 0.03:
            old, told = self.steps[name], {"row": one.row, "epoch": self.epoch}
            self.claim(1 - self.driver)
            for node, queue in self.listeners:  # it does not know yet that it was dead
                if node != self.driver and old.is_open:
                    data = told | {"offset": len(old.text), "text": "zombie "}
                    queue.append(Told(RUN, "chunk", name, old.attempt, data))
        elif dice < 0.06:
            self.rewind()
        elif one.is_done:
            return
        elif not one.is_open:
            self.begin(name)
        elif dice < 0.7:
            self.say(name)
        elif dice < 0.85:
            self.keep(name)
        elif dice < 0.9:
            self.void(name)
        elif dice < 0.93:
            self.fail(name)
        else:
            self.finish(name)

    def end(self) -> None:
        for name in STEPS:
            while not self.steps[name].is_done:
                if not self.steps[name].is_open:
                    self.begin(name)
                self.finish(name)
        self.write(Kind.STATE, state="completed", event="complete", output=1)
        self.is_over = True

    def progress(self, name: str) -> Progress | None:
        rows = self.kept.get(name)
        return Progress(max(rows), rows[max(rows)], None) if rows else None


class Connection:
    """A reader at one node: words and looks wait in one line, and are read when it pleases."""

    def __init__(self, world: World, node: int, last_id: str, step: str | None) -> None:
        self.world, self.node = world, node
        self.queue: deque[Any] = deque()
        self.is_new = True
        world.listeners.append((node, self.queue))
        self.reader = Reader(Position.parse(last_id) if last_id else None, step=step)
        self.look()

    def look(self) -> None:
        """Texts, then, later perhaps, entries."""
        is_live = self.node == self.world.driver
        wanted = self.reader.wants(is_live=is_live)
        kept = [(name, self.world.progress(name)) for name in wanted]
        if self.world.chance.random() < 0.3 and not self.world.is_over:
            self.world.move()
        look = (kept, list(self.world.entries))
        if self.is_new:
            self.queue.appendleft(look)
        else:
            self.queue.append(look)
        self.is_new = False

    def read(self) -> list[Event]:
        if not self.queue:
            return []
        item = self.queue.popleft()
        if isinstance(item, Told):
            return list(self.reader.told(item))
        kept, entries = item
        found = [event for name, progress in kept for event in self.reader.kept(name, progress)]
        return found + list(self.reader.journal(entries))

    def close(self) -> None:
        self.world.listeners = [each for each in self.world.listeners if each[1] is not self.queue]


class Client:
    """What a client holds, and where it stands."""

    def __init__(self) -> None:
        self.text: dict[str, str] = {}
        self.last_id = ""
        self.seqs: list[int] = []
        self.resets = 0
        self.end: dict[str, Any] | None = None

    def take(self, event: Event) -> None:
        self.last_id = event.id or self.last_id
        if event.name in ("chunk", "reset"):
            step, offset = event.data["step"], event.data["offset"]
            assert offset <= len(self.text.get(step, "")), "a gap"
            if event.name == "chunk":
                assert offset == len(self.text.get(step, "")), "a repeat"
            self.resets += event.name == "reset"
            self.text[step] = self.text.get(step, "")[:offset] + event.data.get("text", "")
        elif event.name == "end":
            self.end = event.data
        else:
            self.seqs.append(int(event.id))


def play(seed: int, step: str | None = None) -> tuple[World, Client]:
    """One run and one reader of it, to the end."""
    world, client = World(random.Random(seed)), Client()
    world.write(Kind.ACCEPTED)
    world.claim(0)
    connection = live(world, client, step)
    if not world.is_over:
        world.end()
    while client.end is None:
        connection.look()
        while connection.queue and client.end is None:
            for event in connection.read():
                client.take(event)
    return world, client


def live(world: World, client: Client, step: str | None) -> Connection:
    """Things happen, are read, and are cut off."""
    chance = world.chance
    connection = Connection(world, chance.randrange(2), "", step)
    for turn in range(chance.randrange(20, 400)):
        if turn and not world.is_over:
            world.move()
        dice = chance.random()
        if dice < 0.3:
            connection.look()
        if dice < 0.04:  # cut off; what was under way is lost
            connection.close()
            connection = Connection(world, chance.randrange(2), client.last_id, step)
        if dice > 0.95 and client.end is None:
            quiet(world, connection, client)
        for event in connection.read() if dice < 0.8 else ():
            client.take(event)
            if chance.random() < 0.02:  # cut off in the middle
                connection.close()
                connection = Connection(world, chance.randrange(2), client.last_id, step)
                break
        if client.end is not None:
            break
    return connection


def quiet(world: World, connection: Connection, client: Client) -> None:
    """Nothing happens for a while, all is kept, and the reader has read all there is."""
    for name in STEPS:
        if world.steps[name].is_open:
            world.keep(name)
    move, world.move = world.move, lambda: None  # type: ignore[method-assign]
    for _ in range(2 * LOOKS_MAX):
        connection.look()
        while connection.queue:
            for event in connection.read():
                client.take(event)
    world.move = move  # type: ignore[method-assign]
    for name, held in client.text.items():
        if world.steps[name].is_open:
            assert world.steps[name].text.startswith(held), name


def full(texts: dict[str, str]) -> dict[str, str]:
    return {step: text for step, text in texts.items() if text}


@pytest.mark.parametrize("part", range(8))
def test_a_reader_holds_the_recorded_text_however_it_was_cut_off(part: int) -> None:
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        world, client = play(seed)
        assert full(client.text) == full(world.recorded), f"seed {seed}"
        assert client.seqs == list(range(1, len(world.entries) + 1)), f"seed {seed}"


@pytest.mark.parametrize("part", range(4))
def test_so_does_the_reader_of_one_step(part: int) -> None:
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        _, client = play(seed, STEPS[1])
        assert set(client.text) <= {STEPS[1]}
        assert client.end is not None
        if client.end["state"] == "completed" and "output" in client.end:
            held = client.text.get(STEPS[1], "")
            assert held == client.end["output"]["text"], f"seed {seed}"


# -- and no more resets than there must be --------------------------------------------------------

WORDS = "".join(f"{number:04d} " for number in range(400))


def entries(*kinds: tuple[Kind, str, int]) -> list[Entry]:
    """Entries with a step and an epoch each."""
    return [
        Entry(RUN, seq, epoch, kind, step, 1, encode({}), b"", 0)
        for seq, (kind, step, epoch) in enumerate(kinds, 1)
    ]


BEGUN = entries((Kind.ACCEPTED, "", 0), (Kind.CLAIMED, "", 1), (Kind.INTENT, "say", 1))
TAKEN = entries(*((Kind(e.kind), e.step, e.epoch) for e in BEGUN), (Kind.CLAIMED, "", 2))


def chunk(offset: int, text: str, *, row: int = 1000, epoch: int = 1) -> Told:
    data = {"offset": offset, "text": text, "row": row, "epoch": epoch}
    return Told(RUN, "chunk", "say", 1, data)


def holding(length: int) -> tuple[Client, Reader]:
    """A reader that was told so much, live."""
    client, reader = Client(), Reader()
    for event in (*reader.journal(BEGUN), *reader.told(chunk(0, WORDS[:length]))):
        client.take(event)
    assert client.text == {"say": WORDS[:length]}
    return client, reader


def back(client: Client) -> Reader:
    return Reader(Position.parse(client.last_id))


def test_a_reader_that_comes_back_to_the_same_life_gets_what_it_lacks_and_no_reset() -> None:
    client, _ = holding(700)
    reader = back(client)
    late = [*reader.journal(BEGUN), *reader.told(chunk(760, WORDS[760:800]))]
    late += reader.kept("say", Progress(1000, WORDS[:650], None))  # its words are kept soon
    assert not late
    for event in reader.kept("say", Progress(1000, WORDS[:765], None)):
        client.take(event)
    assert client.text == {"say": WORDS[:800]}
    assert client.resets == 0


def test_a_takeover_that_kept_all_that_was_shown_needs_no_reset() -> None:
    client, reader = Client(), Reader()
    events = [*reader.journal(BEGUN), *reader.kept("say", Progress(1000, WORDS[:600], None))]
    events += [*reader.journal(TAKEN), *reader.kept("say", Progress(1001, WORDS[:700], None))]
    for event in events:
        client.take(event)
    assert client.text == {"say": WORDS[:700]}
    assert client.resets == 0


def test_after_a_takeover_the_reader_goes_on_at_the_kept_prefix() -> None:
    client, reader = holding(700)
    kept = Progress(1000, WORDS[:600], None)
    for event in (*reader.journal(TAKEN), *reader.kept("say", kept)):
        client.take(event)
    assert client.text == {"say": WORDS[:600]}
    assert client.resets == 1


def test_a_reader_that_comes_back_after_a_takeover_keeps_what_its_proof_shows() -> None:
    client, _ = holding(1300)
    reader = back(client)
    other = WORDS[:1100] + "and another end"  # the new life has gone on otherwise
    events = [*reader.journal(TAKEN), *reader.kept("say", Progress(1001, other, None))]
    assert [event.name for event in events] == ["claimed", "reset", "chunk"]
    assert events[1].data["offset"] == 512
    for event in events:
        client.take(event)
    assert client.text == {"say": other}


def test_the_text_of_another_life_is_never_taken_for_ones_own() -> None:
    client, _ = holding(300)
    reader = back(client)
    other = WORDS[:100] + "x" + WORDS[101:400]
    for event in (*reader.journal(TAKEN), *reader.kept("say", Progress(1001, other, None))):
        client.take(event)
    assert client.text == {"say": other}


def test_what_is_kept_later_than_it_is_told_takes_nothing_back() -> None:
    client, reader = holding(700)
    list(reader.told(chunk(700, WORDS[700:710], row=2000)))
    for kept in (Progress(1000, WORDS[:650], None), Progress(2000, WORDS[:700], None)):
        assert not list(reader.kept("say", kept))
    assert client.resets == 0


def test_a_position_of_one_step_says_nothing_of_another() -> None:
    client, _ = holding(300)
    client.last_id = client.last_id.replace(client.last_id.split(".")[3].split("-")[0], "000000")
    reader = back(client)
    events = [*reader.journal(BEGUN), *reader.kept("say", Progress(1000, WORDS[:300], None))]
    assert [(event.name, event.data["offset"]) for event in events] == [("reset", 0), ("chunk", 0)]


@pytest.mark.parametrize("text", ["x", "1.2", "-1", "1.2.x", "1..3", "٣", "1.2.3.", "9" * 30])
def test_a_position_that_is_none_is_refused_or_proves_nothing(text: str) -> None:
    try:
        position = Position.parse(text)
    except InputError:
        return
    assert proved(position, "say", WORDS) == -1


def test_the_words_of_a_node_that_lost_the_run_are_not_told() -> None:
    _, reader = holding(300)
    list(reader.journal(TAKEN))
    assert not list(reader.told(chunk(300, "zombie")))


@pytest.mark.parametrize("is_back", [False, True])
def test_a_rewind_takes_back_the_text_of_what_was_in_flight(is_back: bool) -> None:
    client, reader = holding(300)
    if is_back:
        reader = back(client)
        assert not list(reader.journal(BEGUN))
    rewound = Entry(RUN, 4, 2, Kind.REWOUND, "", 0, encode({"to_seq": 1}), b"", 0)
    for event in reader.journal([*BEGUN, rewound]):
        client.take(event)
    assert client.text == {"say": ""}
