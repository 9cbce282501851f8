"""`SHA256SUMS`: the digests of every file of a directory but itself, as `sha256sum -c` reads them."""

import hashlib
import os
import re
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint.untrusted import is_text, open_regular, printable, why
from fp8lib.job.output_dir import CHECKSUMS, LOCK
from fp8lib.streaming.writer import refusing_disk_errors, write_file

_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_LARGEST = 100_000_000


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in bounded memory.

    Raises:
        Fp8Error: it cannot be read.
    """
    with open_regular(path) as file, refusing_disk_errors(path):
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, known: dict[str, str]) -> None:
    """Write the digests of every file of a directory, in folders that are not hidden.

    Args:
        folder: the directory.
        known: digests that need not be taken, by relative path; of files that are about to be written, too.

    Raises:
        Fp8Error: a file cannot be read, or the list not written.
    """
    digests = {name: known[name] if name in known else file_digest(folder / name) for name in _files(folder)}
    lines = (_line(name, digest) for name, digest in sorted((digests | known).items()))
    write_file(folder / CHECKSUMS, "".join(lines).encode())


def read(folder: Path) -> dict[str, str]:
    """Relative path -> digest.

    Raises:
        Fp8Error: it cannot be read, or a line is not one of `sha256sum`'s.
    """
    path, found = folder / CHECKSUMS, {}
    with open_regular(path) as file, refusing_disk_errors(path):
        data = file.read(_LARGEST)
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise Fp8Error(f"{printable(path)}: damaged ({why(error)})") from None
    for number, line in enumerate(lines[:-1], 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise Fp8Error(f"{printable(path)}: line {number} is no line of sha256sum; the file is damaged")
        name = match[3]
        if match[1]:
            for plain, escaped in reversed(_ESCAPES.items()):
                name = name.replace(escaped, plain)
        if name in found:
            raise Fp8Error(f"{printable(path)}: names {printable(name)} twice; the file is damaged")
        found[name] = match[2]
    if lines[-1]:
        raise Fp8Error(f"{printable(path)}: ends inside a line; the file is damaged")
    return found


def _line(name: str, digest: str) -> str:
    """One line; `sha256sum` marks a name with escapes by a backslash before the digest."""
    escaped = "".join(_ESCAPES.get(character, character) for character in name)
    mark = "" if escaped == name else "\\"
    return f"{mark}{digest}  {escaped}\n"


def _files(folder: Path) -> list[str]:
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            relative = (Path(place) / name).relative_to(folder).as_posix()
            if relative not in (CHECKSUMS, LOCK) and not name.endswith(".partial"):
                if not is_text(relative):
                    raise Fp8Error(f"{printable(folder / relative)}: its name is not UTF-8; rename it")
                found.append(relative)
    return found
