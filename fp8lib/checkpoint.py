"""Opens a checkpoint directory: shards, their headers, config.json, and the files to copy along.

Reads headers only, checks everything it reads, and follows no name out of the directory. A safetensors
file is 8 bytes of header length (little endian), that many bytes of JSON, then the tensors' bytes without
holes or overlaps: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fp8lib import Fp8Error
from fp8lib.rules import SUPPORTED_MODEL_TYPES

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

ITEM_SIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes per element of the dtypes whose shape and size can be checked against each other."""

_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_JSON = 100_000_000
_MAX_CONFIG = 10_000_000
_MAX_DEPTH = 100
"""Levels of nesting in config.json, the one document that is written again."""
_MAX_TENSORS = 250_000
"""In a checkpoint; the FP8 release of 397B-A17B has 186,000."""
_MAX_VALUES = 10 * _MAX_TENSORS
"""Objects, lists and their members in a JSON file: a header has 8 for a matrix. Bounds time and memory."""
_MAX_RANK = 8
_MAX_NAME = 500
_MAX_ELEMENTS = 2**62
_SHARD_NUMBER = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")

_NOT_COPIED_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json",
)  # fmt: skip
_WRITTEN_ANEW = ("config.json", "fp8_quantization.json", "SHA256SUMS")
_NOT_COPIED_FILES = re.compile(
    r"(?:\..*|(?:optimizer|scheduler|rng_state|random_states|trainer_state|training_args|zero_to_fp32)"
    r"(?:_\d+)?\b.*|latest)$"
)
_NOT_COPIED_FOLDERS = re.compile(r"(?:checkpoint-.*|global_step.*|optimizer_\d+|__pycache__|\..*)$")


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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory, checked.

    Attributes:
        root: the directory.
        config: config.json.
        shards: in the order of their names.
        extra_files: paths relative to root of the files that are copied byte for byte.
        unused: names of safetensors files that the index does not mention.
    """

    root: Path
    config: dict
    shards: tuple[Shard, ...]
    extra_files: tuple[Path, ...]
    unused: tuple[str, ...]


def printable(name: object) -> str:
    """A name from a file, fit for a terminal: control characters escaped, a long one cut in its middle."""
    text = str(name)
    if len(text) > 300:  # a path says most at its end
        text = f"{text[:100]}...{text[-197:]}"
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def open_checkpoint(root: Path) -> Checkpoint:
    """Open a directory for reading.

    Raises:
        Fp8Error: it is not a complete checkpoint of a supported model type; says which file and why.
    """
    if not root.is_dir():
        raise Fp8Error(f"{printable(root)}: no such directory; check the path")
    config = _read_config(root)
    names, weight_map = _shard_names(root)
    shards = _read_shards(root, names)
    _check_tensors(shards, weight_map)
    unused = sorted(set(_present(root)) - set(names))
    return Checkpoint(root, config, shards, tuple(_extra_files(root)), tuple(unused))


def require_supported(config: dict, root: Path) -> None:
    """Refuse a model type that the rules do not know, and a checkpoint that is quantized already.

    Raises:
        Fp8Error: either of the two.
    """
    path = printable(root / CONFIG)
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise Fp8Error(
            f"{path}: model_type {printable(model_type)!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and section.get("quantization_config") is not None:
            raise Fp8Error(f"{path}: already quantized (quantization_config); give the BF16 original")


# --- files -------------------------------------------------------------------------------------


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
        raise Fp8Error(f"{shown}: cannot be opened ({_why(error)}); complete the download") from None
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
        raise Fp8Error(f"{printable(path)}: cannot be read ({_why(error)})") from None
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
            raise Fp8Error(f"{shown}: cannot be read ({_why(error)})") from None
    return _parse_json(data, shown)


def _parse_json(data: bytes, shown: str) -> object:
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


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or printable(error)


def _is_text(value: object) -> bool:
    """A string that UTF-8 can hold: JSON's escapes also spell halves of surrogate pairs."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _read_config(root: Path) -> dict:
    path = root / CONFIG
    if not os.path.lexists(path):
        raise Fp8Error(f"{printable(path)}: no such file; give the directory that holds the model")
    config = read_json(resolve_inside(root, CONFIG), _MAX_CONFIG)
    if not isinstance(config, dict):
        raise Fp8Error(f"{printable(path)}: not a JSON object")
    level: list[object] = [config]
    for _ in range(_MAX_DEPTH):
        strings = [v for v in level if isinstance(v, str)]
        strings += (key for v in level if isinstance(v, dict) for key in v)
        if not all(map(_is_text, strings)):
            raise Fp8Error(f"{printable(path)}: not valid (a string in it is not Unicode)")
        level = [
            member
            for value in level
            if isinstance(value, dict | list)
            for member in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise Fp8Error(f"{printable(path)}: not valid (nested more than {_MAX_DEPTH} deep)")
    return config


def _present(root: Path) -> list[str]:
    """Names of the safetensors files of a directory; `._model.safetensors` is macOS' bookkeeping."""
    try:
        return sorted(n for n in os.listdir(root) if n.endswith(".safetensors") and not n.startswith("."))
    except OSError as error:
        raise Fp8Error(f"{printable(root)}: cannot be read ({_why(error)})") from None


def _shard_names(root: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the shards in use, and the index's weight_map if there is an index."""
    present = _present(root)
    if not os.path.lexists(root / INDEX):
        if not present:
            raise Fp8Error(
                f"{printable(root)}: no *.safetensors file in it; give the directory that holds the model"
            )
        _check_numbering(root, present)
        _check_shard_names(root, present)
        return present, None
    path = root / INDEX
    index = read_json(resolve_inside(root, INDEX))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise Fp8Error(f"{printable(path)}: has no weight_map of tensor names to file names")
    names = sorted(set(weight_map.values()))
    if not names:
        raise Fp8Error(f"{printable(path)}: its weight_map is empty")
    if names == ["model.safetensors-00001-of-00001.safetensors"] and present == ["model.safetensors"]:
        # Some releases were renamed after their index had been written.
        names = present
        weight_map = dict.fromkeys(weight_map, present[0])
    _check_shard_names(path, names)
    return names, weight_map


def _check_shard_names(origin: Path, names: list[str]) -> None:
    for name in names:
        if not name.endswith(".safetensors") or name.startswith(".") or "/" in name:
            raise Fp8Error(
                f"{printable(origin)}: names {printable(name)!r}, which is no safetensors file beside it"
            )
        if not name.isprintable():
            raise Fp8Error(f"{printable(origin)}: the file name {printable(name)!r} is not text; rename it")
    if len({name.casefold() for name in names}) < len(names):
        # The output may go to a file system that would make one file of them.
        raise Fp8Error(f"{printable(origin)}: two shards' names differ only in case; rename one")


def _check_numbering(root: Path, names: list[str]) -> None:
    """Without an index, a missing shard shows only in the numbers of the others."""
    numbers = [m for m in map(_SHARD_NUMBER.search, names) if m]
    for total in {m[2] for m in numbers}:
        have = {int(m[1]) for m in numbers if m[2] == total}
        missing = sorted(set(range(1, int(total) + 1)) - have)
        if missing:
            raise Fp8Error(
                f"{printable(root)}: shard {missing[0]:05d}-of-{total} is missing; complete the download"
            )


def _extra_files(root: Path) -> list[Path]:
    """Tokenizer, templates, processor and other files that belong to the model, relative to root."""

    def refuse(error: OSError) -> None:
        raise Fp8Error(f"{printable(error.filename)}: cannot be read ({_why(error)})")

    found = []
    for place, folders, files in os.walk(root, onerror=refuse):
        folder = Path(place)
        folders[:] = sorted(f for f in folders if not _NOT_COPIED_FOLDERS.match(f))
        for name in folders:
            if name in (*_WRITTEN_ANEW, INDEX) and folder == root:
                raise Fp8Error(f"{printable(folder / name)}: a directory where a file belongs; rename it")
            if (folder / name).is_symlink():
                raise Fp8Error(
                    f"{printable(folder / name)}: a link to a directory; put the directory itself there"
                )
        for name in sorted(files):
            if name.lower().endswith(_NOT_COPIED_SUFFIXES) or _NOT_COPIED_FILES.match(name):
                continue
            relative = (folder / name).relative_to(root)
            if name in _WRITTEN_ANEW and relative.parent == Path():
                continue
            if not _is_text(str(relative)):
                raise Fp8Error(f"{printable(folder / name)}: its name is not UTF-8; rename it")
            resolve_inside(root, str(relative))
            found.append(relative)
    return found


# --- shards ------------------------------------------------------------------------------------


def _read_shards(root: Path, names: list[str]) -> tuple[Shard, ...]:
    shards, count = [], 0
    for name in names:
        shards.append(read_shard(resolve_inside(root, name)))
        count += len(shards[-1].tensors)
        if count > _MAX_TENSORS:
            raise Fp8Error(f"{printable(root)}: over {_MAX_TENSORS:,} tensors, more than any checkpoint has")
    return tuple(shards)


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
            raise Fp8Error(f"{shown}: cannot be read ({_why(error)})") from None
    header = _parse_json(raw, shown)
    if not isinstance(header, dict):
        raise Fp8Error(f"{shown}: its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(map(_is_text, (*metadata, *metadata.values())))
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


def _check_tensors(shards: tuple[Shard, ...], weight_map: dict[str, str] | None) -> None:
    home: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in home:
                raise Fp8Error(
                    f"{printable(tensor.name)}: in both {home[tensor.name]} and {shard.name}; "
                    "remove the stale shard"
                )
            home[tensor.name] = shard.name
    for name, shard_name in (weight_map or {}).items():
        if home.get(name) != shard_name:
            raise Fp8Error(
                f"{printable(name)}: {INDEX} puts it in {shard_name}, which does not hold it; "
                "download both again"
            )
