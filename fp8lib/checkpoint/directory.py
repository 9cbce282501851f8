"""Opens a checkpoint directory: its shards, config.json, and the files to copy along.

Reads headers only, checks everything it reads, and follows no name out of the directory.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import Shard, read_shard
from fp8lib.checkpoint.mistaken import mistake
from fp8lib.checkpoint.rules import SUPPORTED_MODEL_TYPES
from fp8lib.checkpoint.untrusted import MAX_TENSORS, is_text, printable, read_json, resolve_inside, why

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_MAX_CONFIG = 10_000_000
_MAX_DEPTH = 100
"""Levels of nesting in config.json, the one document that is written again."""
_SHARD_NUMBER = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_NOT_COPIED_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json",
)  # fmt: skip
_MODEL_FILE = re.compile(r"model(?:\.safetensors)?(?:-\d+-of-\d+)?\.safetensors$")
_MODEL_TENSOR = re.compile(r"(?:model|language_model|lm_head|mtp|visual)\.")
_STRAY_FILE = re.compile(r"(?i)(?:^|[-_.])(?:adapters?|lora|optim(?:izer)?|scheduler|ema)(?:[-_.]|$)")
_STRAY_TENSOR = re.compile(r"^base_model\.|(?:^|\.)(?:lora_\w+|exp_avg(?:_sq)?|momentum_buffer)(?:\.|$)")
_WRITTEN_ANEW = ("config.json", "fp8_quantization.json", "SHA256SUMS")
_NOT_COPIED_FILES = re.compile(
    r"(?:\..*|(?:optimizer|scheduler|rng_state|random_states|trainer_state|training_args|zero_to_fp32)"
    r"(?:_\d+)?\b.*|latest|adapter_config\.json)$"
)
_NOT_COPIED_FOLDERS = re.compile(r"(?:checkpoint-.*|global_step.*|optimizer_\d+|__pycache__|\..*)$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory, checked.

    Attributes:
        root: the directory.
        config: config.json.
        shards: in the order of their names.
        extra_files: paths relative to root of the files that are copied byte for byte.
        unused: names of safetensors files that the index does not mention.
        unlisted: names of tensors that it does not mention.
        strays: names of safetensors files beside a model without an index that belong to no model.
    """

    root: Path
    config: dict
    shards: tuple[Shard, ...]
    extra_files: tuple[Path, ...]
    unused: tuple[str, ...]
    unlisted: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()


def open_checkpoint(root: Path) -> Checkpoint:
    """Open a directory for reading.

    Raises:
        Fp8Error: it is not a complete checkpoint of a supported model type; says which file and why.
    """
    if wrong := mistake(root):
        raise Fp8Error(f"{printable(root)}: {wrong}")
    config = _read_config(root)
    names, weight_map, strays = _shard_names(root)
    shards = _read_shards(root, names)
    _check_tensors(shards, weight_map)
    unused = sorted(set(_present(root)) - set(names) - set(strays))
    listed = {t.name for s in shards for t in s.tensors} if weight_map is None else weight_map
    unlisted = [t.name for s in shards for t in s.tensors if t.name not in listed]
    extra = tuple(_extra_files(root))
    return Checkpoint(root, config, shards, extra, tuple(unused), tuple(unlisted), tuple(strays))


def require_supported(config: dict, root: Path) -> None:
    """Refuse a model type that the rules do not know, and a checkpoint that is quantized already.

    Raises:
        Fp8Error: either of the two.
    """
    require_model_type(config, root)
    path = printable(root / CONFIG)
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and section.get("quantization_config") is not None:
            raise Fp8Error(
                f"{path}: already quantized (quantization_config); give the BF16 original, "
                "or make one with --dequantize"
            )


def require_model_type(config: dict, root: Path) -> None:
    """Refuse a model type that the rules do not know.

    Raises:
        Fp8Error: names those they do.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise Fp8Error(
            f"{printable(root / CONFIG)}: model_type {printable(model_type)!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )


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
        if not all(map(is_text, strings)):
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
        raise Fp8Error(f"{printable(root)}: cannot be read ({why(error)})") from None


def _shard_names(root: Path) -> tuple[list[str], dict[str, str] | None, list[str]]:
    """Names of the shards in use, the index's weight_map or None without an index, and strays without one."""
    present = _present(root)
    if not os.path.lexists(root / INDEX):
        if not present:
            raise Fp8Error(
                f"{printable(root)}: no *.safetensors file in it; give the directory that holds the model"
            )
        _check_shard_names(root, present)
        strays = _strays(root, present)
        names = [name for name in present if name not in strays]
        _check_numbering(root, names)
        return names, None, strays
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
    return names, weight_map, []


def _strays(root: Path, present: list[str]) -> list[str]:
    """Files beside a model without an index that are no part of it: an adapter, an optimizer's state.

    Engines load every file of such a directory; the index that is written with the output would name all.

    Raises:
        Fp8Error: it cannot be told whether a file belongs to the model.
    """
    if len(present) == 1:
        return []
    named = [name for name in present if _MODEL_FILE.match(name)]
    strays = []
    for name in (name for name in present if name not in named):
        tensors = [tensor.name for tensor in read_shard(resolve_inside(root, name)).tensors]
        is_of_model = all(map(_MODEL_TENSOR.match, tensors))
        if any(map(_STRAY_TENSOR.search, tensors)) or (_STRAY_FILE.search(name) and not is_of_model):
            strays.append(name)
        elif _STRAY_FILE.search(name) or (named and not is_of_model):
            raise Fp8Error(
                f"{printable(root / name)}: may belong to the model or not, and no {INDEX} says which; "
                "move the file away, or add an index"
            )
    return strays if len(strays) < len(present) else []


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
        raise Fp8Error(f"{printable(error.filename)}: cannot be read ({why(error)})")

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
            if not is_text(str(relative)):
                raise Fp8Error(f"{printable(folder / name)}: its name is not UTF-8; rename it")
            resolve_inside(root, str(relative))
            found.append(relative)
    return found


def _read_shards(root: Path, names: list[str]) -> tuple[Shard, ...]:
    shards, count = [], 0
    for name in names:
        shards.append(read_shard(resolve_inside(root, name)))
        count += len(shards[-1].tensors)
        if count > MAX_TENSORS:
            raise Fp8Error(f"{printable(root)}: over {MAX_TENSORS:,} tensors, more than any checkpoint has")
    return tuple(shards)


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
