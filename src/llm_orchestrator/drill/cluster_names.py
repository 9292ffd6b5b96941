"""Names that clients of a lab know, in a hosts file of their own.

A client's command is put before a mount namespace of its own, in which our file lies over
/etc/hosts: the machine's file is never touched, and what was mounted is gone with the process. The
file is written in place, so that a client that is running sees the change when it looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_orchestrator.drill.lab.tools import find

_LOCAL = "127.0.0.1 localhost\n"
_OVER = 'mount --bind "$0" /etc/hosts && exec "$@"'


class Names:
    """Name to address, as `path` says."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self.known: dict[str, str] = {}

    def put(self, name: str, address: str) -> None:
        """From now on whoever looks is told this address."""
        self.known[name] = address
        lines = [f"{address} {name}\n" for name, address in self.known.items()]
        self._path.write_text(_LOCAL + "".join(lines))

    def before(self) -> Sequence[str]:
        """What goes before a command whose names these are to be."""
        alone = (find("unshare", hint="apt-get install util-linux"), "--mount")
        return (*alone, "--propagation", "private", "sh", "-c", _OVER, str(self._path))
