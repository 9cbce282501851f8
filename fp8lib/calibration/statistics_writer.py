"""Writes the activation-statistics file, whose format `statistics_file` documents."""

import fcntl
import glob
import json
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fp8lib.calibration.statistics_file import MAXIMUM, MEAN_SQUARE, TOKENS
from fp8lib.checkpoint.rules import one_expert_part
from fp8lib.streaming.writer import ShardWriter

THIN_ABOVE = 30_000_000
"""Numbers above which the entries of experts are thinned; in full they would take 300 MB of JSON."""
_DIGITS = 6  # what float32 carries whatever the value (FLT_DIG)


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
        self._writer = begin_file(path, self._form.beginning)

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


def begin_file(path: Path, beginning: bytes) -> ShardWriter:
    """A file that a run writes to its end; where two have one name for it, the last one's stays.

    Raises:
        Fp8Error: it cannot be written.
    """
    _remove_abandoned(path)
    own = f"{path.name}.{uuid.uuid4().hex[:8]}"
    writer = ShardWriter(path, beginning, len(beginning), name=own)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(writer.fileno(), fcntl.LOCK_EX)
    return writer


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
