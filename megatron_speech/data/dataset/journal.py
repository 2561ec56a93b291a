"""Files that grow, and a journal of how far they are complete: killed work resumes from it.

The order on disk makes it safe: first the data is synced, then a journal that vouches for it replaces the one before.
Bytes beyond the recorded size were written after that and are cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megatron_speech.data.dataset.manifest import FileEntry
from megatron_speech.errors import OutputError
from megatron_speech.files import canonical_json, sha256_hex, write_json

JOURNAL = "journal.json"
COMMIT_SECONDS = 10.0  # of work that a kill may cost

_READ_BYTES = 4 << 20
_SHOWN = 60


class JournalError(ValueError):
    """What the journal records is missing: the work cannot be resumed, and starts over."""


def output_error(path: Path, error: OSError) -> OutputError:
    """The sentence for a write that failed."""
    return OutputError(f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}")


class AppendFile:
    """A file that is only appended to, hashed as it grows. Usable as a pyarrow sink.

    Args:
        path: the file; what is there is replaced, or cut back to `kept`.
        kept: size and hash that a journal vouches for.

    Raises:
        JournalError: the file is missing, shorter than `kept`, or has other bytes.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path, kept: FileEntry | None = None) -> None:
        self.path = path
        self.size_bytes = 0
        self._digest = hashlib.sha256()
        try:
            self._handle: IO[bytes] = open(path, "wb" if kept is None else "r+b", buffering=1 << 20)
        except FileNotFoundError as error:
            raise JournalError(f"{path.name} is missing") from error
        except OSError as error:
            raise output_error(path, error) from error
        if kept is not None:
            try:
                self._keep(kept)
            except BaseException:
                self._handle.close()
                raise

    def _keep(self, kept: FileEntry) -> None:
        while self.size_bytes < kept.bytes:
            chunk = self._handle.read(min(_READ_BYTES, kept.bytes - self.size_bytes))
            if not chunk:
                raise JournalError(f"{self.path.name} holds {self.size_bytes:,} bytes, not {kept.bytes:,}")
            self._digest.update(chunk)
            self.size_bytes += len(chunk)
        if self._digest.hexdigest() != kept.sha256:
            raise JournalError(f"{self.path.name} is damaged")
        self._handle.seek(kept.bytes)
        self._handle.truncate()

    def write(self, data: Any) -> int:
        """Append bytes, or anything that has them."""
        view = memoryview(data).cast("B")
        try:
            self._handle.write(view)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._digest.update(view)
        self.size_bytes += view.nbytes
        return view.nbytes

    def sync(self) -> FileEntry:
        """Bring everything to the disk; returns what a journal may vouch for."""
        try:
            self._handle.flush()
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise output_error(self.path, error) from error
        return self.entry

    @property
    def entry(self) -> FileEntry:
        """Size and hash of what was written so far."""
        return FileEntry(bytes=self.size_bytes, sha256=self._digest.hexdigest())

    def tell(self) -> int:
        """Bytes so far."""
        return self.size_bytes

    def flush(self) -> None:
        """Nothing: :meth:`sync` is what counts."""

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._handle.closed

    def close(self) -> None:
        """Close the file, and bring to it what is still in memory.

        Raises:
            OutputError: that failed.
        """
        try:
            self._handle.close()
        except OSError as error:
            raise output_error(self.path, error) from error

    def abandon(self) -> None:
        """Close the file and drop what is still in memory: no journal records it."""
        with suppress(OSError):  # a full disk, most likely: that is why it is abandoned
            self._handle.close()


class Commits:
    """When the next journal entry is due."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether `COMMIT_SECONDS` went by since the last one."""
        return time.monotonic() - self._last >= COMMIT_SECONDS

    def done(self) -> None:
        """One was written now."""
        self._last = time.monotonic()


def write_journal(folder: Path, value: Mapping[str, Any]) -> None:
    """Replace the journal of `folder`. The data that it vouches for must be synced already.

    Raises:
        OutputError: it cannot be written.
    """
    content = dict(value)
    try:
        write_json(folder / JOURNAL, {**content, "sha256": sha256_hex(canonical_json(content))}, indent=None)
    except OSError as error:
        raise output_error(folder / JOURNAL, error) from error


def read_journal(folder: Path) -> dict[str, Any] | None:
    """The journal of `folder`; None if there is none.

    Raises:
        JournalError: it is damaged.
    """
    try:
        value = json.loads((folder / JOURNAL).read_bytes())
        stated = value.pop("sha256")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise JournalError("its journal is damaged") from error
    if sha256_hex(canonical_json(value)) != stated:
        raise JournalError("its journal is damaged")
    return value


def plain_json(value: Any) -> Any:
    """`value` as it comes back from a journal: tuples are lists, keys are text."""
    return json.loads(canonical_json(value))


def difference(saved: Any, wanted: Any, name: str = "") -> str | None:
    """The first field in which two fingerprints differ, as a clause of a sentence; None if they are equal."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in saved if key not in wanted)]:
            found = difference(saved.get(key), wanted.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    return None if saved == wanted else f"{name} was {_short(saved)} and is {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
