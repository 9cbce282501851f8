"""One shard under way: its pieces as tasks for worker threads, its checksum, its writer."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import Shard
from fp8lib.checkpoint.layout import Matrix, Passthrough, Rewritten
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.streaming.convert import Conversion
from fp8lib.streaming.lanes import DTYPES, Files, Lane, ReadAhead, as_bytes
from fp8lib.streaming.rewrite import Merge, rewrite
from fp8lib.streaming.units import Unit, pieces
from fp8lib.streaming.writer import ShardWriter

CPU_PIECE = 1024 * 1024
"""Weights in a piece on the CPU: its float32 temporaries of 2 MB stay in a core's share of the cache."""
CUDA_PIECE = 16 * 1024 * 1024
"""Weights in a piece on CUDA: 32 MB of BF16, enough for the copy engine to reach its full rate."""

Task = tuple[Callable[[Lane], object], Callable[[object], None]]
"""What a worker does with its lane, and what the scheduling thread does with the outcome."""


class Check(Protocol):
    """What is done with a shard once it is complete on disk. Verification's `ShardCheck` is one."""

    def tasks(self, files: Files, ahead: ReadAhead) -> Iterable[Task]:
        """Tasks that read the shard back; what they find stays with the check."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How shards are processed.

    Attributes:
        convert: what becomes of the rows of a weight.
        merge: what adapters make of rows before that; None without adapters.
        device: where kernels run.
        workers: worker threads; each has one more that writes and one that reads ahead.
        checksums: compute the SHA-256 of every shard from the bytes as they are written.
        piece: weights per piece, 0 for the device's default.
    """

    convert: Conversion
    device: torch.device
    workers: int
    checksums: bool = False
    piece: int = 0
    merge: Merge | None = None

    @property
    def piece_weights(self) -> int:
        return self.piece or (CUDA_PIECE if self.device.type == "cuda" else CPU_PIECE)


class _OrderedDigest:
    """SHA-256 of a file whose bytes arrive nearly in order. Early bytes are kept until their turn.

    Pieces come in the order of the file. Only a shard's scales are early: 1/8192 of its weights' bytes.
    """

    def __init__(self, header: bytes) -> None:
        self._hash = hashlib.sha256(header)
        self._end = len(header)
        self._waiting: dict[int, bytes] = {}

    def add(self, start: int, data: bytes) -> None:
        self._waiting[start] = data
        while (data := self._waiting.pop(self._end, None)) is not None:
            self._hash.update(data)
            self._end += len(data)

    def hexdigest(self, size: int) -> str:
        if self._end != size:
            raise AssertionError(f"{size - self._end} bytes of the file were not written")
        return self._hash.hexdigest()


