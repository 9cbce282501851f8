"""The activation-statistics file: what each weight's input channels looked like while the model ran.

JSON, one entry per weight:

    {"model.layers.0.mlp.down_proj.weight": {"input_channel_max": [...], "input_channel_mean_square": [...]}}

Either list is enough. The quantizer weights the squared error of input channel j by a_j, the channel's
mean square, or the square of its maximum where the file holds nothing better.

The same as safetensors, for models whose JSON would be gigabytes: one F32 tensor per list, named
`<tensor name>.input_channel_mean_square`, mapped into memory and read when it is needed.

Names may differ from the checkpoint's by the prefix that a loader adds or drops: `model.`,
`model.language_model.`, `language_model.`. An expert without an entry of its own takes its layer's:
`….mlp.experts` (or `….experts.gate_up_proj`) for the gate and up projections, which all see the hidden
states, `….experts.down_proj` for the down projection.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fp8lib import Fp8Error
from fp8lib.checkpoint import printable

MEAN_SQUARE = "input_channel_mean_square"
MAXIMUM = "input_channel_max"

# Canonical name -> (name in the file, kind of list -> function that returns its values).
Entries = dict[str, tuple[str, dict[str, Callable[[], np.ndarray]]]]

_PREFIX = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(?=layers\.|mtp\.)")
_EXPERT = re.compile(r"^(?P<experts>.+\.mlp\.experts)\.\d+\.(?P<projection>gate|up|down)_proj$")
_MAX_JSON = 2_000_000_000
_MAX_ENTRIES = 1_000_000


def canonical(name: str) -> str:
    """A tensor's name without the prefix that loaders disagree about and without `.weight`."""
    return _PREFIX.sub("", name.removesuffix(".weight"))


class Statistics:
    """A statistics file, opened and checked.

    Args:
        path: `.json` or `.safetensors`.

    Raises:
        Fp8Error: unreadable, or not of this form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise Fp8Error(f"{printable(path)}: no such file")
        read = _read_safetensors if path.suffix == ".safetensors" else _read_json
        try:
            self._entries = read(path)
            self.sha256 = _digest(path)
        except OSError as error:
            raise Fp8Error(f"{printable(path)}: cannot be read ({error.strerror})") from None

    def importance(self, weight: str, columns: int) -> np.ndarray | None:
        """a_j of a weight's input channels.

        Args:
            weight: the tensor's name in the checkpoint.
            columns: its input features.

        Returns:
            float32 [columns], or None if the file has nothing on this weight.

        Raises:
            Fp8Error: an entry of another length, or with negative or non-finite values.
        """
        found = self._find(canonical(weight))
        if found is None:
            return None
        entry, lists = found
        squared = MEAN_SQUARE not in lists
        values = np.asarray(lists[MAXIMUM if squared else MEAN_SQUARE](), dtype=np.float32)
        shown = f"{printable(self.path)}: {printable(entry)}"
        if values.shape != (columns,):
            raise Fp8Error(
                f"{shown}: {values.size} channels, but {printable(weight)} has {columns}; "
                "collect statistics from this model"
            )
        if not np.isfinite(values).all() or (values < 0).any():
            raise Fp8Error(f"{shown}: holds negative or non-finite values; collect it again")
        with np.errstate(over="ignore"):
            result = values * values if squared else values
        if not np.isfinite(result).all():
            raise Fp8Error(f"{shown}: its squares overflow; collect it again")
        return result

    def check(self, weights: Iterable[tuple[str, int]]) -> int:
        """Look at the entry of every (weight, columns) once.

        Returns:
            How many of them have statistics.

        Raises:
            Fp8Error: as `importance`.
        """
        return sum(self.importance(name, columns) is not None for name, columns in weights)

    def _find(self, name: str) -> tuple[str, dict[str, Callable[[], np.ndarray]]] | None:
        for key in _keys(name):
            if key in self._entries:
                return self._entries[key]
        return None


def _keys(name: str) -> Iterator[str]:
    """Entries that can speak for a weight, the closest first."""
    yield name
    if match := _EXPERT.match(name):
        if match["projection"] == "down":
            yield f"{match['experts']}.down_proj"
        else:
            yield f"{match['experts']}.gate_up_proj"
            yield match["experts"]


def _read_json(path: Path) -> Entries:
    shown = printable(path)
    if path.stat().st_size > _MAX_JSON:
        raise Fp8Error(f"{shown}: over 2 GB of JSON; collect it as .safetensors")

    def compact(entry: dict) -> dict:
        # Runs for every object as it is parsed, so that no list of Python floats outlives its entry.
        for key in (MEAN_SQUARE, MAXIMUM):
            if isinstance(entry.get(key), list):
                values = np.asarray(entry[key], dtype=np.float32)
                entry[key] = lambda values=values: values
        return entry

    try:
        with path.open("rb") as file:
            document = json.load(file, object_hook=compact)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Fp8Error(f"{shown}: not valid JSON statistics ({printable(error)})") from None
    if not isinstance(document, dict):
        raise Fp8Error(f"{shown}: not a JSON object of tensor names")
    if len(document) > _MAX_ENTRIES:
        raise Fp8Error(f"{shown}: {len(document)} entries, more than any model has weights")
    entries = {}
    for name, entry in document.items():
        if not isinstance(entry, dict) or not any(callable(entry.get(key)) for key in (MEAN_SQUARE, MAXIMUM)):
            if name.startswith("__"):  # provenance
                continue
            raise Fp8Error(f"{shown}: {printable(name)} has neither {MEAN_SQUARE} nor {MAXIMUM}")
        entries[canonical(name)] = (name, {k: v for k, v in entry.items() if callable(v)})
    return entries


def _read_safetensors(path: Path) -> Entries:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise Fp8Error(f"{printable(path)}: not valid safetensors ({printable(error)})") from None
    entries: Entries = {}
    for key in file.keys():  # noqa: SIM118 - not a mapping
        name, _, kind = key.rpartition(".")
        if kind in (MEAN_SQUARE, MAXIMUM):
            entries.setdefault(canonical(name), (name, {}))[1][kind] = partial(file.get_tensor, key)
    if not entries:
        raise Fp8Error(f"{printable(path)}: holds no {MEAN_SQUARE} and no {MAXIMUM}")
    return entries


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
