"""Safetensors files byte by byte: 8 bytes for the header's length, the header in JSON, the tensors.

For what the library does not show (where a tensor's bytes lie) or refuses to write (a wrong header).
"""

import json
from collections.abc import Callable
from pathlib import Path


def read_header(path: Path) -> tuple[dict, int]:
    """(header with its `__metadata__`, offset in the file at which the tensors' bytes begin), on trust."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def take_apart(path: Path) -> tuple[dict, bytes]:
    """(header, the tensors' bytes), on trust."""
    header, start = read_header(path)
    return header, path.read_bytes()[start:]


def put_together(path: Path, header: dict | bytes, data: bytes = b"") -> None:
    """Write a file; the header may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(path: Path, edit: Callable[[dict], object]) -> None:
    """Change the header of a file and leave the tensors' bytes as they are."""
    header, data = take_apart(path)
    edit(header)
    put_together(path, header, data)