@dataclass(slots=True)
class ShardJob:
    """A shard under way. Only the scheduling thread changes it, apart from `broken`.

    Attributes:
        name, size: of the output file.
        source: the input shard it is made from, None if that is not known.
        unit: what of it is to be quantized; None if it is complete and only to be checked.
        check: what to do when it is complete, or None.
        broken: names of weights that hold NaN or infinity.
        outstanding: tasks handed out and not settled.
        stage: `quantize` or `check`.
    """

    name: str
    size: int
    settings: Settings
    files: Files = field(default_factory=Files)
    source: Shard | None = None
    unit: Unit | None = None
    check: Check | None = None
    writer: ShardWriter | None = None
    digest: _OrderedDigest | None = None
    broken: set[str] = field(default_factory=set)
    outstanding: int = 0
    all_submitted: bool = False
    stage: str = "quantize"

    def open_output(self, folder: Path) -> None:
        """Create the output file under its temporary name."""
        plan = self.unit.plan
        self.writer = ShardWriter(folder / plan.name, plan.header, plan.size, shared=self.unit.parts > 1)
        if self.settings.checksums:
            self.digest = _OrderedDigest(plan.header)

    def tasks(self, on_bytes: Callable[[str, int], None]) -> Iterator[Task]:
        """One task for each of this unit's pieces."""

        def settle(outcome: tuple[int, Future]) -> None:
            count, written = outcome
            for start, data in written.result():
                self.digest.add(start, data)
            on_bytes(self.name, count)

        for piece in pieces(self.unit, self.settings.piece_weights):
            steps = {Passthrough: self._copy, Rewritten: self._rewrite}
            function = steps.get(type(piece[0]), self._quantize)
            yield (lambda lane, f=function, p=piece: f(lane, *p)), settle

    def _write(self, *chunks: tuple[int, memoryview]) -> list[tuple[int, bytes]]:
        """Write (offset, data) chunks; returns copies of them if they are to be hashed."""
        for start, data in chunks:
            self.writer.write(start, data)
        return [(start, bytes(data)) for start, data in chunks] if self.digest else []

    def _quantize(self, lane: Lane, matrix: Matrix, first: int, last: int) -> tuple[int, Future]:
        """Rows first..last of a matrix, from file to file. Returns (input bytes, future of `_write`)."""
        nbytes = (last - first) * matrix.input_row_bytes
        start = matrix.start + first * matrix.input_row_bytes
        raw = lane.read("in", self.files, self.source.path, start, nbytes)
        host = raw.view(DTYPES[matrix.dtype]).view(last - first, matrix.columns)
        if self.settings.merge is not None:
            self.settings.merge(matrix.weight.name, host, first)
        codes, scales = self.settings.convert(matrix, lane.to_device(host), first)
        output = lane.next_output()
        codes = lane.to_host(f"codes {output}", codes)
        scales = lane.to_host(f"scales {output}", scales)
        lane.synchronize()
        if not bool(scales.view(torch.bfloat16).isfinite().all()):
            self.broken.add(matrix.weight.name)
        scale_row_bytes = 2 * blocks(matrix.columns)
        return nbytes, lane.write_behind(
            self._write,
            (matrix.weight.start + first * matrix.columns, as_bytes(codes)),
            (matrix.scale.start + first // BLOCK * scale_row_bytes, as_bytes(scales)),
        )

    def _copy(self, lane: Lane, item: Passthrough, first: int, last: int) -> tuple[int, Future]:
        """Bytes first..last of a tensor that is kept. Returns as `_quantize`."""
        buffer, path = f"kept {lane.next_output()}", self.source.path
        raw = lane.read(buffer, self.files, path, item.start + first, last - first)
        return last - first, lane.write_behind(self._write, (item.output.start + first, as_bytes(raw)))

    def _rewrite(self, lane: Lane, item: Rewritten, first: int, last: int) -> tuple[int, Future]:
        """Rows first..last of a matrix that is computed, but not FP8. Returns as `_quantize`."""
        output = lane.next_output()
        rows, sound = rewrite(lane, self.files, item, first, last, self.settings.merge, f"rows {output}")
        if not sound:
            self.broken.add(item.name)
        nbytes = (last - first) * item.input_row_bytes
        return nbytes, lane.write_behind(self._write, (item.start + first * item.row_bytes, as_bytes(rows)))

    def refuse_broken(self) -> None:
        """Refuse an input weight with NaN or infinity in it, whether a shard's or an adapter's.

        Raises:
            Fp8Error: names the weights.
        """
        if self.broken:
            names = sorted(map(printable, self.broken))
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
            broken = "the input model" if self.settings.merge is None else "the input model or the adapter"
            raise Fp8Error(f"{self.name}: NaN or infinity in {shown}; repair {broken}")

    def refuse_changed(self) -> None:
        """Refuse an input file that is not the one that was planned for, or was written to meanwhile.

        Raises:
            Fp8Error: names the file.
        """
        sources = self.unit.plan.sources if self.unit else (self.source,) if self.source else ()
        for source in sources:
            self.files.refuse_changed(source)

    def make_durable(self, is_last_part: Callable[[Unit], bool]) -> bool:
        """Give the output its name, if this was its last part. Runs in the committing thread."""
        if self.unit.parts > 1:
            self.writer.hand_over()  # before it is counted: what is counted must stay
            if not is_last_part(self.unit):
                return False
        self.writer.commit()
        return True

    def sha256(self) -> str | None:
        """Digest of the output file, None if it was not asked for."""
        return self.digest.hexdigest(self.size) if self.digest else None

    def close(self) -> None:
        """Release files; removes the partial output of a shard that was not completed."""
        if self.writer is not None:
            self.writer.abandon()
            self.writer = None
        self.files.close()
