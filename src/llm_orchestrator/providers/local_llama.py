"""The inside of the local model's server process; see local_server.py for who starts and ends it.

Prints exactly one line of JSON on stdout: `{"port", "pid"}` once the server answers, or `{"error",
"hint"}`. Everything that llama.cpp says goes to stderr. Holds no truth: it may be killed at any
moment, so it leaves at once when told to. Only the `--state` file is tidied up.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from llm_orchestrator.model import Json
from llm_orchestrator.providers.local_server import HOST, process_start

_PROMPT_CACHE_MIB = 256
_WARNINGS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or (when asked) the end of stdin."""
    parser = argparse.ArgumentParser(prog="python -m llm_orchestrator.providers.local_server")
    parser.add_argument("--model", required=True, help="path of a GGUF file")
    parser.add_argument("--port", type=int, default=0, help="0 lets the system choose")
    parser.add_argument(
        "--ctx", type=int, default=4096, help="context in tokens, divided among the slots"
    )
    parser.add_argument("--slots", type=int, default=2, help="requests served at once")
    parser.add_argument("--state", type=Path, help="file that says where the server is")
    parser.add_argument("--until-stdin-closes", action="store_true", help="die with the parent")
    options = parser.parse_args(arguments)

    # The handlers come before the model is loaded, so that a start can be called off as well.
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(options.state, number, frame))
    signal.signal(signal.SIGINT, lambda number, frame: _leave(options.state, number, frame))
    if options.until_stdin_closes:
        threading.Thread(target=_watch_parent, args=(options.state,), daemon=True).start()
    try:
        server = _serve(options)
    except (ImportError, RuntimeError, OSError) as error:
        _say(_explain(error, options))
        return 1
    port = int(str(server.listening_address).rpartition(":")[2])
    if options.state is not None:
        _write_state(options.state, port)
    _say({"port": port, "pid": os.getpid()})
    while True:
        signal.pause()


def _serve(options: argparse.Namespace) -> Any:
    """Load the model and listen; llama.cpp's constructor returns when it answers."""
    import xllamacpp  # noqa: PLC0415 - only the server's own process pays for it

    if not Path(options.model).is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), options.model)
    cores = max(1, min(os.cpu_count() or 1, 8))
    wanted = xllamacpp.CommonParams()
    wanted.model.path = options.model
    wanted.model_alias = {Path(options.model).name.split(".")[0].lower()}
    wanted.hostnames = [HOST]
    wanted.port = options.port
    wanted.n_ctx = options.ctx
    wanted.n_parallel = options.slots
    # Shared by all slots, the cache makes answers depend on what else is being asked.
    wanted.kv_unified = False
    wanted.cache_ram_mib = _PROMPT_CACHE_MIB  # the default would take 8 GiB
    wanted.warmup = False
    wanted.ui = False
    wanted.verbosity = _WARNINGS
    wanted.cors_origins = f"http://{HOST}"  # no web page of a stranger may ask
    wanted.cpuparams_batch.n_threads = cores
    # Each token waits for the slowest thread: with one for every core of a busy machine, ten times
    # as long.
    wanted.cpuparams.n_threads = max(1, cores // 2)
    wanted.endpoint_metrics = wanted.endpoint_slots = True
    return xllamacpp.Server(wanted)


def _explain(error: Exception, options: argparse.Namespace) -> dict[str, Json]:
    text = str(error)
    if "libgomp" in text:
        return {
            "error": f"the local model needs the system library libgomp1: {text}",
            "hint": "apt-get install libgomp1",
        }
    if isinstance(error, ImportError):
        return {
            "error": f"xllamacpp cannot be loaded: {text}",
            "hint": "pip install 'llm-orchestrator[local]'",
        }
    if isinstance(error, OSError):
        return {"error": f"cannot read the model: {text}", "hint": "llmo local pull"}
    where = f"port {options.port} of {HOST}" if options.port else "a free port"
    return {
        "error": f"llama.cpp does not start with {options.model} on {where}: {text}",
        "hint": "is the port taken? is the model whole? (llmo local pull checks it)",
    }


def _say(line: dict[str, Json]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _write_state(path: Path, port: int) -> None:
    state = {"port": port, "pid": os.getpid(), "started": process_start(os.getpid())}
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(state))
    scratch.replace(path)


def _watch_parent(state: Path | None) -> None:
    while os.read(0, 4096):
        pass
    _leave(state, 0, None)


def _leave(state: Path | None, number: int, frame: FrameType | None) -> None:
    """Go at once: a server that holds no truth needs no farewell."""
    del number, frame
    if state is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads(state.read_text())["pid"] == os.getpid():
                state.unlink()
    os._exit(0)
