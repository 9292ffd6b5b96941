"""Write client/sync.py from client/asynchronous.py: one source, two clients.

Usage: .venv/bin/python scripts/unasync.py     (`make docs` calls it; tests/client checks it)
"""

import re
import subprocess
import sys
from pathlib import Path

PLACE = Path(__file__).resolve().parents[1] / "src" / "llm_orchestrator" / "client"
HEAD = '"""The client\'s calls, blocking. Written from asynchronous.py by `make docs`."""\n'
WORDS = (
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsyncClient\b", "Client"),
    (r"\bAsyncHTTPTransport\b", "HTTPTransport"),
    (r"\bAsyncTransport\b", "Transport"),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"__aenter__", "__enter__"),
    (r"__aexit__", "__exit__"),
    (r"\baclose\b", "close"),
    (r"\baread\b", "read"),
    (r"\baiter_lines\b", "iter_lines"),
    (r"_clock\.sleep\b", "_clock.pause"),
    (r"\bRealClock\b", "BlockingClock"),
    ("between tasks", "between threads"),
)


def sync_source(source: str) -> str:
    """The blocking client's text, formatted."""
    text = HEAD + source.split('"""\n', 1)[1]
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text)
    for words in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *words, "--stdin-filename", "sync.py", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        text = done.stdout
    return text


def main() -> None:
    source = (PLACE / "asynchronous.py").read_text()
    (PLACE / "sync.py").write_text(sync_source(source))


if __name__ == "__main__":
    main()
