"""Quantizes weights in memory and measures them as files are measured. Nothing is written."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import Shard
from fp8lib.checkpoint.layout import Matrix
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import blocks
from fp8lib.numerics.e4m3 import DTYPE
from fp8lib.streaming.convert import Conversion, convert_batch
from fp8lib.streaming.lanes import DTYPES, Files, Lane, ReadAhead, Way
from fp8lib.streaming.rewrite import Merge, merge_batch
from fp8lib.streaming.shard_job import Task
from fp8lib.streaming.units import Rows, batches, input_start, row_ranges
from fp8lib.verification.measure import Errors, Piece, combine, measure_all
from fp8lib.verification.measurement import Measurement
from fp8lib.verification.reading import AT_A_TIME, PIECE

if TYPE_CHECKING:  # nothing of second moments is imported where there are none
    from fp8lib.streaming.factors import Factors
    from fp8lib.verification.measure_outputs import OutputSums


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantize.

    Attributes:
        convert: what becomes of rows of weights.
        powers_of_two: whether its scales are.
    """

    convert: Conversion
    powers_of_two: bool

    @property
    def factors(self) -> "Factors | None":
        """Of second moments, if it rounds with them."""
        return getattr(self.convert, "factors", None)


@dataclass(slots=True)
class Trial:
    """Weights of one input shard, quantized by one or several methods. A `streaming.shard_job.Check`.

    Each piece is read once for all methods. What a method gives is measured in the pieces of
    `shard_check.py`, so that the figures are those that the files would have.

    Attributes:
        shard: of the input.
        matrices: of it, in the order of the file.
        methods: to try.
        merge: what adapters make of the weights first, or None.
        on_bytes: called with (shard's name, input bytes done since the last call).
        broken: names of weights that hold NaN or infinity.
    """

    shard: Shard
    matrices: Sequence[Matrix]
    methods: Sequence[Method]
    merge: Merge | None = None
    on_bytes: Callable[[str, int], None] = lambda name, count: None
    broken: set[str] = field(default_factory=set)
    _found: "dict[str, list[list[_Sums]]]" = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        """Bytes that it reads."""
        return sum(m.rows * m.input_row_bytes for m in self.matrices)

    def tasks(self, files: Files, ahead: ReadAhead) -> Iterator[Task]:
        """Tasks that read, quantize and measure."""
        pieces = [(m, *span) for m in self.matrices for span in row_ranges(m.rows, m.columns, self._piece(m))]
        for batch in batches(pieces, self._at_a_time(ahead.device.type)):
            read = ahead.submit(self._read, files, batch)
            yield partial(self._try, batch=batch, read=read), partial(self._add, batch)

    def _piece(self, matrix: Matrix) -> int:
        """Weights of a matrix at a time."""
        if all(self._entry(method, matrix) is None for method in self.methods):
            return PIECE
        from fp8lib.verification import measure_outputs

        return measure_outputs.PIECE

    def _at_a_time(self, device: str) -> int:
        """Weights that are read and quantized together."""
        if all(method.factors is None for method in self.methods):
            return AT_A_TIME[device]
        from fp8lib.verification import measure_outputs

        return max(AT_A_TIME[device], measure_outputs.AT_A_TIME[device])

    @staticmethod
    def _entry(method: Method, matrix: Matrix) -> str | None:
        """The second moments that a method rounds a matrix with, which is judged by its outputs then."""
        return method.factors and method.factors.entry(matrix.weight.name, matrix.columns)

    def _read(self, lane: Lane, files: Files, batch: list[Rows]) -> torch.Tensor:
        """Weights of a batch, merged, in host memory."""
        (matrix, first, _), (last_matrix, _, last) = batch[0], batch[-1]
        start, end = input_start(matrix, first), input_start(last_matrix, last)
        way = Way.CACHE if lane.device.type == "cpu" else Way.NEAREST
        raw = lane.read("in", files, self.shard.path, start, end - start, way).view(DTYPES[matrix.dtype])
        if self.merge is not None:
            merge_batch(self.merge, ((m.weight.name, m.columns, *span) for m, *span in batch), raw)
        return raw

    def _try(self, lane: Lane, batch: list[Rows], read: Future) -> "list[list[_Sums]]":
        """What each method, in turn, makes of each piece of a batch."""
        weights = lane.to_device(read.result())
        return [self._try_one(method, batch, weights) for method in self.methods]

    def _try_one(self, method: Method, batch: list[Rows], weights: torch.Tensor) -> "list[_Sums]":
        pieces = list(_cut(batch, weights, *convert_batch(method.convert, batch, weights)))
        sound = torch.stack([scales.isfinite().all() for _, _, scales in pieces]).tolist()
        outputs: list[OutputSums | None] = [None] * len(pieces)
        if all(sound):
            for key, alike in groupby(range(len(pieces)), lambda i: self._entry(method, batch[i][0])):
                if key is not None:
                    numbers = list(alike)
                    found = self._outputs(method, batch[numbers[0]][0], [pieces[i] for i in numbers])
                    outputs[numbers[0] : numbers[-1] + 1] = found
        errors = measure_all(pieces, method.powers_of_two)
        return [_Sums(*each) for each in zip(errors, outputs, sound, strict=True)]

    @staticmethod
    def _outputs(method: Method, matrix: Matrix, pieces: list[Piece]) -> "list[OutputSums]":
        """What pieces of matrices of one input change in outputs."""
        from fp8lib.verification.measure_outputs import measure_outputs

        return measure_outputs(pieces, method.factors(matrix.weight.name, matrix.columns))

    def _add(self, batch: list[Rows], found: "list[list[_Sums]]") -> None:
        for number, (matrix, first, last) in enumerate(batch):
            name = matrix.weight.name
            own = [each[number] for each in found]
            if not all(sums.is_sound for sums in own):
                self.broken.add(name)
            self._found.setdefault(name, []).append(own)
            self.on_bytes(self.shard.name, (last - first) * matrix.input_row_bytes)

    def refuse_broken(self) -> None:
        """Refuse weights with NaN or infinity in them.

        Raises:
            Fp8Error: names them.
        """
        if self.broken:
            names = sorted(map(printable, self.broken))
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
            broken = "the input model" if self.merge is None else "the input model or the adapter"
            raise Fp8Error(f"{printable(self.shard.name)}: NaN or infinity in {shown}; repair {broken}")

    def measurements(self) -> dict[str, list[Measurement]]:
        """What each weight lost by each method, by its name."""
        return {
            name: [_measurement(name, own) for own in zip(*pieces, strict=True)]
            for name, pieces in self._found.items()
        }


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of a piece: errors, output errors if it is judged by those, and whether its scales are finite."""

    errors: Errors
    output: "OutputSums | None"
    is_sound: bool


def _measurement(name: str, pieces: Sequence[_Sums]) -> Measurement:
    found = combine(name, [piece.errors for piece in pieces])
    outputs = [piece.output for piece in pieces if piece.output is not None]
    if not outputs:
        return found
    from fp8lib.verification.measure_outputs import combine_outputs

    return replace(found, output=combine_outputs(outputs))


def _cut(
    batch: list[Rows], weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Weights, codes and scales of each piece of a batch, from what `convert_batch` takes and gives."""
    codes, scales = codes.view(DTYPE), scales.view(torch.bfloat16)
    for matrix, first, last in batch:
        rows, columns = last - first, matrix.columns
        shape, scale_shape = (rows, columns), (blocks(rows), blocks(columns))
        own = (weights, shape), (codes, shape), (scales, scale_shape)
        yield tuple(t[: math.prod(s)].view(s) for t, s in own)
        weights, codes, scales = (t[math.prod(s) :] for t, s in own)
