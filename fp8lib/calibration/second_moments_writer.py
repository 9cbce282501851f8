"""Writes the second-moments file, whose format `second_moments_file` documents."""

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from fp8lib.calibration.second_moments_file import MOMENTS, Input, triangle
from fp8lib.calibration.statistics_file import TOKENS
from fp8lib.calibration.statistics_writer import begin_file


class SecondMomentsWriter(AbstractContextManager):
    """Writes the file matrix by matrix; under its own name it is complete or not there.

    The header comes first and is known last, so room is left for it.

    Args:
        path: of the file.
        inputs: everything that may come, each expert of an input included.
        provenance: where the file comes from.

    Raises:
        Fp8Error: the file cannot be written; so do the methods.
    """

    def __init__(self, path: Path, inputs: Iterable[Input], provenance: Mapping[str, object]) -> None:
        self._header: dict[str, object] = {"__metadata__": {k: str(v) for k, v in provenance.items()}}
        self._data = 0
        longest = dict(self._header)
        inputs = list(inputs)
        end = sum(each.nbytes * (1 + each.experts) for each in inputs)  # has as many digits as any offset
        for each in inputs:
            for name in (each.name, *(expert_input(each.name, e) for e in range(each.experts))):
                self._describe(longest, name, each.channels, end)
        self._room = len(_compact(longest))
        self._room += -self._room % 8
        self._writer = begin_file(path, b" " * (8 + self._room))

    @staticmethod
    def _describe(header: dict[str, object], name: str, channels: int, start: int) -> None:
        middle = start + 4 * triangle(channels)
        shape = [triangle(channels)]
        header[f"{name}.{MOMENTS}"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, middle]}
        header[f"{name}.{TOKENS}"] = {"dtype": "I64", "shape": [1], "data_offsets": [middle, middle + 8]}

    def add(self, name: str, channels: int, packed: np.ndarray, tokens: int) -> None:
        """Write a matrix.

        Args:
            name: of the input, or `expert_input` of it.
            channels: n.
            packed: upper triangle of H, any float dtype.
            tokens: over which H is the mean.
        """
        self._describe(self._header, name, channels, self._data)
        for data in (np.ascontiguousarray(packed, "<f4"), np.array([tokens], "<i8")):
            self._writer.write(8 + self._room + self._data, memoryview(data).cast("B"))
            self._data += data.nbytes

    def commit(self) -> None:
        """Complete the file and give it its name."""
        header = _compact(self._header).ljust(self._room)
        self._writer.write(0, self._room.to_bytes(8, "little") + header)
        self._writer.commit()

    def __exit__(self, *_: object) -> None:
        self._writer.abandon()


def expert_input(name: str, expert: int) -> str:
    """`….mlp.experts.down_proj` -> `….mlp.experts.{expert}.down_proj`."""
    experts, _, projection = name.rpartition(".")
    return f"{experts}.{expert}.{projection}"


def _compact(header: dict[str, object]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
