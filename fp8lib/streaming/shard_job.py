"""One shard under way: its pieces as tasks for worker threads, its checksum, its writer."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import Shard
from fp8lib.checkpoint.layout import Matrix, Passthrough, Rewritten
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import blocks
from fp8lib.numerics.sums import sum_codes, sum_scales
from fp8lib.streaming.checksum import OrderedDigest
from fp8lib.streaming.convert import Conversion, convert_batch
from fp8lib.streaming.devices import default_readers
from fp8lib.streaming.lanes import DTYPES, Files, Lane, ReadAhead, Way, as_bytes
from fp8lib.streaming.rewrite import Merge, merge_batch, merge_bytes, restore
from fp8lib.streaming.sums import Origin, Sums
from fp8lib.streaming.units import (
    COPY_PIECE,
    Bytes,
    Piece,
    RewrittenRows,
    Rows,
    Unit,
    batches,
    codes_start,
    input_start,
    output_start,
    pieces,
    scales_start,
)
from fp8lib.streaming.writer import ShardWriter

CPU_PIECE = 1024 * 1024
"""Weights in a piece on the CPU: its float32 temporaries of 2 MB stay in a core's share of the cache."""
CUDA_PIECE = 16_000_000
"""Weights in a piece on CUDA: 32 MB of BF16, enough for the copy engine to reach its full rate. A little less
than 2^24: with the pages around it a piece fits a buffer of 2^25 bytes, and pinned memory comes in powers of
two."""
_SHARDS_AT_ONCE = 4
"""Shards whose pieces are handed out in turn on CUDA when they are hashed: a core hashes 0.5 to 2 GB/s."""

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
        device: where kernels run.
        workers: worker threads; each has one more that writes and one that reads ahead.
        checksums: compute the SHA-256 of every shard from the bytes as they are written.
        piece: weights per piece, 0 for the device's default.
        batch: weights of small matrices that go through the kernels together, 0 for one at a time; None for
            the device's default. On a CPU it is 0: a piece that leaves the core's cache costs more than a
            kernel's start.
        readers: threads that read what is quantized, 0 if the workers do; None for the device's default.
        interleaved: shards whose pieces are handed out in turn; 0 for the default.
        merge: what adapters make of rows of the input before all else; None without adapters.
    """

    convert: Conversion
    device: torch.device
    workers: int
    checksums: bool = False
    piece: int = 0
    batch: int | None = None
    readers: int | None = None
    interleaved: int = 0
    merge: Merge | None = None

    @property
    def piece_weights(self) -> int:
        return self.piece or (CUDA_PIECE if self.device.type == "cuda" else CPU_PIECE)

    @property
    def batch_weights(self) -> int:
        if self.batch is None:
            return self.piece_weights if self.device.type == "cuda" else 0
        return self.batch

    @property
    def reading_threads(self) -> int:
        return default_readers(self.device) if self.readers is None else self.readers

    @property
    def shards_at_once(self) -> int:
        hashing = self.checksums and self.device.type == "cuda"
        return self.interleaved or (_SHARDS_AT_ONCE if hashing else 1)


@dataclass(slots=True)
class ShardJob:
    """A shard under way. Only the scheduling thread changes it, apart from `broken`.

    Attributes:
        name, size: of the output file.
        sources: the input shards it is made from, as far as they are known.
        unit: what of it is to be quantized; None if it is complete and only to be checked.
        check: what to do when it is complete, or None.
        hashed: the complete file, if its digest is to be taken by reading it; else None.
        sha256: digest of the output file once it is complete; None if it was not asked for.
        sums: of the codes and scales that were computed; None if nobody knows them.
        origin: where those begin in the file.
        broken: names of weights that hold NaN or infinity.
        outstanding: tasks handed out and not settled.
        stage: `quantize` or `check`.
        reported: bytes of a shard that is only checked that progress was told of.
    """

    name: str
    size: int
    settings: Settings
    files: Files = field(default_factory=Files)
    sources: tuple[Shard, ...] = ()
    unit: Unit | None = None
    check: Check | None = None
    hashed: Path | None = None
    writer: ShardWriter | None = None
    digest: OrderedDigest | None = None
    sha256: str | None = None
    sums: Sums | None = None
    origin: Origin | None = None
    broken: set[str] = field(default_factory=set)
    outstanding: int = 0
    all_submitted: bool = False
    stage: str = "quantize"
    reported: int = 0

    def open_output(self, folder: Path) -> None:
        """Create the output file under its temporary name."""
        plan = self.unit.plan
        self.writer = ShardWriter(folder / plan.name, plan.header, plan.size, shared=self.unit.parts > 1)
        self.sums, self.origin = Sums(), Origin.of(plan.outputs())
        if self.settings.checksums:
            self.digest = OrderedDigest(plan.header)

    def tasks(self, on_bytes: Callable[[str, int], None], ahead: ReadAhead) -> Iterator[Task]:
        """One task for each of this unit's pieces, or batches of them."""

        def settle(outcome: tuple[int, Future, Sums]) -> None:
            count, written, sums = outcome
            written.result()
            self.sums += sums
            on_bytes(self.name, count)

        found = pieces(self.unit, self.settings.piece_weights)
        for batch in batches(found, self.settings.batch_weights):
            function, way = self._step_of(batch[0][0])
            read = partial(self._read, batch)
            if self.settings.reading_threads:
                read = partial(_result_of, ahead.submit(read, "in", way))
            yield partial(function, batch=batch, read=read), settle

    def _step_of(self, item: Matrix | Passthrough | Rewritten) -> tuple[Callable, Way]:
        """What is done to an item's pieces, and how they are read ahead.

        Read directly, bytes lie in their buffer as in the input; what is written from where it was read
        must lie there as in the output, to be written directly.
        """
        if isinstance(item, Passthrough):
            return self._copy, Way.CACHE
        if isinstance(item, Rewritten):
            return (self._change, Way.CACHE) if item.scale is None else (self._restore, Way.NEAREST)
        return self._quantize, Way.NEAREST

    def _read(self, batch: list[Piece], lane: Lane, name: str, way: Way = Way.CACHE) -> torch.Tensor:
        """The input's bytes of a batch, uint8, in the host buffer of that name."""
        (item, first, _), (last_item, _, last) = batch[0], batch[-1]
        if isinstance(item, Passthrough):
            start, end = (item.start + item.input_bytes(offset) for offset in (first, last))
        else:
            start, end = input_start(item, first), input_start(last_item, last)
        path = item.source.path if isinstance(item, Rewritten) else self.unit.plan.source.path
        return lane.read(name, self.files, path, start, end - start, way)

    def _quantize(
        self, lane: Lane, batch: list[Rows], read: Callable[[Lane, str], torch.Tensor]
    ) -> tuple[int, Future, Sums]:
        """Rows of matrices, from file to file. Returns (input bytes, future of `_write`, their sums)."""
        matrix, first, _ = batch[0]
        at = codes_start(matrix, first), scales_start(matrix, first)
        raw = read(lane, "in")
        host = raw.view(DTYPES[matrix.dtype])
        if self.settings.merge is not None:
            merge_batch(self.settings.merge, ((m.weight.name, m.columns, *span) for m, *span in batch), host)
        weights = lane.to_device(host)
        codes, scales = convert_batch(self.settings.convert, batch, weights)
        sums = torch.stack(
            [
                sum_codes(codes, at[0] - self.origin.codes),
                sum_scales(scales, at[1] - self.origin.scales),
            ]
        )
        output = lane.next_output()
        codes = lane.to_host(f"codes {output}", codes)
        scales = lane.to_host(f"scales {output}", scales)
        sums = lane.to_host("sums", sums)
        lane.synchronize()
        self._note_broken(batch, scales.view(torch.bfloat16))
        written = lane.write_behind(self._write, (at[0], as_bytes(codes)), (at[1], as_bytes(scales)))
        return len(raw), written, Sums() + Sums(*sums.view(torch.int64).tolist())

    def _note_broken(self, batch: list[Rows], scales: torch.Tensor) -> None:
        if not bool(scales.isfinite().all()):
            counts = [blocks(last - first) * blocks(matrix.columns) for matrix, first, last in batch]
            for (matrix, _, _), own in zip(batch, scales.split(counts), strict=True):
                if not bool(own.isfinite().all()):
                    self.broken.add(matrix.weight.name)

    def _copy(
        self, lane: Lane, batch: list[Bytes], read: Callable[[Lane, str], torch.Tensor]
    ) -> tuple[int, Future, Sums]:
        """Bytes of a tensor that is kept, or its values rounded. Returns as `_quantize`."""
        ((item, first, last),) = batch
        output = lane.next_output()
        raw = kept = read(lane, f"kept {output}")
        if item.dtype:
            kept = lane.host(f"rounded {output}", last - first)
            kept.view(DTYPES[item.output.dtype]).copy_(raw.view(DTYPES[item.dtype]))
        if not is_finite(kept, item.output.dtype):
            self.broken.add(item.output.name)
        written = lane.write_behind(self._write, (output_start(item, first), as_bytes(kept)))
        return len(raw), written, Sums()

    def _change(
        self, lane: Lane, batch: list[RewrittenRows], read: Callable[[Lane, str], torch.Tensor]
    ) -> tuple[int, Future, Sums]:
        """Rows of a matrix that are moved, and changed by adapters. Returns as `_quantize`."""
        ((item, first, _),) = batch
        raw = read(lane, f"kept {lane.next_output()}")
        if not merge_bytes(self.settings.merge, item, raw, first):
            self.broken.add(item.name)
        written = lane.write_behind(self._write, (output_start(item, first), as_bytes(raw)))
        return len(raw), written, Sums()

    def _restore(
        self, lane: Lane, batch: list[RewrittenRows], read: Callable[[Lane, str], torch.Tensor]
    ) -> tuple[int, Future, Sums]:
        """Rows of a matrix that are turned back from FP8. Returns as `_quantize`."""
        ((item, first, _),) = batch
        raw = read(lane, "in")
        rows, sound = restore(lane, self.files, item, raw, first, f"rows {lane.next_output()}")
        if not sound:
            self.broken.add(item.name)
        written = lane.write_behind(self._write, (output_start(item, first), as_bytes(rows)))
        return len(raw), written, Sums()

    def _write(self, *chunks: tuple[int, memoryview]) -> None:
        """Write (offset, data) chunks, of which the first is next in the file, and have them hashed."""
        hashed = None
        if self.digest:
            hashed = self.digest.add(*chunks[0])
            for start, data in chunks[1:]:
                self.digest.add(start, bytes(data))
        for start, data in chunks:
            self.writer.write(start, data)
        if hashed:
            hashed.result()

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
        for source in self.sources:
            self.files.refuse_changed(source)

    def make_durable(
        self,
        is_last_part: Callable[[Unit], bool],
        add_up: Callable[[Unit, Sums], Sums] = lambda unit, sums: sums,
    ) -> bool:
        """Give the output its name, if this was its last part. Runs in the committing thread."""
        if self.unit.parts > 1:
            self.writer.hand_over()  # before it is counted: what is counted must stay
            add_up(self.unit, self.sums)
            if not is_last_part(self.unit):
                return False
            self.sums = add_up(self.unit, Sums())  # those of all parts by now
        self.writer.commit()
        return True

    def hash_tasks(self, ahead: ReadAhead) -> Iterator[Task]:
        """Tasks that hash the complete file, if that was asked for."""
        if self.hashed is None:
            return
        self.digest = OrderedDigest(b"")

        def hash_piece(_: Lane, start: int, read: Future) -> None:
            self.digest.add(start, as_bytes(read.result())).result()

        for start in range(0, self.size, COPY_PIECE):
            count = min(COPY_PIECE, self.size - start)
            read = ahead.submit(lambda lane, s=start, n=count: lane.read("in", self.files, self.hashed, s, n))
            yield partial(hash_piece, start=start, read=read), lambda _: None

    def finish_checksum(self) -> None:
        """Take the digest of the output file, all of which is written."""
        if self.digest:
            self.sha256 = self.digest.hexdigest(self.size)

    def drop_checksum(self) -> None:
        """Hash no more, and let those go on that wait for it."""
        if self.digest:
            self.digest.drop()

    def close(self) -> None:
        """Release files; removes the partial output of a shard that was not completed."""
        if self.writer is not None:
            self.writer.abandon()
            self.writer = None
        self.files.close()


def is_finite(raw: torch.Tensor, dtype: str) -> bool:
    """Whether some bytes of a tensor hold neither NaN nor infinity.

    Args:
        raw: uint8 [bytes], whole elements.
        dtype: safetensors' name of theirs; other than floats always are.
    """
    kind = torch.float64 if dtype == "F64" else DTYPES.get(dtype)
    if kind is None or not len(raw):
        return True
    # Four times as fast as isfinite().all(), and one pass; NaN goes through aminmax.
    return bool(torch.stack(raw.view(kind).aminmax()).isfinite().all())


def _result_of(read: Future, _lane: Lane, _name: str) -> torch.Tensor:
    """What was read ahead, in a buffer of its own."""
    return read.result()
