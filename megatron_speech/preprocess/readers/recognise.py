"""What a file is that is not what its name says, or a name that does not name a file: in words, with the remedy."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable

from megatron_speech.remote import is_url

# How many first bytes of a file :func:`recognised` looks at.
HEAD_BYTES = 4096

# A git-lfs pointer is a text of some 130 bytes (github.com/git-lfs/git-lfs, docs/spec.md).
_LFS = b"version https://git-lfs.github.com/spec/"

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_WINDOWS_DRIVE = re.compile(r"(?:^|/)[A-Za-z]:[\\/]")


def recognised(head: bytes) -> str | None:
    """What a file that begins with `head` is, and what to do; None if it is nothing that is known here.

    Known are formats that stand where arrays, rows or recordings were expected: a git-lfs pointer, UTF-16, a zip
    archive (`.npz`, torch's `.pt`), a pickle, a web page.
    """
    if head.startswith(_LFS):
        return "it is a git-lfs pointer, the file itself was not downloaded: run `git lfs pull` in its repository"
    if head.startswith(b"PK\x03\x04"):
        return (
            "it is a zip archive, as .npz and torch's .pt are: write its array by itself, "
            "numpy.save('X.npy', numpy.load('X.npz')['codes']) or numpy.save('X.npy', torch.load('X.pt').numpy())"
        )
    if re.match(rb"\x80[\x02-\x05]", head):
        return "it is a Python pickle, which is not read since it can run code: write its array with numpy.save"
    encoding = utf16(head)
    if encoding is not None:
        return f"it is {encoding}: convert it, iconv -f {encoding} -t UTF-8 X > Y"
    if re.match(rb"\s*<(!doctype html|html)", head, re.IGNORECASE):
        return "it is a web page, as a server sends in place of a file that it does not hand out: download it again"
    return None


def utf16(head: bytes) -> str | None:
    """Which UTF-16 a text file begins as, if any: with its byte-order mark, or with every other byte a zero."""
    if head.startswith(_UTF16):
        return "UTF-16"
    part = head[:64]
    if len(part) < 8 or not any(part):
        return None
    return "UTF-16LE" if not any(part[1::2]) else "UTF-16BE" if not any(part[0::2]) else None


def other_spelling(path: str) -> str | None:
    """The file that `path` names in another Unicode normalisation (NFC, NFD); None where there is none.

    macOS writes names decomposed (`e` and an accent), most lists hold them composed. Both are one name by Unicode.
    """
    if path.isascii():
        return None
    for spelling in (unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
        if spelling != path and os.path.exists(spelling):
            return spelling
    found = "/" if path.startswith("/") else ""
    for part in filter(None, path.split("/")):
        spellings = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        there = next((name for name in spellings if os.path.exists(os.path.join(found, name))), None)
        if there is None:
            return None
        found = os.path.join(found, there)
    return found


def base_of(folder: str, paths: Iterable[str]) -> str:
    """What has to stand before relative paths of a list in `folder` whose tools resolve them by the working directory.

    Nothing, where the first of them lies beside the list or nowhere; else the working directory.
    """
    relative = next((path for path in paths if not os.path.isabs(path) and not is_url(path)), None)
    if relative is None or is_url(folder) or os.path.exists(os.path.join(folder, relative)):
        return ""
    return os.path.join(os.getcwd(), "") if os.path.exists(relative) else ""


def why_missing(path: str) -> str:
    """What may be wrong with a local path that does not exist, as the end of a sentence; empty if nothing is seen."""
    if _WINDOWS_DRIVE.search(path):
        return "; it is a path of Windows: write it relative to the list, with / (or as this machine mounts the drive)"
    if "\\" in path:
        slashes = path.replace("\\", "/")
        there = f"; {slashes} does" if os.path.exists(slashes) else ""
        return f"{there}; write / in place of \\"
    if os.path.basename(path) != os.path.basename(path).strip():
        return "; its name begins or ends with a blank"
    return ""
