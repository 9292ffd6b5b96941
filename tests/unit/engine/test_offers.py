"""Results in the spool: adopted while their step is open, booked when they came too late."""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.engine.acceptance import accepted_draft
from llm_orchestrator.engine.offers import judge
from llm_orchestrator.engine.replay import fold, include
from llm_orchestrator.model import Entry, Json, Kind
from llm_orchestrator.store.journal import GENESIS, encode, link
from llm_orchestrator.store.spool_file import Offer
from tests.store.support import new_run

USAGE = {"input_tokens": 10, "output_tokens": 5, "cached_tokens": 0, "cost_usd": 0.25}


class Story:
    """A journal that a test writes."""

    def __init__(self) -> None:
        self.run = new_run()
        self.entries: list[Entry] = []
        self.add(*accepted_draft(self.run)[:3], payload=accepted_draft(self.run).payload)
        self.claim("first", epoch=1)

    def add(self, kind: str, step: str, attempt: int, *, payload: bytes, epoch: int = 1) -> Entry:
        last = self.entries[-1] if self.entries else None
        columns = (len(self.entries) + 1, epoch, str(kind), step, attempt, payload)
        digest = link(last.digest if last else GENESIS, self.run.run_id, columns)
        self.entries.append(Entry(self.run.run_id, *columns, digest, 0))
        return self.entries[-1]

    def say(self, kind: str, step: str = "", attempt: int = 0, **data: Json) -> Entry:
        return self.add(kind, step, attempt, payload=encode(data))

    def claim(self, node: str, *, epoch: int) -> None:
        self.add(Kind.CLAIMED, "", 0, payload=encode({"node": node}), epoch=epoch)

    def offer(self, step: str = "a", attempt: int = 1, **more: Any) -> Offer:
        last = self.entries[-1]
        payload = encode({"result": "paid", "usage": USAGE})
        where = {"head_seq": last.seq, "head_digest": last.digest, **more}
        return Offer(
            self.run.run_id, step, attempt, 1, "store", made_at=0, payload=payload, **where
        )

    def judged(self, *offers: Offer) -> Any:
        return judge(offers, fold(self.run.run_id, self.entries), self.entries)


def test_an_open_attempt_is_ended_by_its_answer() -> None:
    story = Story()
    story.say(Kind.INTENT, "a", 1, key="k")
    offer = story.offer()
    story.claim("second", epoch=2)
    judged = story.judged(offer)
    assert judged.drafts == (offer.draft,)
    assert (judged.adopted, judged.lost_usd) == (1, 0.0)
    state = fold(story.run.run_id, story.entries)
    include(state, state.seq, judged.drafts)
    assert state.finished["a"].result == "paid"
    assert (state.intents, state.usage.cost_usd, state.attempts) == ({}, 0.25, 1)


def test_an_answer_is_adopted_although_another_node_asked_again_and_died() -> None:
    story = Story()
    story.say(Kind.INTENT, "a", 1, key="k")
    offer = story.offer()
    story.claim("second", epoch=2)
    story.say(Kind.INTENT, "a", 1, key="k")
    assert story.judged(offer).adopted == 1


def test_of_two_answers_to_one_attempt_one_is_adopted_and_the_other_booked() -> None:
    story = Story()
    story.say(Kind.INTENT, "a", 1, key="k")
    judged = story.judged(story.offer(), story.offer())
    assert [draft.kind for draft in judged.drafts] == [Kind.STEP_FINISHED, Kind.PROGRESS]
    assert judged.lost_usd == 0.25


def test_an_answer_that_had_landed_costs_nothing() -> None:
    story = Story()
    story.say(Kind.INTENT, "a", 1, key="k")
    offer = story.offer()
    story.say(Kind.STEP_FINISHED, "a", 1, result="paid", usage=USAGE)
    assert story.judged(offer) == ((), 0, 0.0)


def finished_elsewhere(story: Story) -> None:
    story.say(Kind.STEP_FINISHED, "a", 1, result="of another", usage=USAGE)


def failed_elsewhere(story: Story) -> None:
    story.say(Kind.ATTEMPT_FAILED, "a", 1, error={"kind": "x", "message": "y"}, next_at=1)


def rewound(story: Story) -> None:
    story.say(Kind.REWOUND, to_seq=2)
    story.say(Kind.INTENT, "a", 1, key="k")


@pytest.mark.parametrize("what", [finished_elsewhere, failed_elsewhere, rewound])
def test_an_answer_that_came_too_late_is_booked_and_not_used(what: Any) -> None:
    story = Story()
    story.say(Kind.INTENT, "a", 1, key="k")
    offer = story.offer()
    what(story)
    judged = story.judged(offer)
    assert judged.adopted == 0
    assert judged.lost_usd == 0.25
    [draft] = judged.drafts
    before = fold(story.run.run_id, story.entries)
    spent = before.usage.cost_usd
    include(before, before.seq, judged.drafts)
    assert before.usage.cost_usd == spent + 0.25
    assert (draft.kind, draft.step, draft.attempt) == (Kind.PROGRESS, "a", 1)


def test_an_answer_of_another_history_is_not_used() -> None:
    story = Story()
    story.say(Kind.INTENT, "a", 1, key="k")
    assert story.judged(story.offer(head_digest=bytes(32))).adopted == 0
    assert story.judged(story.offer(attempt=2)).adopted == 0
    assert story.judged(story.offer(step="b")).adopted == 0
