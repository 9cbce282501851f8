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

import fcntl
import glob
import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np

from fp8lib import Fp8Error
from fp8lib.checkpoint import Tensor, open_regular, printable, read_shard
from fp8lib.rules import one_expert_part
from fp8lib.writer import ShardWriter

MEAN_SQUARE = "input_channel_mean_square"
MAXIMUM = "input_channel_max"
TOKENS = "tokens"
SUFFIXES = (".json", ".safetensors")
THIN_ABOVE = 30_000_000
"""Numbers above which the entries of experts are thinned; in full they would take 300 MB of JSON."""

# Canonical name -> (name in the file, kind of list -> function that returns its values).
Entries = dict[str, tuple[str, dict[str, Callable[[], np.ndarray]]]]

_PREFIX = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(?=layers\.|mtp\.)")
_SPACE = re.compile(r"[ \t\r\n]*")
_DIGITS = 6  # what float32 carries whatever the value (FLT_DIG)
_MAX_JSON = 2_000_000_000
_MAX_ENTRIES = 250_000
_MAX_ENTRY = 50_000_000
"""Characters of JSON that one entry may take: what is held in memory beside the entries themselves."""
_CHUNK = 1 << 22


def without_prefix(name: str) -> str:
    """A tensor's or module's name from `layers.` or `mtp.` on: the prefix is what loaders disagree about."""
    return _PREFIX.sub("", name)


def canonical(name: str) -> str:
    """A tensor's name without the prefix that loaders disagree about and without `.weight`."""
    return without_prefix(name.removesuffix(".weight"))


