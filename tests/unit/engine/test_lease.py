"""Who lives, by the laws 1 and 6 of DESIGN.md: pure histories, no clock but the numbers given."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.engine.lease import Lease, LeaseOptions, Verdict
from llm_orchestrator.store.base import Member, NodeState, Pulse

OPTIONS = LeaseOptions()
LEASE_S, MARGIN_S, GONE_S, REJOIN_S = (
    OPTIONS.lease_s,
    OPTIONS.margin_s,
    OPTIONS.gone_s,
    OPTIONS.rejoin_s,
)
JUST = 0.001
NOBODY: tuple[tuple[str, int], ...] = ()


def member(
    node_id: str, beat: int = 0, *, state: NodeState = NodeState.ALIVE, is_open: bool = True
) -> Member:
    return Member(node_id, "local", state, beat, is_open, 0, 0)


def pulse(
    *others: Member, own: Member | None = None, server: str = "one", session: int = 1
) -> Pulse:
    return Pulse(server, 0, [own or member("me"), *others], session=session)


class Watcher:
    """A node that looks every 0.2 s, and what it said of the others."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.lease = Lease("me", OPTIONS, now)

    def look(
        self, *others: Member, after: float = 0.2, server: str = "one", session: int = 1
    ) -> Verdict:
        self.now += after
        seen = pulse(*others, server=server, session=session)
        return self.lease.answered(None, self.now, seen)

    def dead_after(self, *others: Member, session: int = 1) -> float | None:
        """How long from now the first of `others`, as they are, is declared dead."""
        begun = self.now
        while self.now - begun < 20.0:
            if self.look(*others, session=session).dead:
                return self.now - begun
        return None


# -- may I begin? --------------------------------------------------------------------------------


def test_the_lease_ends_a_margin_before_its_time_counted_from_before_the_beat_was_sent() -> None:
    lease = Lease("me", OPTIONS, 0.0)
    lease.answered(10.0, 10.9, pulse())
    end = 10.0 + LEASE_S - MARGIN_S
    assert lease.holds(end - JUST)
    assert not lease.holds(end)


def test_without_an_answer_the_lease_ends() -> None:
    lease = Lease("me", OPTIONS, 5.0)
    assert lease.holds(5.0)
    assert not lease.holds(5.0 + LEASE_S - MARGIN_S)


def test_a_late_answer_gives_no_time_that_has_passed() -> None:
    lease = Lease("me", OPTIONS, 0.0)
    verdict = lease.answered(1.0, 100.0, pulse())
    assert not verdict.is_fenced
    assert not lease.holds(100.0)


def test_an_older_beats_answer_takes_nothing_away() -> None:
    lease = Lease("me", OPTIONS, 0.0)
    lease.answered(2.0, 2.1, pulse())
    lease.answered(1.0, 2.2, pulse())
    assert lease.holds(2.0 + LEASE_S - MARGIN_S - JUST)


def test_a_look_is_no_beat() -> None:
    lease = Lease("me", OPTIONS, 0.0)
    lease.answered(0.0, 0.1, pulse())
    for step in range(1, 30):
        lease.answered(None, step / 10, pulse())
    assert not lease.holds(LEASE_S - MARGIN_S)


def test_whoever_was_declared_dead_is_fenced_for_good() -> None:
    for own in (member("me", state=NodeState.DEAD), member("me", state=NodeState.LEFT)):
        lease = Lease("me", OPTIONS, 0.0)
        lease.answered(0.0, 0.1, pulse())
        assert lease.holds(0.2)
        assert lease.answered(0.2, 0.3, pulse(own=own)).is_fenced
        assert not lease.holds(0.3)
        assert lease.answered(0.4, 0.5, pulse()).is_fenced
        assert not lease.holds(0.5)


def test_whoever_is_not_among_the_nodes_is_fenced() -> None:
    lease = Lease("me", OPTIONS, 0.0)
    assert lease.answered(0.0, 0.1, Pulse("one", 0, [member("other")])).is_fenced


def test_a_node_that_is_leaving_still_lives() -> None:
    lease = Lease("me", OPTIONS, 0.0)
    verdict = lease.answered(1.0, 1.1, pulse(own=member("me", state=NodeState.LEAVING)))
    assert not verdict.is_fenced
    assert verdict.alive == {"me"}
    assert lease.holds(2.0)


# -- gone ----------------------------------------------------------------------------------------


