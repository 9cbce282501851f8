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
_MAX_RANK = 8
_SHARD_NUMBER = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")

_NOT_COPIED_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json",
)  # fmt: skip
_NOT_COPIED_FILES = re.compile(
    r"(?:config\.json|fp8_quantization\.json|SHA256SUMS|\..*"  # written anew
    r"|(?:optimizer|scheduler|rng_state|trainer_state|training_args|zero_to_fp32)\b.*|latest)$"
)
_NOT_COPIED_FOLDERS = re.compile(r"(?:checkpoint-.*|global_step.*|__pycache__|\..*)$")


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
    """A name from a file, fit for a terminal: control characters escaped, length bounded."""
    text = str(name).encode("unicode_escape").decode("ascii") if not str(name).isprintable() else str(name)
    return text if len(text) <= 200 else text[:197] + "..."


def open_checkpoint(root: Path) -> Checkpoint:
    """Open a directory for reading.

    Raises:
        Fp8Error: it is not a complete checkpoint of a supported model type; says which file and why.
    """
    if not root.is_dir():
        raise Fp8Error(f"{printable(root)}: no such directory")
    config = _read_config(root)
    names, weight_map = _shard_names(root)
    shards = tuple(read_shard(resolve_inside(root, name)) for name in names)
    _check_tensors(shards, weight_map)
    unused = sorted(p.name for p in root.glob("*.safetensors") if p.name not in names)
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
    except (OSError, RuntimeError) as error:
        raise Fp8Error(f"{shown}: cannot be opened ({_why(error)}); complete the download") from None
    home = root.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise Fp8Error(
            f"{shown}: a link to {printable(target)}, outside the directory; put the file itself there"
        )
    if not stat.S_ISREG(mode):
        raise Fp8Error(f"{shown}: not a regular file")
    return path


def read_json(path: Path, limit: int = _MAX_JSON) -> object:
    """Parse a JSON file, refusing what no checkpoint holds: huge, too deep, duplicate keys, NaN.

    Raises:
        Fp8Error: unreadable or any of these.
    """
    shown = printable(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise Fp8Error(f"{shown}: {size} bytes, far more than such a file has")
        return _parse_json(path.read_bytes(), shown)
    except OSError as error:
        raise Fp8Error(f"{shown}: cannot be read ({_why(error)})") from None


def _parse_json(data: bytes, shown: str) -> object:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise ValueError(f"{printable(twice)!r} appears twice")
        return result

    def no_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(data, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except RecursionError:
        raise Fp8Error(f"{shown}: not valid (nested too deeply)") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Fp8Error(f"{shown}: not valid JSON ({printable(error)})") from None


def _why(error: OSError | RuntimeError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _read_config(root: Path) -> dict:
    path = root / CONFIG
    if not path.exists():
        raise Fp8Error(f"{printable(path)}: no such file; give the directory that holds the model")
    config = read_json(resolve_inside(root, CONFIG), limit=10_000_000)
    if not isinstance(config, dict):
        raise Fp8Error(f"{printable(path)}: not a JSON object")
    return config


def _shard_names(root: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the shards in use, and the index's weight_map if there is an index."""
    present = sorted(p.name for p in root.glob("*.safetensors"))
    if not (root / INDEX).exists():
        if not present:
            raise Fp8Error(f"{printable(root)}: no *.safetensors file in it")
        _check_numbering(root, present)
        return present, None
    path = printable(root / INDEX)
    index = read_json(resolve_inside(root, INDEX))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise Fp8Error(f"{path}: has no weight_map of tensor names to file names")
    names = sorted(set(weight_map.values()))
    if not names:
        raise Fp8Error(f"{path}: its weight_map is empty")
    if names == ["model.safetensors-00001-of-00001.safetensors"] and present == ["model.safetensors"]:
        # Some releases were renamed after their index had been written.
        names = present
        weight_map = dict.fromkeys(weight_map, present[0])
    for name in names:
        if not name.endswith(".safetensors") or "/" in name:
            raise Fp8Error(f"{path}: names {printable(name)!r}, which is no safetensors file beside it")
    return names, weight_map


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
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not _NOT_COPIED_FOLDERS.match(f))
        for name in sorted(files):
            if name.lower().endswith(_NOT_COPIED_SUFFIXES) or _NOT_COPIED_FILES.match(name):
                continue
            relative = (Path(folder) / name).relative_to(root)
            resolve_inside(root, str(relative))
            found.append(relative)
    return found


# --- shards ------------------------------------------------------------------------------------


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file.

    Raises:
        Fp8Error: truncated, not safetensors, or a header that does not describe the file exactly.
    """
    shown = printable(path)
    try:
        with path.open("rb") as file:
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
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
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
            and all(type(v) is int and 0 <= v < 2**62 for v in value)
        )

    if not name or not name.isprintable() or "/" in name or ".." in name:
        raise bad("not a tensor name")
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise bad("its header entry has no dtype")
    dtype, shape, offsets = entry["dtype"], entry.get("shape"), entry.get("data_offsets")
    if not naturals(shape) or not naturals(offsets) or len(offsets) != 2:
        raise bad("its header entry has no valid shape and data_offsets")
    nbytes = offsets[1] - offsets[0]
    if nbytes < 0:
        raise bad("its data ends before it begins")
    if dtype in ITEM_SIZE and math.prod(shape) * ITEM_SIZE[dtype] != nbytes:
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
