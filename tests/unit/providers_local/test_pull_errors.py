"""What a failed pull tells its reader, for causes that a test cannot bring about safely."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llm_orchestrator.providers import local_model


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left under /data"),
        (errno.EROFS, "cannot write to /data: Read-only file system"),
        (errno.EACCES, "cannot write to /data: Permission denied"),
    ],
)
def test_a_full_or_closed_folder_is_named(number: int, message: str) -> None:
    error = local_model._explain(OSError(number, os.strerror(number)), Path("/data"))
    assert error.message.startswith(message)
    assert "LLM_ORCHESTRATOR_DATA" in str(error.hint)


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ("/usr/bin/python3: No module named pip", "has no pip", "ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "no space", "TMPDIR"),
        ("ERROR: No matching distribution found for x", "does not answer", "network"),
        ("WARNING: odd\nERROR: 403 Forbidden\nnote", "403 Forbidden", "what pip says"),
        ("", "pip could not fetch", "what pip says"),
    ],
)
def test_pips_own_words_become_a_remedy(said: str, message: str, hint: str) -> None:
    error = local_model._explain_pip(said)
    assert message in error.message
    assert hint in f"{error.hint} {error.message}"