def test_a_closed_session_that_stays_quiet_is_a_death() -> None:
    watcher = Watcher()
    watcher.look(member("it", 7))
    assert watcher.look(member("it", 7, is_open=False)).dead == NOBODY
    assert watcher.look(member("it", 7, is_open=False), after=GONE_S - JUST).dead == NOBODY
    assert watcher.look(member("it", 7, is_open=False), after=2 * JUST).dead == (("it", 7),)


def test_a_reconnect_clears_the_suspicion() -> None:
    watcher = Watcher()
    closed, opened = member("it", 7, is_open=False), member("it", 7)
    watcher.look(closed)
    watcher.look(closed)
    assert watcher.look(opened).dead == NOBODY
    assert watcher.look(closed).dead == NOBODY
    assert watcher.look(closed, after=GONE_S - JUST).dead == NOBODY
    assert watcher.look(closed, after=2 * JUST).dead == (("it", 7),)


def test_a_beat_clears_the_suspicion() -> None:
    """Behind a pooler the session of a beat may close at once, although its node lives."""
    watcher = Watcher()
    for beat in range(40):
        assert watcher.look(member("it", beat, is_open=False)).dead == NOBODY
    assert watcher.look(member("it", 39, is_open=False), after=GONE_S).dead == (("it", 39),)


def test_while_somebody_is_suspected_looks_are_frequent() -> None:
    watcher = Watcher()
    watcher.look(member("it", 7))
    assert watcher.lease.pause_s() == OPTIONS.look_s
    watcher.look(member("it", 7, is_open=False))
    assert watcher.lease.pause_s() <= GONE_S / 5
    watcher.look()
    assert watcher.lease.pause_s() == OPTIONS.look_s


# -- silent --------------------------------------------------------------------------------------


def test_a_beat_that_does_not_move_for_a_whole_lease_is_a_death() -> None:
    watcher = Watcher()
    watcher.look(member("it", 1))
    watcher.look(member("it", 2))
    since = watcher.now
    while watcher.now + 0.2 < since + LEASE_S:
        assert watcher.look(member("it", 2)).dead == NOBODY
    assert watcher.look(member("it", 2), after=since + LEASE_S - watcher.now).dead == (("it", 2),)


def test_the_times_that_are_stored_judge_nobody() -> None:
    """A node's row may say any hour: only the watcher's steady clock counts."""
    watcher = Watcher()
    for beat in range(100):
        past = member("it", beat)._replace(heartbeat_at=-(10**15), started_at=10**18)
        assert watcher.look(past).dead == NOBODY


def test_a_node_that_left_is_not_declared_dead_and_not_alive() -> None:
    watcher = Watcher()
    watcher.look(member("it", 1))
    verdict = watcher.look(member("it", 1, state=NodeState.LEFT, is_open=False), after=1.0)
    assert verdict.dead == NOBODY
    assert verdict.alive == {"me"}


# -- when the watcher itself was away ------------------------------------------------------------


def test_a_row_that_is_dead_at_first_sight_is_declared_dead_soon() -> None:
    """A node that starts beside a dead one does not wait for a rejoin that nobody is about."""
    found = Watcher(100.0).dead_after(member("it", 7, is_open=False))
    assert found is not None
    assert found <= GONE_S + 0.4
    found = Watcher(100.0).dead_after(member("it", 7))
    assert found is not None
    assert LEASE_S <= found <= LEASE_S + 0.4


def test_after_an_outage_of_its_own_nobody_is_judged_until_all_had_time_to_come_back() -> None:
    for outage_s in (LEASE_S / 2 + JUST, 3_600.0):
        for other in (member("it", 7), member("it", 7, is_open=False)):
            watcher = Watcher()
            watcher.look(other)
            assert watcher.look(other, after=outage_s).dead == NOBODY
            found = watcher.dead_after(other)
            assert found is not None
            assert found > REJOIN_S - 0.2
            if other.is_connected:
                assert found > LEASE_S - 0.2  # a whole lease, counted anew


def test_another_server_knows_nothing_of_the_sessions_there_were() -> None:
    watcher = Watcher()
    watcher.look(member("it", 7, is_open=False))
    closed = member("it", 7, is_open=False)
    assert watcher.look(closed, server="two").dead == NOBODY
    assert watcher.look(closed, server="two", after=GONE_S).dead == NOBODY
    begun = watcher.now - GONE_S
    while watcher.now + 0.2 < begun + REJOIN_S:
        assert watcher.look(closed, server="two").dead == NOBODY
    rest = begun + REJOIN_S - watcher.now
    assert watcher.look(closed, server="two", after=rest).dead == (("it", 7),)


