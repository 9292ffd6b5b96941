"""The bytes of a backup file: compressed, and sealed for whoever holds a key (age).

    write: members -> compressor -> [age] -> file          read: the other way round

Memory is bounded both ways, whatever the file says: a hostile one may be anything. A byte that was
changed is found wherever it is (gzip and zstandard vouch for content only, so their headers are
fixed and compared); so is a file that ends too early, or too late.

pyrage (age in Rust) pulls from a reader and pushes to a writer, so it has a thread and a pipe.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import zstandard

from llm_orchestrator.errors import ConfigError, StoreDamaged, WrongKey

if TYPE_CHECKING:
    from types import ModuleType

GZIP = "gzip"
ZSTANDARD = "zstd"
COMPRESSIONS = (GZIP, ZSTANDARD)
_GZIP_LEVEL = 4
_ZSTD_LEVEL = 3
_WINDOW_LOG = 21
_GZIP_HEAD = bytes.fromhex("1f8b08000000000000ff")
"""No name, no time, no system: nothing that could be changed unseen."""
_ZSTD_HEAD = bytes.fromhex("28b52ffd0458")
"""One frame, with a checksum, of unknown size, with a window of 2**_WINDOW_LOG bytes."""
_AGE_HEAD = b"age-encryption.org/v1\n"
_PIECE_BYTES = 64 * 1024
_ZSTD_PIECE_BYTES = 2 * 1024
"""Four bytes can stand for 128 KiB: this bounds what one piece becomes."""


class Sink(Protocol):
    """Takes bytes."""

    def write(self, data: bytes, /) -> object: ...


# -- keys -----------------------------------------------------------------------------------------


def _pyrage() -> ModuleType:
    """An extra: only who seals needs it."""
    try:
        return importlib.import_module("pyrage")
    except ImportError as error:
        raise ConfigError(
            "sealed backups need pyrage", hint="pip install 'llm-orchestrator[age]'"
        ) from error


def read_recipients(texts: Sequence[str]) -> list[Any]:
    """Public keys (age1..., ssh-ed25519 ..., ssh-rsa ...), one a line; `#` begins a comment.

    Raises ConfigError, which says the line: a public key is no secret.
    """
    pyrage = _pyrage() if texts else None
    found: list[Any] = []
    for line in (line.strip() for text in texts for line in text.splitlines()):
        if not line or line.startswith("#") or pyrage is None:
            continue
        kind = pyrage.ssh if line.startswith("ssh-") else pyrage.x25519
        try:
            found.append(kind.Recipient.from_str(line))
        except Exception as error:
            raise ConfigError(
                f"{line!r} is no public key of age", hint="age-keygen -y KEYFILE prints it"
            ) from error
    if texts and not found:
        raise ConfigError("backup_recipients names no public key", hint="age-keygen -y KEYFILE")
    return found


def read_keys(text: str) -> list[Any]:
    """Private keys: the content of a key file of age, or of ssh. Raises ConfigError, without it."""
    if not text.strip():
        return []
    pyrage = _pyrage()
    try:
        if "PRIVATE KEY" in text:
            return [pyrage.ssh.Identity.from_buffer(text.encode())]
        lines = [line.strip() for line in text.splitlines()]
        wanted = [line for line in lines if line and not line.startswith("#")]
        return [pyrage.x25519.Identity.from_str(line) for line in wanted]
    except Exception:  # noqa: BLE001 (its message may hold the key)
        raise ConfigError(
            "backup_identity holds no private key of age", hint="age-keygen -o KEYFILE makes one"
        ) from None


# -- writing --------------------------------------------------------------------------------------


class Deflater:
    """Compresses what is written into `out`. `finish` must be called; it does not close `out`."""

    def __init__(self, out: Sink, compression: str) -> None:
        self._out = out
        self._is_begun = compression != GZIP
        if compression == GZIP:
            self._work: Any = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31)
        else:
            parameters = zstandard.ZstdCompressionParameters.from_level(
                _ZSTD_LEVEL, window_log=_WINDOW_LOG, write_checksum=1, write_content_size=0
            )
            self._work = zstandard.ZstdCompressor(compression_params=parameters).compressobj()

    def write(self, data: bytes) -> None:
        """See Sink."""
        self._pass_on(self._work.compress(data))

    def finish(self) -> None:
        """Write what is left."""
        self._pass_on(self._work.flush())

    def _pass_on(self, data: bytes) -> None:
        if not data:
            return
        if not self._is_begun:  # zlib writes its header, of ten bytes, in one piece
            data, self._is_begun = _GZIP_HEAD + data[len(_GZIP_HEAD) :], True
        self._out.write(data)


class _Told:
    """A file as pyrage's thread sees it: what goes wrong with it is kept as it was."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
            return len(data)
        except OSError as error:
            self.error = error
            raise

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._file.read(size))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """The file is flushed by whoever opened it."""