def looks_like_statistics(path: Path) -> bool:
    """Whether an existing file is empty or begins as a statistics file does, whoever wrote it."""
    try:
        with open_regular(path) as file:
            beginning = file.read(1 << 16)
    except (Fp8Error, OSError):
        return False
    return not beginning or b"input_channel_" in beginning


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
        if b"{" not in file.read(_CHUNK):
            raise Fp8Error(f"{shown}: not a JSON object of tensor names")
        file.seek(0)
        # Counted first: it takes a fraction of a second, and parsing so many would take minutes.
        if sum(chunk.count(b"{") for chunk in iter(partial(file.read, _CHUNK), b"")) > _MAX_ENTRIES:
            raise Fp8Error(f"{shown}: over {_MAX_ENTRIES:,} entries, more than any model has weights")
        file.seek(0)
        try:
            for name, entry in _members(
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


def _members(file: TextIO, decoder: json.JSONDecoder) -> Iterator[tuple[str, object]]:
    """Names and values of the object that is in a JSON file, holding one at a time.

    Raises:
        ValueError: not JSON, or not an object.
    """
    text, position, last = "", 0, "the beginning"

    def more() -> bool:
        nonlocal text, position
        if len(text) - position > _MAX_ENTRY:
            raise ValueError(f"too long an entry after {last}")
        # Much more at a time for an entry that is long: each attempt parses it from its beginning.
        read = file.read(max(_CHUNK, 7 * (len(text) - position)))
        text, position = text[position:] + read, 0
        return bool(read)

    def symbol() -> str:
        """The next character that is no white space, "" at the end."""
        nonlocal position
        while True:
            position = _SPACE.match(text, position).end()
            if position < len(text):
                return text[position]
            if not more():
                return ""

    def value() -> object:
        nonlocal position
        symbol()
        while True:
            try:
                found, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                if not more():
                    raise ValueError(f"{error.msg} after {last}") from None
                continue
            if end == len(text) and more():
                continue  # a number may go on
            position = end
            return found

    def expect(wanted: str) -> str:
        nonlocal position
        if (found := symbol()) not in tuple(wanted):
            raise ValueError(f"{' or '.join(wanted)} expected after {last}")
        position += 1
        return found

    if symbol() != "{":
        raise ValueError("not a JSON object of tensor names")
    expect("{")
    going_on = symbol() != "}" or expect("}") == ","
    while going_on:
        name = value()
        if not isinstance(name, str):
            raise ValueError(f"a name expected after {last}")
        last = printable(name)
        expect(":")
        yield name, value()
        going_on = expect(",}") == ","
    if symbol():
        raise ValueError("more after its end")


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


# --- writing -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight's statistics.

    Attributes:
        maximum: float32 [channels], largest |x| of each input channel.
        mean_square: float32 [channels], mean of x^2.
        tokens: how many the weight itself saw, also where the lists are its layer's.
    """

    maximum: np.ndarray
    mean_square: np.ndarray
    tokens: int


class StatisticsWriter(AbstractContextManager):
    """Writes a statistics file entry by entry; under its own name it is complete or not there.

    Leaving the context without `commit` removes what was written.

    Args:
        path: `.json` or `.safetensors`.
        weights: (full tensor name, channels) of every weight that may get an entry.
        provenance: where the statistics come from; safetensors holds the values as text.

    Raises:
        Fp8Error: the file cannot be written; so do the methods.
    """

    def __init__(
        self, path: Path, weights: Collection[tuple[str, int]], provenance: Mapping[str, object]
    ) -> None:
        self._thin = sum(2 * channels for _, channels in weights) > THIN_ABOVE
        kind = _SafetensorsForm if path.suffix == ".safetensors" else _JsonForm
        self._form = kind([w for w in weights if not self._leaves_out(w[0])], provenance)
        self._end = len(self._form.beginning)
        _remove_abandoned(path)
        own = f"{path.name}.{uuid.uuid4().hex[:8]}"  # two runs with one --output: the last one's file stays
        self._writer = ShardWriter(path, self._form.beginning, self._end, name=own)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._writer.fileno(), fcntl.LOCK_EX)

    def _leaves_out(self, name: str) -> bool:
        part = one_expert_part(name) if self._thin else None
        return part is not None and part[2] == "up_proj"

    def add(self, name: str, entry: Entry) -> None:
        """Write one weight's entry; one that a large file leaves out is ignored."""
        if self._leaves_out(name):
            return
        for piece in self._form.pieces(name, entry, self._thin and one_expert_part(name) is not None):
            self._writer.write(self._end, piece)
            self._end += len(piece)

    def commit(self) -> None:
        """Complete the file and give it its name."""
        for offset, piece in self._form.ending(self._end):
            self._writer.write(offset, piece)
        self._writer.commit()

    def __exit__(self, *_: object) -> None:
        self._writer.abandon()


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of runs that were killed; a living one's is locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.partial"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


class _JsonForm:
    """The file as JSON: an entry per line."""

    def __init__(self, _weights: Collection[tuple[str, int]], provenance: Mapping[str, object]) -> None:
        self.beginning = f'{{\n"__metadata__": {json.dumps(dict(provenance), ensure_ascii=False)}'.encode()

    def pieces(self, name: str, entry: Entry, thin: bool) -> Iterator[bytes]:
        fields = [f'"{TOKENS}": {entry.tokens}']
        if not thin:
            fields.append(f'"{MAXIMUM}": {_numbers(entry.maximum)}')
        fields.append(f'"{MEAN_SQUARE}": {_numbers(entry.mean_square)}')
        yield f",\n{json.dumps(name, ensure_ascii=False)}: {{{', '.join(fields)}}}".encode()

    def ending(self, end: int) -> Iterator[tuple[int, bytes]]:
        yield end, b"\n}\n"


def _numbers(values: np.ndarray) -> str:
    return "[" + ",".join([f"%.{_DIGITS}g" % v for v in values.tolist()]) + "]"


class _SafetensorsForm:
    """The file as safetensors. The header comes first but is known last, so room is left for it."""

    def __init__(self, weights: Collection[tuple[str, int]], provenance: Mapping[str, object]) -> None:
        self._header = {"__metadata__": {key: str(value) for key, value in provenance.items()}}
        self._data = 0
        # No offset has more digits than the sum of all.
        end = sum(8 + 8 * channels for _, channels in weights)
        longest = dict(self._header)
        for name, channels in weights:
            for key, dtype, shape in _tensors(name, channels):
                longest[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end]}
        room = len(_compact(longest))
        self.beginning = b" " * (8 + room + -room % 8)

    def pieces(self, name: str, entry: Entry, _thin: bool) -> Iterator[memoryview]:
        arrays = (np.array([entry.tokens], "<i8"), entry.maximum, entry.mean_square)
        for (key, dtype, shape), array in zip(_tensors(name, entry.maximum.size), arrays, strict=True):
            data = np.ascontiguousarray(array, "<i8" if dtype == "I64" else "<f4")
            offsets = [self._data, self._data + data.nbytes]
            self._header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            self._data = offsets[1]
            yield memoryview(data).cast("B")

    def ending(self, _end: int) -> Iterator[tuple[int, bytes]]:
        room = len(self.beginning) - 8
        yield 0, room.to_bytes(8, "little") + _compact(self._header).ljust(room)


def _tensors(name: str, channels: int) -> list[tuple[str, str, list[int]]]:
    """(key, dtype, shape) of one entry's tensors: channels are even, so that the next count is aligned."""
    return [
        (f"{name}.{TOKENS}", "I64", [1]),
        (f"{name}.{MAXIMUM}", "F32", [channels]),
        (f"{name}.{MEAN_SQUARE}", "F32", [channels]),
    ]


def _compact(header: dict[str, object]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