def test_another_session_of_its_own_resets_what_it_knew() -> None:
    """A proxy that is restarted cuts everybody's; whoever is back first must not bury the rest."""
    watcher = Watcher()
    watcher.look(member("it", 7))
    watcher.look(member("it", 7, is_open=False), session=2)
    while watcher.now < 0.4 + REJOIN_S - 0.3:
        assert watcher.look(member("it", 7, is_open=False), session=2).dead == NOBODY
    assert watcher.dead_after(member("it", 7, is_open=False), session=2) is not None


def test_whoever_comes_back_within_the_rejoin_is_not_declared_dead() -> None:
    watcher = Watcher()
    watcher.look(member("it", 7))
    watcher.look(member("it", 7, is_open=False), after=60.0)
    while watcher.now < 60.2 + REJOIN_S - 0.3:
        watcher.look(member("it", 7, is_open=False))
    for beat in range(8, 40):
        assert watcher.look(member("it", beat)).dead == NOBODY


def test_two_servers_in_turn_never_let_anybody_be_judged() -> None:
    watcher = Watcher()
    for turn in range(100):
        closed = member("it", 7, is_open=False)
        assert watcher.look(closed, server=f"server {turn % 2}").dead == NOBODY


# -- any history ---------------------------------------------------------------------------------

GAPS = st.lists(st.floats(0.01, 2.0, allow_nan=False), min_size=1, max_size=60)


@given(gaps=GAPS, looks=st.integers(0, 20), is_restarted=st.booleans())
def test_a_node_whose_beats_are_seen_every_two_seconds_is_never_declared_dead(
    gaps: list[float], looks: int, *, is_restarted: bool
) -> None:
    """However irregular both are, with looks in between or none, on one server or two."""
    watcher = Watcher()
    for beat, gap in enumerate(gaps):
        server = "two" if is_restarted and beat > len(gaps) / 2 else "one"
        for _ in range(looks):
            last = member("it", beat - 1)
            assert watcher.look(last, after=gap / (looks + 1), server=server).dead == NOBODY
        new = member("it", beat)
        assert watcher.look(new, after=gap / (looks + 1), server=server).dead == NOBODY


@given(
    beats=st.lists(st.floats(0.01, 1.4, allow_nan=False), max_size=20),
    looks=st.lists(st.floats(0.01, 0.5, allow_nan=False), min_size=1, max_size=8),
    is_open=st.booleans(),
)
def test_a_node_that_stops_is_declared_dead_within_a_lease_and_two_beats(
    beats: list[float], looks: list[float], *, is_open: bool
) -> None:
    watcher = Watcher()
    watcher.look(member("it", 0))
    for beat, gap in enumerate(beats, 1):
        watcher.look(member("it", beat), after=gap)
    stopped = watcher.now
    last = member("it", len(beats), is_open=is_open)
    for turn in range(10_000):
        verdict = watcher.look(last, after=looks[turn % len(looks)])
        if verdict.dead:
            break
    within = (LEASE_S if is_open else GONE_S) + 2 * OPTIONS.heartbeat_s
    assert watcher.now - stopped <= within
    assert verdict.dead == (("it", len(beats)),)


@given(
    steps=st.lists(
        st.tuples(st.floats(0.0, 5.0, allow_nan=False), st.booleans(), st.integers(0, 3)),
        max_size=60,
    )
)
def test_a_lease_never_holds_longer_than_the_last_answered_beat_allows(
    steps: list[tuple[float, bool, int]],
) -> None:
    """Answers may come late, in any order, or never: against the plainest reading of law 1."""
    lease, now, sent, answered = Lease("me", OPTIONS, 0.0), 0.0, [0.0], [0.0]
    for pause, is_answered, which in steps:
        now += pause
        sent.append(now)
        if is_answered:
            at = sent[max(0, len(sent) - 1 - which)]
            lease.answered(at, now, pulse())
            answered.append(at)
        assert lease.holds(now) == (now < max(answered) + LEASE_S - MARGIN_S)


# -- the rhythm ----------------------------------------------------------------------------------


def test_beats_are_given_as_often_as_the_options_say_however_short() -> None:
    for heartbeat_s in (0.05, 0.1, 0.5, 5.0):
        options = LeaseOptions(heartbeat_s=heartbeat_s, lease_s=heartbeat_s * 3)
        lease, now, sent_at, beats = Lease("me", options, 0.0), 0.0, float("-inf"), 0
        while now < 100 * heartbeat_s:
            if lease.is_due(now, sent_at):
                sent_at, beats = now, beats + 1
            now += lease.pause_s()
        assert 95 <= beats <= 210, heartbeat_s
