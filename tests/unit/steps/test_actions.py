from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

from llm_orchestrator.errors import AuthorError, OperatorError
from llm_orchestrator.model import Effect, Json
from llm_orchestrator.steps.action import Action, Actions
from llm_orchestrator.steps.action_file import replace
from llm_orchestrator.steps.base import Outputs, StepContext
from tests.unit.steps.support import Room, config


async def call(action: str, room: Room | None = None, **parameters: Json) -> Json:
    return await Action().execute(room or Room(), config("action", action=action, **parameters))


@pytest.mark.parametrize("name", ["notify", "publish", "queue_review", "send_notification"])
async def test_what_nobody_here_performs_goes_to_the_outbox(name: str) -> None:
    room = Room()
    outputs = await call(name, room, channel="mail", parameters={"title": "Hi"})
    assert outputs == {"result": {"outbox": name}}
    assert room.outbox == [(name, {"channel": "mail", "title": "Hi"})]
    assert Action().effect(config("action", action=name)) is Effect.REPEATABLE


async def test_log_writes_one_line_without_secrets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llm_orchestrator.workflow")
    outputs = await call(
        "log",
        message="first\nsecond\x1b[2J",
        mood="good",
        api_key="sk-hidden",
        nested=[{"password": "hidden", "max_tokens": 5}],
    )
    [record] = caplog.records
    assert record.getMessage() == "first\\nsecond\\x1b[2J"
    assert "hidden" not in str(record.__dict__)
    assert record.__dict__["fields"]["mood"] == "good"
    assert record.__dict__["fields"]["nested"][0]["max_tokens"] == 5
    assert record.__dict__["step"] == "it"
    assert outputs == {"result": "first\nsecond\x1b[2J"}


async def test_log_takes_a_level_and_any_value(caplog: pytest.LogCaptureFixture) -> None:
    await call("log", message={"a": 1}, level="WARN")
    assert (caplog.records[0].levelname, caplog.records[0].getMessage()) == ("WARNING", '{"a":1}')
    with pytest.raises(AuthorError, match="no level 'loud'"):
        await call("log", message="x", level="loud")


async def test_file_write_puts_text_or_json_in_place(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    outputs = await call("file_write", path=str(path), content="häl\n")
    assert path.read_text("utf-8") == "häl\n"
    assert outputs == {"result": {"path": str(path), "bytes": 5}}
    await call("file_write", path=str(path), content={"a": [1]})
    assert json.loads(path.read_text()) == {"a": [1]}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


async def test_file_write_appends(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for line in ("a\n", "b\n"):
        await call("file_write", path=str(path), content=line, append=True)
    assert path.read_text() == "a\nb\n"


def test_overwriting_may_be_repeated_and_appending_may_not() -> None:
    step = config("action", action="file_write", path="x")
    assert Action().effect(step) is Effect.REPEATABLE
    step = config("action", action="file_write", path="x", append=True)
    assert Action().effect(step) is Effect.ONCE


async def test_file_write_keeps_permissions_and_follows_links(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    await call("file_write", path=str(link), content="new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_failed_overwrite_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace(path, b"new", "key")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


async def test_what_the_disk_refuses_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OperatorError, match=r"cannot write .*: ") as caught:
        await call("file_write", path=str(tmp_path / "file" / "below"), content="x")
    assert "llmo runs retry" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs the parameter 'path'"),
        ({"path": "x", "mode": "binary"}, "no mode 'binary'"),
        ({"path": "x", "mode": "text", "content": {"a": 1}}, "is an object of 1 keys"),
        ({"path": "x", "contents": "y"}, "no parameter 'contents'"),
    ],
)
async def test_wrong_parameters_are_named(parameters: dict[str, Json], message: str) -> None:
    with pytest.raises(AuthorError, match=message):
        await call("file_write", **parameters)


class Wave:
    """An action of somebody else's."""

    def effect(self, parameters: Mapping[str, Json]) -> Effect:
        return Effect.ONCE

    async def execute(
        self, context: StepContext, parameters: Mapping[str, Json], *, effect: Effect
    ) -> Outputs:
        return {"result": f"waved at {parameters['whom']} {effect}"}


async def test_actions_can_be_handed_in_or_plugged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    step = config("action", action="wave", whom="Ann")
    handed_in = Action(Actions({"wave": Wave}))
    assert (await handed_in.execute(Room(), step))["result"] == "waved at Ann once"
    plug_in = metadata.EntryPoint("wave", f"{__name__}:Wave", "llm_orchestrator.actions")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [plug_in])
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: Wave)
    plugged_in = Action(Actions())
    assert (await plugged_in.execute(Room(), step))["result"] == "waved at Ann once"
    assert Actions().names() == ["file_write", "http", "log", "wave", "webhook"]


async def test_a_built_in_action_cannot_be_replaced() -> None:
    room = Room()
    action = Action(Actions({"log": Wave}))
    assert await action.execute(room, config("action", action="log", message="m")) == {
        "result": "m"
    }
