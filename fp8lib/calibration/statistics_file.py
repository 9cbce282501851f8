"""The activation-statistics file: what each weight's input channels looked like while the model ran.

JSON, one entry per weight:

    {"model.layers.0.mlp.down_proj.weight":
        {"tokens": 18211, "input_channel_max": [...], "input_channel_mean_square": [...]}}

Either list is enough. The quantizer weights the squared error of input channel j by a_j, the channel's
mean square, or the square of its maximum where the file holds nothing better. Where the file came from
stands under `__metadata__`.

The same as safetensors, for models whose JSON would be gigabytes: one F32 tensor per list, named
`<tensor name>.input_channel_mean_square`, read when it is needed; an I64 `<tensor name>.tokens`; the
provenance in the header's `__metadata__`.

Names may differ from the checkpoint's by the prefix that a loader adds or drops: `model.`,
`model.language_model.`, `language_model.`. An expert's up_proj without an entry of its own takes its
gate_proj's: both multiply the same hidden states. An expert without any takes its layer's:
`….mlp.experts` (or `….experts.gate_up_proj`) for the gate and up projections, which all see the hidden
states, `….experts.down_proj` for the down projection.

What a file of a large mixture of experts leaves out. A 35B-A3B has 94 million numbers of this kind, a
397B 566 million, nearly all of them for single experts: 1 and 6 GB of JSON. Above `THIN_ABOVE` numbers,
experts' up_proj entries are not written (gate_proj speaks for them), nor, in JSON, their
`input_channel_max` (which the quantizer does not need beside the mean square). That leaves 0.27 GB of
JSON for the 35B (measured; 0.22 GB as safetensors) and 1.3 GB of safetensors for the 397B.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fp8lib import Fp8Error
from fp8lib.calibration.json_members import CHUNK, members
from fp8lib.checkpoint.headers import Tensor, read_shard
from fp8lib.checkpoint.rules import canonical, one_expert_part
from fp8lib.checkpoint.untrusted import open_regular, printable

MEAN_SQUARE = "input_channel_mean_square"
MAXIMUM = "input_channel_max"
TOKENS = "tokens"
SUFFIXES = (".json", ".safetensors")

# Canonical name -> (name in the file, kind of list -> function that returns its values).
Entries = dict[str, tuple[str, dict[str, Callable[[], np.ndarray]]]]

_MAX_JSON = 2_000_000_000
_MAX_ENTRIES = 250_000


def looks_like_statistics(path: Path) -> bool:
    """Whether an existing file is empty or begins as a statistics file does, whoever wrote it."""
    try:
        with open_regular(path) as file:
            beginning = file.read(1 << 16)
    except (Fp8Error, OSError):
        return False
    return not beginning or b"input_channel_" in beginning or b".second_moments" in beginning


# --- reading -----------------------------------------------------------------------------------


class Statistics:
    """A statistics file, opened and checked.

    Args:
        path: `.json` or `.safetensors`.

    Raises:
        Fp8Error: unreadable, or not of this form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.lexists(path):
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
    if part := one_expert_part(f"{name}.weight"):
        experts, expert, projection = part
        if projection == "down_proj":
            yield f"{experts}.down_proj"
            return
        if projection == "up_proj":
            yield f"{experts}.{expert}.gate_proj"
        yield f"{experts}.gate_up_proj"
        yield experts


def _read_json(path: Path) -> Entries:
    shown = printable(path)

    def compact(entry: dict) -> dict:
        # Runs for every object as it is parsed, so that no list of Python floats outlives its entry.
        for key in (MEAN_SQUARE, MAXIMUM):
            if isinstance(entry.get(key), list):
                with np.errstate(over="ignore"):  # infinity is refused where the entry is used
                    values = np.asarray(entry[key], dtype=np.float32)
                entry[key] = lambda values=values: values
        return entry

    entries: Entries = {}
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MAX_JSON:
            raise Fp8Error(f"{shown}: over 2 GB of JSON; collect it as .safetensors")
        if b"{" not in file.read(CHUNK):
            raise Fp8Error(f"{shown}: not a JSON object of tensor names")
        file.seek(0)
        # Counted first: it takes a fraction of a second, and parsing so many would take minutes.
        if sum(chunk.count(b"{") for chunk in iter(partial(file.read, CHUNK), b"")) > _MAX_ENTRIES:
            raise Fp8Error(f"{shown}: over {_MAX_ENTRIES:,} entries, more than any model has weights")
        file.seek(0)
        try:
            for name, entry in members(
                io.TextIOWrapper(file, "utf-8-sig"), json.JSONDecoder(object_hook=compact)
            ):
                _add(entries, name, entry, shown)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise Fp8Error(f"{shown}: not valid JSON statistics ({printable(error)})") from None
    return entries


def _add(entries: Entries, name: str, entry: object, shown: str) -> None:
    lists = {k: v for k, v in entry.items() if callable(v)} if isinstance(entry, dict) else {}
    if not lists:
        if name.startswith("__"):  # provenance
            return
        raise Fp8Error(f"{shown}: {printable(name)} has neither {MEAN_SQUARE} nor {MAXIMUM}")
    if twin := entries.get(canonical(name)):
        raise Fp8Error(f"{shown}: {printable(twin[0])} and {printable(name)} are the same; remove one")
    entries[canonical(name)] = (name, lists)


def _read_safetensors(path: Path) -> Entries:
    shown = printable(path)
    try:
        tensors = read_shard(path).tensors
    except Fp8Error as error:
        raise Fp8Error(f"{shown}: not valid safetensors ({str(error).removeprefix(f'{shown}: ')})") from None
    entries: Entries = {}
    for tensor in tensors:
        name, _, kind = tensor.name.rpartition(".")
        if kind not in (MEAN_SQUARE, MAXIMUM):
            continue
        if tensor.dtype != "F32":
            raise Fp8Error(f"{shown}: {printable(tensor.name)} is {tensor.dtype}, F32 expected")
        twin, lists = entries.setdefault(canonical(name), (name, {}))
        if twin != name:
            raise Fp8Error(f"{shown}: {printable(twin)} and {printable(name)} are the same; remove one")
        lists[kind] = partial(_read_tensor, path, tensor)
    if not entries:
        raise Fp8Error(f"{shown}: holds no {MEAN_SQUARE} and no {MAXIMUM}")
    return entries


def _read_tensor(path: Path, tensor: Tensor) -> np.ndarray:
    """An F32 tensor's values; not mapped, because a file that shrinks then would end the process."""
    raw = bytearray(tensor.nbytes)
    with open_regular(path) as file:
        file.seek(tensor.start)
        count = file.readinto(raw)
    if count != tensor.nbytes:
        raise Fp8Error(f"{printable(path)}: became shorter while it was read; restore it and run again")
    return np.frombuffer(raw, "<f4").reshape(tensor.shape)


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