class _Work:
    """pyrage in a thread; `error` is what it ended with."""

    def __init__(self, work: Callable[[], None], end: BinaryIO) -> None:
        self.error: BaseException | None = None
        self._work = work
        self._end = end
        self._thread = threading.Thread(target=self._run, name="age", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 (a thread's error belongs to its caller)
            self.error = error
        finally:
            with contextlib.suppress(OSError):
                self._end.close()

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join()


def _pipe() -> tuple[BinaryIO, BinaryIO]:
    out, into = os.pipe()
    return os.fdopen(out, "rb"), os.fdopen(into, "wb")


@contextlib.contextmanager
def sealing(file: Sink, recipients: Sequence[Any]) -> Iterator[Sink]:
    """Whatever is written is sealed for `recipients` and goes into `file`; without any, as it is.

    Raises OSError (as `file` did) at the latest at the end.
    """
    if not recipients:
        yield file
        return
    pyrage = _pyrage()
    out, into = _pipe()
    told = _Told(file)
    work = _Work(lambda: pyrage.encrypt_io(out, told, list(recipients)), out)
    is_whole = False
    try:
        with contextlib.suppress(BrokenPipeError):  # the thread has failed, and says so below
            yield into
            into.close()
            is_whole = True
    finally:
        with contextlib.suppress(OSError):
            into.close()
        work.join()
    error = told.error or work.error
    if error is not None or not is_whole:
        raise error or OSError("sealing ended too early")


# -- reading --------------------------------------------------------------------------------------


class Inflater:
    """Reads what a backup file holds. Raises StoreDamaged, naming the file and the place."""

    def __init__(self, file: BinaryIO | _Unsealed, name: str) -> None:
        self._file = file
        self._name = name
        self._ready = b""
        self._raw = 0
        self._piece_bytes = _PIECE_BYTES
        self._work: Any = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        while not self._ready and not self._has_ended:
            self._ready = self._next(size)
        data, self._ready = self._ready[:size], self._ready[size:]
        return data

    def read_exactly(self, size: int) -> bytes:
        """`size` bytes, of which there must be enough."""
        pieces, left = [], size
        while left:
            piece = self.read(left)
            if not piece:
                raise self.damaged("it ends too early")
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def finish(self) -> None:
        """There must be nothing left. Checks the compressor's own checksum."""
        if self.read(1):
            raise self.damaged("something follows its end")
        if self._work.unused_data or self._file.read(1):
            raise self.damaged("something follows its end")

    def damaged(self, what: str) -> StoreDamaged:
        """What to raise."""
        return StoreDamaged(
            f"{self._name} is damaged: {what} (at byte {self._raw} of what is stored)",
            hint="llmo backup list, and take another one",
        )

    @property
    def _has_ended(self) -> bool:
        return self._work is not None and bool(self._work.eof)

    def _next(self, size: int) -> bytes:
        if self._work is None:
            self._begin()
        waiting = getattr(self._work, "unconsumed_tail", b"")
        data = waiting or self._file.read(self._piece_bytes)
        self._raw += 0 if waiting else len(data)
        if not data:
            raise self.damaged("it ends too early")
        return self._inflate(data, max(size, _PIECE_BYTES))

    def _inflate(self, data: bytes, size_max: int) -> bytes:
        try:
            if self._piece_bytes == _PIECE_BYTES:
                return bytes(self._work.decompress(data, size_max))
            return bytes(self._work.decompress(data))
        except (zlib.error, zstandard.ZstdError) as error:
            raise self.damaged(str(error)) from error

    def _begin(self) -> None:
        """Find out how it is compressed, by its first bytes."""
        head = _fill(self._file, len(_GZIP_HEAD))
        self._raw = len(head)
        if head == _GZIP_HEAD:
            self._work = zlib.decompressobj(31)
        elif head.startswith(_ZSTD_HEAD):
            work = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
            self._work = work.decompressobj(write_size=_PIECE_BYTES)
            self._piece_bytes = _ZSTD_PIECE_BYTES
        elif not head:
            raise self.damaged("it is empty")
        else:
            raise StoreDamaged(
                f"{self._name} is no backup of this program, or its first bytes are damaged"
            )
        self._ready = self._inflate(head, _PIECE_BYTES)


def _fill(file: BinaryIO | _Unsealed, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := file.read(size - len(data))):
        data += piece
    return data


class _Unsealed:
    """The pipe from pyrage's thread; at its end it raises what the thread ended with."""

    def __init__(self, pipe: BinaryIO, work: _Work, explain: Callable[[], Exception]) -> None:
        self._pipe = pipe
        self._work = work
        self._explain = explain

    def read(self, size: int) -> bytes:
        data = self._pipe.read(size)
        if not data:
            self._work.join()
            if self._work.error is not None:
                raise self._explain() from self._work.error
        return data


@contextlib.contextmanager
def opened(file: BinaryIO, name: str, keys: Sequence[Any]) -> Iterator[Inflater]:
    """What is in a file, unsealed if it is sealed.

    Raises WrongKey, also when a key is needed and there is none; and StoreDamaged.
    """
    if not is_sealed(file):
        yield Inflater(file, name)
        return
    if not keys:
        raise WrongKey(
            f"{name} is sealed, and there is no key to open it",
            hint="set backup_identity to file:PATH of one of its recipients' keys",
        )
    pyrage = _pyrage()
    out, into = _pipe()
    told = _Told(file)

    def work() -> None:
        pyrage.decrypt_io(told, into, list(keys))
        into.flush()

    thread = _Work(work, into)

    def explain() -> Exception:
        if told.error is not None:
            return told.error
        if isinstance(thread.error, pyrage.DecryptError) and "matching" in str(thread.error):
            return WrongKey(
                f"no key that is here opens {name}: it is sealed for others,"
                " or its first lines are damaged",
                hint="set backup_identity to file:PATH of one of its recipients' keys",
            )
        return StoreDamaged(f"{name} is damaged: its seal is broken ({thread.error})")

    try:
        yield Inflater(_Unsealed(out, thread, explain), name)
    finally:
        out.close()  # a thread that still writes ends here
        thread.join()


def is_sealed(file: BinaryIO) -> bool:
    """True when a file is age's. It stands at its beginning again afterwards."""
    head = file.read(len(_AGE_HEAD))
    file.seek(0)
    return head == _AGE_HEAD
