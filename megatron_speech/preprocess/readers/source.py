"""Files by path or URL: local ones, and any that fsspec opens. `.gz` and `.zst` are decompressed on the way.

The rest of the package opens its input through this module and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import itertools
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, BinaryIO, cast

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers.compression import COMPRESSED, Inflated
from megatron_speech.preprocess.readers.recognise import HEAD_BYTES, other_spelling, recognised, why_missing
from megatron_speech.remote import check_protocol, is_url

BUFFER_BYTES = 1 << 20
_REMOTE_BLOCK_BYTES = 8 << 20  # of a remote file read at a time; what fsspec's cache holds of each open file

_BRACES = re.compile(r"\{([^{}]*)\}")
_REQUESTS = 32  # to servers, at a time

# Keys by which file systems identify a version of a remote file; the first that is present is used.
_VERSION_KEYS = ("ETag", "etag", "checksum", "md5Hash", "content_md5", "generation", "version_id", "LastModified",
                 "last_modified", "mtime", "updated", "created")  # fmt: skip


def local_path(path: str) -> str | None:
    """The path on this machine (`file://` taken off), or None if `path` lies elsewhere."""
    if not is_url(path):
        return path
    return path[len("file://") :] if path.lower().startswith("file://") else None


def folder(path: str) -> str:
    """What relative paths in the file `path` are relative to."""
    return _no_query(path).rpartition("/")[0] if is_url(path) else os.path.dirname(path)


def join(base: str, relative: str) -> str:
    """`relative` as seen from the folder `base`; a URL or an absolute path stays what it is."""
    if is_url(relative) or os.path.isabs(relative):
        return relative
    if not is_url(base):
        return os.path.join(base, relative)
    scheme, mark, rest = base.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host}/{posixpath.normpath(posixpath.join(path if slash else '', relative))}"


def stem(path: str) -> str:
    """The file's name without folder and known endings: `s3://b/train.jsonl.gz` is `train`."""
    name = posixpath.basename(_no_query(path)) if is_url(path) else os.path.basename(path)
    if name.endswith(".tgz"):
        return name[: -len(".tgz")]
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return os.path.splitext(name)[0].removesuffix(".offsets").removesuffix(".codes") or name


def ending_name(path: str) -> str:
    """The file's name in lower case, without query: what readers are chosen by."""
    return posixpath.basename(_no_query(path)).lower() if is_url(path) else os.path.basename(path).lower()


def is_compressed(path: str) -> bool:
    """Whether reading `path` decompresses it."""
    return ending_name(path).endswith((*COMPRESSED, ".tgz"))


def _no_query(path: str) -> str:
    return re.split(r"[?#]", path, maxsplit=1)[0] if path.lower().startswith(("http://", "https://")) else path


# ---- fsspec, and the errors of the many libraries behind it


def _protocol(url: str) -> str:
    return re.split(r"::|://", url, maxsplit=1)[0].lower()


@contextlib.contextmanager
def sentences(url: str) -> Iterator[None]:
    """Turn what goes wrong while `url` is opened or read into a sentence.

    Raises:
        InputError: in place of the error.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"input {url} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"input {url} is a folder; name its files") from error
    except PermissionError as error:
        remedy = "check the credentials of this machine" if local_path(url) is None else "give this user read access"
        raise InputError(f"input {url} may not be read (permission denied); {remedy}") from error
    except ImportError as error:
        raise InputError(
            f"input {url} needs a package that is not installed: {error}; install megatron-speech[remote]"
        ) from error
    except ConnectionError:
        raise
    except OSError as error:
        raise InputError(f"input {url} cannot be read: {error.strerror or error or type(error).__name__}") from error
    except Exception as error:
        # Each file system raises errors of its own (botocore, aiohttp, gcsfs); they have no common ancestor but this.
        if local_path(url) is not None:
            raise
        raise InputError(f"input {url} cannot be read: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=64)
def _file_system(root: str) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(root)[0]


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec file system, path on it) of a URL.

    Raises:
        InputError: an unknown protocol, or its package is not installed.
    """
    import fsspec

    protocol = _protocol(url)
    check_protocol(f"input {url}", protocol)
    with sentences(url):
        if "::" in url:  # a chain: every file is one of its own
            return fsspec.core.url_to_fs(url)
        scheme, mark, rest = url.partition("://")
        system = _file_system(scheme + mark + rest.partition("/")[0])
        return system, system._strip_protocol(url)


