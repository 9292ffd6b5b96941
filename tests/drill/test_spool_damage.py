"""What the drill spoils in a node's spool, byte by byte: a file as the product writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_orchestrator.drill.cluster_spool import spoil
from llm_orchestrator.drill.target import NotConfirmed
from llm_orchestrator.store.spool_file import Offer, SpoolFile, parse


def written(path: Path, count: int, *gone: int) -> dict[int, Offer]:
    offers = {
        number: Offer(
            f"run-{number}",
            "ask",
            1,
            1,
            "store",
            3,
            bytes(32),
            1,
            json.dumps({"result": "x" * 40, "n": number}).encode(),
        )
        for number in range(1, count + 1)
    }
    file = SpoolFile(path)
    file.append(offers)
    if gone:
        file.mark(gone)
    file.close()
    return offers


def test_just_the_first_and_the_last_wanted_record_are_spoilt(tmp_path: Path) -> None:
    path = tmp_path / "a.spool"
    offers = written(path, 6)
    content, lost = spoil(path.read_bytes())
    assert lost == {"run-1", "run-6"}
    found, bad, is_torn = parse(content)
    assert (bad, is_torn) == (1, True)
    assert found == {number: offers[number] for number in range(2, 6)}


def test_what_is_wanted_no_more_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.spool"
    offers = written(path, 6, 1, 6)
    content, lost = spoil(path.read_bytes())
    assert lost == {"run-2", "run-5"}
    assert parse(content)[0] == {number: offers[number] for number in (3, 4)}


def test_too_few_records_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.spool"
    written(path, 3)
    with pytest.raises(NotConfirmed):
        spoil(path.read_bytes())
