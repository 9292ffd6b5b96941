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


class Source(Protocol):
    """Gives bytes: up to `size`, none at its end."""

    def read(self, size: int, /) -> bytes: ...


class _EndsEarlyError(Exception):
    """There is no more, and there should be."""


class _FollowedError(Exception):
    """There is more, and there should not be."""


class Inflater:
    """Reads what a backup file holds. Raises StoreDamaged, naming the file and the place."""

    def __init__(self, file: Source, name: str) -> None:
        self._file = _Counted(file)
        self._name = name
        self._work: _Gzip | _Zstandard | None = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        work = self._work or self._begin()
        try:
            return work.read(size)
        except _EndsEarlyError as error:
            raise self.damaged("it ends too early") from error
        except (zlib.error, zstandard.ZstdError) as error:
            raise self.damaged(str(error)) from error

    def read_exactly(self, size: int) -> bytes:
        """`size` bytes, of which there must be enough."""
        pieces, left = [], size
        while left:
            piece = self.read(min(left, _PIECE_BYTES))
            if not piece:
                raise self.damaged("it ends too early")
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def finish(self) -> None:
        """There must be nothing left. Checks the compressor's own checksum."""
        work = self._work or self._begin()
        try:
            work.finish()
        except _EndsEarlyError as error:
            raise self.damaged("it ends too early") from error
        except (_FollowedError, zlib.error, zstandard.ZstdError) as error:
            raise self.damaged(str(error) or "something follows its end") from error

    def damaged(self, what: str) -> StoreDamaged:
        """What to raise."""
        return StoreDamaged(
            f"{self._name} is damaged: {what} (at byte {self._file.count} of what is stored)",
            hint="llmo backup list, and take another one",
        )

    def _begin(self) -> _Gzip | _Zstandard:
        """Find out how it is compressed, by its first bytes."""
        head = b""
        while len(head) < len(_GZIP_HEAD) and (
            more := self._file.read(len(_GZIP_HEAD) - len(head))
        ):
            head += more
        if head == _GZIP_HEAD:
            self._work = _Gzip(self._file, head)
        elif head.startswith(_ZSTD_HEAD):
            self._work = _Zstandard(self._file, head)
        elif not head:
            raise self.damaged("it is empty")
        else:
            raise StoreDamaged(
                f"{self._name} is no backup of this program, or its first bytes are damaged"
            )
        return self._work


class _Counted:
    def __init__(self, file: Source) -> None:
        self._file = file
        self.count = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.count += len(data)
        return data


class _Gzip:
    """One member, to its end."""

    def __init__(self, file: Source, head: bytes) -> None:
        self._file = file
        self._waiting = head
        self._work = zlib.decompressobj(31)

    def read(self, size: int) -> bytes:
        while not self._work.eof:
            data = self._waiting or self._file.read(_PIECE_BYTES)
            if not data:
                raise _EndsEarlyError
            found = self._work.decompress(data, size)
            self._waiting = self._work.unconsumed_tail
            if found:
                return found
        return b""

    def finish(self) -> None:
        if self.read(1) or self._work.unused_data or self._file.read(1):
            raise _FollowedError


class _Zstandard:
    """One frame, to its end.

    The library does not tell a stream that ends too early from one that has ended. So a frame of
    ours is put behind it: only after a whole one it is understood, and it must come at once.
    """

    _LAST = b"the end of what is stored"

    def __init__(self, file: Source, head: bytes) -> None:
        end = zstandard.ZstdCompressor(write_checksum=True).compress(self._LAST)
        work = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
        chained: Any = _Chained(head, file, end)  # all that is asked of it is `read`
        self._work = work.stream_reader(chained, read_size=_PIECE_BYTES, read_across_frames=True)

    def read(self, size: int) -> bytes:
        data = bytes(self._work.read(size))
        if not data:
            raise _EndsEarlyError
        return data

    def finish(self) -> None:
        last = b""
        while more := self._work.read(len(self._LAST) + 1 - len(last)):
            last += more
        if len(last) > len(self._LAST) or not self._LAST.startswith(last):
            raise _FollowedError
        if last != self._LAST:
            raise _EndsEarlyError


class _Chained:
    """Bytes, then a file, then bytes."""

    def __init__(self, head: bytes, file: Source, end: bytes) -> None:
        self._head = head
        self._file = file
        self._end = end

    def read(self, size: int) -> bytes:
        if self._head:
            data, self._head = self._head, b""
            return data
        data = self._file.read(size)
        if not data:
            data, self._end = self._end, b""
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
