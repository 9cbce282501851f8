"""The header of a safetensors file, checked before anything in it is believed.

A safetensors file is 8 bytes of header length (little endian), that many bytes of JSON, then the tensors'
bytes without holes or overlaps: https://github.com/huggingface/safetensors#format

The safetensors library was looked at. `safe_open` tells names, dtypes and shapes, but not where a tensor's
bytes are, which streaming needs; it maps the whole file; and no
writer of it takes a tensor piece by piece.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint.untrusted import is_text, open_regular, parse_json, printable, why

ITEM_SIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes per element of the dtypes whose shape and size can be checked against each other."""

_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_RANK = 8
_MAX_NAME = 500
_MAX_ELEMENTS = 2**62


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a shard, as its header describes it.

    Attributes:
        name: full name.
        dtype: safetensors' name of the dtype, such as "BF16".
        shape: dimensions.
        start: offset of its first byte in the file.
        nbytes: length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: the file; may be a symlink into a hub cache.
        tensors: in the order of their bytes.
        metadata: the header's `__metadata__`, or None.
        size: bytes of the whole file.
        mtime_ns: its modification time.
        header_sha256: digest of the header's bytes; with size and mtime_ns the file's identity.
    """

    path: Path
    tensors: tuple[Tensor, ...]
    metadata: dict[str, str] | None
    size: int
    mtime_ns: int
    header_sha256: str

    @property
    def name(self) -> str:
        return self.path.name


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file.

    Raises:
        Fp8Error: truncated, not safetensors, or a header that does not describe the file exactly.
    """
    shown = printable(path)
    with open_regular(path) as file:
        try:
            status = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if status.st_size < 8 or length > status.st_size - 8 or not 2 <= length <= _MAX_HEADER:
                raise Fp8Error(
                    f"{shown}: truncated or not a safetensors file "
                    f"(header of {length} bytes in a file of {status.st_size}); download it again"
                )
            raw = file.read(length)
        except OSError as error:
            raise Fp8Error(f"{shown}: cannot be read ({why(error)})") from None
    header = parse_json(raw, shown)
    if not isinstance(header, dict):
        raise Fp8Error(f"{shown}: its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(map(is_text, (*metadata, *metadata.values())))
    ):
        raise Fp8Error(f"{shown}: its __metadata__ is not a map of strings")
    data_start = 8 + length
    tensors = sorted(
        (_tensor(name, entry, data_start, shown) for name, entry in header.items()),
        key=lambda t: (t.start, t.nbytes),
    )
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise Fp8Error(f"{shown}: {printable(tensor.name)} overlaps its neighbour or leaves a hole")
        end = tensor.start + tensor.nbytes
    if end != status.st_size:
        raise Fp8Error(f"{shown}: {status.st_size} bytes where its header describes {end}; download it again")
    digest = hashlib.sha256(raw).hexdigest()
    return Shard(path, tuple(tensors), metadata, status.st_size, status.st_mtime_ns, digest)


def _tensor(name: str, entry: object, data_start: int, shown: str) -> Tensor:
    def bad(why: str) -> Fp8Error:
        return Fp8Error(f"{shown}: tensor {printable(name)}: {why}")

    def naturals(value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) <= _MAX_RANK
            and all(type(v) is int and 0 <= v < _MAX_ELEMENTS for v in value)
        )

    if not 0 < len(name) <= _MAX_NAME or not name.isprintable() or "/" in name or ".." in name:
        raise bad("not a tensor name")
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise bad("its header entry has no dtype")
    dtype, shape, offsets = entry["dtype"], entry.get("shape"), entry.get("data_offsets")
    if not naturals(shape) or not naturals(offsets) or len(offsets) != 2:
        raise bad("its header entry has no valid shape and data_offsets")
    if dtype not in ITEM_SIZE:
        raise bad(f"dtype {printable(dtype)!r} is unknown; BF16, F16 and F32 can be quantized")
    nbytes = offsets[1] - offsets[0]
    if nbytes < 0:
        raise bad("its data ends before it begins")
    # A dimension of 0 makes the product 0, whatever the others are; other readers overflow on the way.
    if math.prod(max(v, 1) for v in shape) >= _MAX_ELEMENTS:
        raise bad(f"shape {shape} is larger than any file")
    if math.prod(shape) * ITEM_SIZE[dtype] != nbytes:
        raise bad(f"{nbytes} bytes do not hold {dtype} {shape}")
    return Tensor(name, dtype, tuple(shape), data_start + offsets[0], nbytes)
