"""Names and files that may lie: shown without harm, opened only inside the directory, parsed within bounds.

`json` alone would take duplicate keys, NaN and nesting without end; `pathlib` follows any link. A checkpoint
is a download, so each of these is refused with the file's name before anything is made of its contents.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import BinaryIO

from fp8lib import Fp8Error

_MAX_JSON = 100_000_000
MAX_TENSORS = 250_000
"""In a checkpoint; the FP8 release of 397B-A17B has 186,000."""
_MAX_VALUES = 10 * MAX_TENSORS
"""Objects, lists and their members in a JSON file: a header has 8 for a matrix. Bounds time and memory."""


def printable(name: object) -> str:
    """A name from a file, fit for a terminal: control characters escaped, a long one cut in its middle."""
    text = str(name)
    if len(text) > 300:  # a path says most at its end
        text = f"{text[:100]}...{text[-197:]}"
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def resolve_inside(root: Path, name: str) -> Path:
    """Path of a regular file of the directory, refusing names and symlinks that lead out of it.

    The snapshot of a hub cache is the exception: its files are symlinks to `../../blobs/`.

    Raises:
        Fp8Error: not a plain name, outside, missing, or not a regular file.
    """
    shown = printable(root / printable(name))
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or os.path.isabs(name) or ".." in parts:
        raise Fp8Error(f"{shown}: not a name inside the directory; repair the index")
    path = root / name
    try:
        mode = path.stat().st_mode
        target = path.resolve()
        home = root.resolve()
        allowed = [home]
        if home.parent.name == "snapshots":
            allowed.append((home.parent.parent / "blobs").resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise Fp8Error(f"{shown}: cannot be opened ({why(error)}); complete the download") from None
    if not any(target.is_relative_to(place) for place in allowed):
        raise Fp8Error(
            f"{shown}: a link to {printable(target)}, outside the directory; put the file itself there"
        )
    if not stat.S_ISREG(mode):
        raise Fp8Error(f"{shown}: not a regular file; put the file itself there")
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, and never wait: a FIFO would make that last until somebody writes to it.

    Raises:
        Fp8Error: not a regular file, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise Fp8Error(f"{printable(path)}: cannot be read ({why(error)})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Fp8Error(f"{printable(path)}: not a regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path, limit: int = _MAX_JSON) -> object:
    """Parse a JSON file, refusing what no checkpoint holds: huge, too deep, duplicate keys, NaN.

    Raises:
        Fp8Error: unreadable or any of these.
    """
    shown = printable(path)
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise Fp8Error(f"{shown}: {size} bytes, far more than such a file has")
            data = file.read(limit + 1)
        except OSError as error:
            raise Fp8Error(f"{shown}: cannot be read ({why(error)})") from None
    return parse_json(data, shown)


def parse_json(data: bytes, shown: str) -> object:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise ValueError(f"{printable(twice)!r} appears twice")
        return result

    def finite(text: str) -> float:
        if math.isfinite(value := float(text)):
            return value
        raise ValueError(f"{printable(text)} is not a number of JSON")

    # Counted before anything is made of them, so that a small file cannot become gigabytes of objects.
    if sum(data.count(mark) for mark in (b"{", b"[", b",")) > _MAX_VALUES:
        raise Fp8Error(f"{shown}: holds far more than any checkpoint does (over {_MAX_VALUES:,} values)")
    try:
        text = data.decode("utf-8")  # json would take UTF-16 as well, which no loader does
        return json.loads(text, object_pairs_hook=no_duplicates, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise Fp8Error(f"{shown}: not valid (nested too deeply)") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Fp8Error(f"{shown}: not valid JSON ({printable(error)})") from None


def why(error: Exception) -> str:
    return getattr(error, "strerror", None) or printable(error)


def is_text(value: object) -> bool:
    """A string that UTF-8 can hold: JSON's escapes also spell halves of surrogate pairs."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
