"""The work of a run, cut up: shards, parts of a shard for several processes, pieces of a part for threads."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fp8lib.checkpoint.layout import PAGE, Matrix, Passthrough, Rewritten, ShardPlan
from fp8lib.numerics.blocks import BLOCK, blocks

COPY_PIECE = 4 * 1024 * 1024
"""Bytes of a tensor that is kept, or of a file, that are read at a time."""
_UNITS_PER_RANK = 20
"""With 64 ranks the busiest has 5 % more than the mean then, 8 % with 10 (benchmarks/scale.py)."""
_SMALLEST_UNIT = 16 * 1024 * 1024
"""Bytes below which dividing a shard costs more than it evens out."""


Rows = tuple[Matrix, int, int]
"""Some rows of a matrix: it, the first of them, a multiple of 128, and the one behind the last."""
Bytes = tuple[Passthrough, int, int]
"""Some bytes of a tensor that is kept, in the same way."""
RewrittenRows = tuple[Rewritten, int, int]
"""Some rows of a matrix that does not become FP8."""
Piece = Rows | Bytes | RewrittenRows


@dataclass(frozen=True, slots=True)
class Unit:
    """A shard to quantize, or one of several parts of it that different processes work on."""

    plan: ShardPlan
    part: int = 0
    parts: int = 1


def divide(shards: list[ShardPlan], ranks: int, whole: bool) -> list[Unit]:
    """The work of quantizing some shards, for any number of processes to take from.

    Args:
        shards: to quantize.
        ranks: processes that will take them. For one, shards stay whole and in order. For more, the
            largest come first, and what is larger than a 20th of a rank's share is divided, so that
            the last ranks at work finish close together and one large file keeps all of them busy.
        whole: never divide a shard (a checksum needs all its bytes in one process).
    """
    if ranks == 1:
        return [Unit(shard) for shard in shards]
    share = sum(s.input_bytes for s in shards) / ranks / _UNITS_PER_RANK
    units = []
    for shard in sorted(shards, key=lambda s: (-s.input_bytes, s.name)):
        parts = 1 if whole else max(math.ceil(shard.input_bytes / max(share, _SMALLEST_UNIT)), 1)
        units += [Unit(shard, part, parts) for part in range(parts)]
    return units


def pieces(unit: Unit, weights: int) -> list[Piece]:
    """A unit's share of its shard's pieces: see `all_pieces`."""
    return share(unit, all_pieces(unit.plan, weights))


def share(unit: Unit, found: list[Piece]) -> list[Piece]:
    """What a unit has of all pieces of its shard."""
    return found[len(found) * unit.part // unit.parts : len(found) * (unit.part + 1) // unit.parts]


def all_pieces(plan: ShardPlan, weights: int) -> list[Piece]:
    """The pieces of a shard, in the order of the output file.

    Returns:
        (matrix, first row, last) of about `weights` weights each; (tensor that is kept, first byte, last);
        (matrix that is rewritten, first row, last).
    """
    found: list = [(item, *span) for item in plan.passthrough for span in _byte_ranges(item)]
    matrices = (*plan.matrices, *plan.rewritten)
    found += [(m, *span) for m in matrices for span in row_ranges(m.rows, m.columns, weights)]
    found.sort(key=lambda piece: output_start(*piece[:2]))
    return found


def batches(found: Iterable[Piece], weights: int) -> Iterator[list[Piece]]:
    """Put pieces together whose bytes follow each other in the input, and in the output, too.

    Args:
        found: in the order of the output file.
        weights: most that a batch of several pieces holds; 0 for batches of one.

    Yields:
        Rows of one dtype, of one matrix or several; or one span of bytes; or rows that are
        rewritten, of one matrix.
    """
    batch: list[Piece] = []
    held = 0
    for piece in found:
        count = (piece[2] - piece[1]) * piece[0].columns if isinstance(piece[0], Matrix) else 0
        if batch and not (count and held + count <= weights and _adjoin(batch[-1], piece)):
            yield batch
            batch, held = [], 0
        batch.append(piece)
        held += count
    if batch:
        yield batch


def _adjoin(before: Piece, behind: Rows) -> bool:
    """Whether rows follow others in the input, and their codes and scales in the output."""
    (matrix, _, last), (other, first, _) = before, behind
    return (
        isinstance(matrix, Matrix)
        and matrix.dtype == other.dtype
        and input_start(matrix, last) == input_start(other, first)
        and codes_start(matrix, last) == codes_start(other, first)
        and scales_start(matrix, last) == scales_start(other, first)
    )


def input_start(matrix: Matrix | Rewritten, row: int) -> int:
    """Where a row begins in the input shard; a matrix's end for the one behind its last."""
    start = matrix.source.start if isinstance(matrix, Rewritten) else matrix.start
    return start + row * matrix.input_row_bytes


def codes_start(matrix: Matrix, row: int) -> int:
    """Where a row's codes begin in the output shard."""
    return matrix.weight.start + row * matrix.columns


def scales_start(matrix: Matrix, row: int) -> int:
    """Where the scales of a row's blocks begin in the output shard, the row a multiple of 128 or the end."""
    return matrix.scale.start + blocks(row) * blocks(matrix.columns) * 2


def output_start(item: Matrix | Passthrough | Rewritten, first: int) -> int:
    """Where a piece begins in the output shard: at a byte of what is kept, at a row of another."""
    if isinstance(item, Passthrough):
        return item.output.start + first
    if isinstance(item, Rewritten):
        return item.start + first * item.row_bytes
    return codes_start(item, first)


def rows_per_piece(columns: int, weights: int) -> int:
    """Rows of a piece of about `weights` weights: a multiple of 128, at least 128."""
    return max(weights // columns // BLOCK, 1) * BLOCK


def row_ranges(rows: int, columns: int, weights: int) -> Iterator[tuple[int, int]]:
    step = rows_per_piece(columns, weights)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _byte_ranges(item: Passthrough) -> Iterator[tuple[int, int]]:
    size = item.output.nbytes
    first_page = min(-item.output.start % PAGE, size)
    if first_page:
        yield 0, first_page
    for first in range(first_page, size, COPY_PIECE):
        yield first, min(first + COPY_PIECE, size)