class _Remote(io.RawIOBase):
    """A remote file. A transfer that breaks off is a ConnectionError with a sentence."""

    def __init__(self, handle: IO[bytes], url: str) -> None:
        self._handle, self._url = handle, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._handle.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._handle.seek(offset, whence)

    def tell(self) -> int:
        return self._handle.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._handle.read(len(buffer))
        except ValueError as error:  # how fsspec says that a server has no range requests
            raise InputError(f"input {self._url} cannot be read in parts ({error}); copy it to a disk") from error
        except Exception as error:  # as in `sentences`, but nothing is wrong with the input: trying again may help
            raise ConnectionError(
                f"input {self._url} broke off: {type(error).__name__}: {error}; run the same command again"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()


def open_binary(
    path: str,
    offset: int = 0,
    *,
    decompress: bool = True,
    sequential: bool = False,
    buffer_bytes: int = BUFFER_BYTES,
) -> BinaryIO:
    """Open a local path or URL for reading bytes, from `offset` on (of the decompressed bytes).

    A local plain file is an ordinary file. Others are read in pieces, never as a whole. `sequential` promises that
    nothing will be sought, so that a web server without range requests will do.

    Raises:
        InputError: it does not exist, may not be read, or its protocol needs a package that is not there.
    """
    local = local_path(path)
    with sentences(path):
        if local is not None:
            raw: BinaryIO = open(local, "rb", buffering=buffer_bytes)
        else:
            system, name = file_system(path)
            one_go = sequential and offset == 0 and not _serves_ranges(path, system, name)
            handle = system.open(name, "rb", block_size=0 if one_go else _REMOTE_BLOCK_BYTES)
            raw = cast(BinaryIO, io.BufferedReader(_Remote(handle, path), BUFFER_BYTES))
        if not (decompress and is_compressed(path)):
            if offset:
                raw.seek(offset)
            return raw
    packed = cast(io.BufferedReader, raw)  # which both are
    plain = cast(BinaryIO, io.BufferedReader(Inflated(packed, path, ending_name(path)), BUFFER_BYTES))
    while offset > 0:
        skipped = len(plain.read(min(offset, BUFFER_BYTES)))
        if not skipped:
            raise InputError(f"input {path} ends before byte {offset:,} of its decompressed bytes")
        offset -= skipped
    return plain


def _serves_ranges(url: str, system: Any, name: str) -> bool:
    return _protocol(url) not in ("http", "https") or bool(system.info(name).get("partial"))


def head_of(path: str) -> bytes:
    """The first bytes of a file, decompressed; none where it cannot be read: whoever reads it next says why."""
    try:
        with open_binary(path, sequential=True, buffer_bytes=HEAD_BYTES) as handle:
            return handle.read(HEAD_BYTES)
    except (InputError, ConnectionError):
        return b""


def what_is(path: str) -> str | None:
    """What a file is that could not be read as what its name says: see :func:`recognised`."""
    return recognised(head_of(path))


def read_range(path: str, begin: int, end: int) -> bytes:
    """Bytes `begin` to `end` of a file that is not compressed.

    Raises:
        InputError: the file is shorter, or cannot be read.
    """
    with open_binary(path, begin, decompress=False) as handle, sentences(path):
        data = handle.read(end - begin)
    if len(data) != end - begin:
        raise InputError(f"input {path} ends at byte {begin + len(data):,}, needed {end:,}; it is cut off")
    return data


def size_bytes(path: str) -> int | None:
    """Size of the file as it is stored; None where a server does not say."""
    with sentences(path):
        local = local_path(path)
        if local is not None:
            return os.stat(local).st_size
        system, name = file_system(path)
        size = system.info(name).get("size")
        return None if size is None else int(size)


def exists(path: str) -> bool:
    """Whether there is such a file or folder."""
    local = local_path(path)
    if local is not None:
        return os.path.exists(local)
    with sentences(path):
        system, name = file_system(path)
        return bool(system.exists(name))


def is_folder(path: str) -> bool:
    """Whether `path` is a folder; a URL is one if its file system says so."""
    local = local_path(path)
    if local is not None:
        return os.path.isdir(local)
    if _protocol(path) in ("http", "https"):  # every page could be one; none is
        return False
    with sentences(path):
        system, name = file_system(path)
        return bool(system.isdir(name))


def list_folder(path: str) -> list[str]:
    """Names of the files in a folder, sorted."""
    local = local_path(path)
    with sentences(path):
        if local is not None:
            return sorted(os.listdir(local))
        system, name = file_system(path)
        return sorted(posixpath.basename(entry.rstrip("/")) for entry in system.ls(name, detail=False))


def fingerprint(path: str) -> dict[str, Any]:
    """Identifies a version of a file without reading it: path, bytes, and mtime_ns or version.

    Raises:
        InputError: there is no such file.
    """
    local = local_path(path)
    with sentences(path):
        if local is not None:
            status = os.stat(local)
            return {"path": path, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        system, name = file_system(path)
        entry = system.info(name)
        version = next((str(entry[key]) for key in _VERSION_KEYS if entry.get(key) is not None), None)
        return {"path": path, "bytes": entry.get("size"), "version": version}


# ---- many files


def fingerprints(paths: Sequence[str]) -> list[dict[str, Any]]:
    """:func:`fingerprint` of each; several requests to servers at a time."""
    if all(local_path(path) is not None for path in paths):
        return [fingerprint(path) for path in paths]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(fingerprint, paths))


def expand(pattern: str) -> list[str]:
    """The files that a path, a glob (`*.tar`) or a brace range (`shard-{000..099}.tar`, `{a,b}`) names.

    Braces name every file: each must exist. A glob names those that are there, in the order of their names.

    Raises:
        InputError: nothing fits, or files of a range are missing.
    """
    local = local_path(pattern)
    if local is not None and os.path.exists(local):  # whatever signs its name holds
        return [pattern]
    names = list(_expand_braces(pattern))
    found: list[str] = []
    plain: list[str] = []
    for name in names:
        if any(sign in (name if local is not None else _no_query(name)) for sign in "*["):
            matches = _glob(name)
            if not matches:
                raise InputError(f"input {name} fits no file; check the pattern")
            found += matches
        else:
            found.append(name)
            plain.append(name)
    missing = _missing(plain) if len(names) > 1 or local is not None else []
    if missing and len(names) > 1:
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"input {pattern} names {len(names):,} files, of which {len(missing):,} are missing ({some}); "
            "restore them, or name the range that is there"
        )
    if missing:
        spelled = other_spelling(missing[0])
        if spelled is not None:
            return [spelled]
        raise InputError(f"input {missing[0]} does not exist; check the path{why_missing(missing[0])}")
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    parts: Sequence[str]
    if span:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise InputError(f"input {pattern}: the range {match[0]} ends before it begins")
        width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        parts = [f"{i:0{width}d}" for i in range(first, last + 1)]
    elif "," in match[1]:
        parts = match[1].split(",")
    else:
        raise InputError(f"input {pattern}: {match[0]} is no range; needed something like {{000..099}} or {{a,b}}")
    for part in parts:
        yield from _expand_braces(pattern[: match.start()] + part + pattern[match.end() :])


def _glob(pattern: str) -> list[str]:
    local = local_path(pattern)
    with sentences(pattern):
        if local is not None:
            return sorted(glob.glob(local, recursive=True))
        system, name = file_system(pattern)
        return sorted(str(system.unstrip_protocol(path)) for path in system.glob(name))


def _missing(paths: Sequence[str]) -> list[str]:
    if all(local_path(path) is not None for path in paths):
        return [path for path in paths if not exists(path)]
    # One request per file: in parallel, since a range of ten thousand shards is common.
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(itertools.compress(paths, [not there for there in pool.map(exists, paths)]))
