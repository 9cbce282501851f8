"""Where every byte of an output shard goes: names, dtypes, shapes, source rows, file offsets.

An output shard holds what its input shard held, a fused expert tensor as one matrix per expert and
projection. It is laid out so that it can be written front to back while the input is read front to back,
with every tensor aligned to its dtype: first what is kept, by element size, then the FP8 weights (whose
rows are multiples of 128 bytes), then their scales, then what is kept of one-byte dtypes. Weights that are
turned back from FP8 lie where FP8 weights would.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fp8lib.checkpoint.headers import ITEM_SIZE, Shard, Tensor
from fp8lib.checkpoint.rules import expert_weight, fused_experts_part, fusion_group
from fp8lib.numerics.blocks import blocks

PAGE = 4096
"""Bytes of a page. Direct I/O takes whole ones: no disk's sector is larger."""
SCALE_SUFFIX = "_scale_inv"
"""Of a weight's name, for its scales: despite it they are the multiplier."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix to quantize.

    Attributes:
        dtype: the input's: BF16, F16 or F32.
        start: offset of its first byte in the input shard; its rows are contiguous.
        rows, columns: output and input features.
        weight: F8_E4M3 [rows, columns], in the output shard.
        scale: BF16 [ceil(rows/128), ceil(columns/128)], in the output shard.
    """

    dtype: str
    start: int
    rows: int
    columns: int
    weight: Tensor
    scale: Tensor

    @property
    def input_row_bytes(self) -> int:
        return self.columns * ITEM_SIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Passthrough:
    """A tensor that is not quantized.

    Attributes:
        start: offset of its first byte in the input shard.
        output: the tensor in the output shard.
        dtype: the input's, if its values are rounded to the output's; None if its bytes are copied.
    """

    start: int
    output: Tensor
    dtype: str | None = None

    def input_bytes(self, nbytes: int) -> int:
        """Bytes of the input that so many of the output come from."""
        return nbytes * ITEM_SIZE[self.dtype] // ITEM_SIZE[self.output.dtype] if self.dtype else nbytes


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a matrix's bytes are: contiguous rows of `dtype` from `start` of a file on."""

    path: Path
    dtype: str
    start: int


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A matrix of the output that is not FP8 and not simply a copy of a whole tensor.

    It is turned back from FP8, or changed by adapters, or lies elsewhere than in the input because experts
    are fused or split.

    Attributes:
        name: of the matrix; that of one expert's weight where the output tensor is fused.
        source: its rows in the input.
        scale: BF16 or F32 [ceil(rows/128), ceil(columns/128)] in the input, if the source is FP8.
        rows, columns: of the matrix. A tensor of one dimension is a row; of more than two, rows of the last.
        output: the tensor of the output that it is or lies in.
        start: offset of its first byte in the output shard.
    """

    name: str
    source: Extent
    scale: Extent | None
    rows: int
    columns: int
    output: Tensor
    start: int

    @property
    def input_row_bytes(self) -> int:
        return self.columns * ITEM_SIZE[self.source.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the output."""
        return self.columns * ITEM_SIZE[self.output.dtype]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output shard: its header's bytes, and what goes where behind it.

    Attributes:
        source: the input shard of that name.
        also_reads: other input shards that parts of it come from.
    """

    source: Shard
    header: bytes
    matrices: tuple[Matrix, ...]
    passthrough: tuple[Passthrough, ...]
    size: int
    rewritten: tuple[Rewritten, ...] = ()
    also_reads: tuple[Shard, ...] = ()

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def sources(self) -> tuple[Shard, ...]:
        """Every input shard it is made from."""
        return (self.source, *self.also_reads)

    @property
    def input_bytes(self) -> int:
        """Bytes of weights it reads."""
        matrices = (*self.matrices, *self.rewritten)
        return sum(m.rows * m.input_row_bytes for m in matrices) + sum(
            p.output.nbytes for p in self.passthrough
        )

    def outputs(self) -> Iterator[Tensor]:
        """Every tensor of the shard, in the order of the file."""
        found = [p.output for p in self.passthrough]
        for matrix in self.matrices:
            found += (matrix.weight, matrix.scale)
        found += {r.output.name: r.output for r in self.rewritten}.values()
        return iter(sorted(found, key=lambda o: (o.start, o.nbytes)))


def matrices_of(tensor: Tensor) -> list[tuple[str, int, int]]:
    """(output name, rows, columns) of each matrix the rules would quantize in a tensor, in byte order."""
    if part := fused_experts_part(tensor.name):
        experts, projection = part
        if len(tensor.shape) != 3:
            return []
        count, rows, columns = tensor.shape
        names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        return [
            (expert_weight(experts, e, name), rows // len(names), columns)
            for e in range(count)
            for name in names
        ]
    if fusion_group(tensor.name) and len(tensor.shape) == 2:
        return [(tensor.name, *tensor.shape)]
    return []


def parts_of(tensor: Tensor) -> list[tuple[str, int, int]]:
    """(name, rows, columns) of each matrix in a tensor, in byte order: of each expert, or the tensor itself.

    A tensor of one dimension is a row, one of more than two has the rows of its last.
    """
    rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.shape else 1
    experts = matrices_of(tensor) if tensor.nbytes else []  # an empty tensor can claim any number of them
    return experts or [(tensor.name, rows, columns)]


def plan_shard(shard: Shard, kept_names: set[str], rounded: Mapping[str, str] | None = None) -> ShardPlan:
    """Lay out one output shard.

    Args:
        shard: of the input.
        kept_names: tensors that are not quantized.
        rounded: those of them that change their dtype -> the new one.
    """
    rounded = rounded or {}
    drafts: list[Draft] = []
    for tensor in shard.tensors:
        if tensor.name in kept_names:
            dtype = rounded.get(tensor.name, tensor.dtype)
            nbytes = tensor.nbytes * ITEM_SIZE[dtype] // ITEM_SIZE[tensor.dtype]
            drafts.append(Draft(tensor.name, dtype, tensor.shape, nbytes, True))
        else:
            for name, rows, columns in matrices_of(tensor):
                scale = (blocks(rows), blocks(columns))
                drafts.append(Draft(name, "F8_E4M3", (rows, columns), rows * columns, False))
                drafts.append(Draft(f"{name}{SCALE_SUFFIX}", "BF16", scale, 2 * scale[0] * scale[1], False))
    header, outputs = lay_out(drafts, shard.metadata)
    matrices, passthrough = [], []
    for tensor in shard.tensors:
        if tensor.name in kept_names:
            dtype = tensor.dtype if tensor.name in rounded else None
            passthrough.append(Passthrough(tensor.start, outputs[tensor.name], dtype))
            continue
        start = tensor.start
        for name, rows, columns in matrices_of(tensor):
            weight, scale = outputs[name], outputs[f"{name}{SCALE_SUFFIX}"]
            matrices.append(Matrix(tensor.dtype, start, rows, columns, weight, scale))
            start += rows * columns * ITEM_SIZE[tensor.dtype]
    size = len(header) + sum(d.nbytes for d in drafts)
    return ShardPlan(shard, header, tuple(matrices), tuple(passthrough), size)


@dataclass(frozen=True, slots=True)
class Draft:
    """An output tensor before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    kept: bool


def _place(draft: Draft) -> int:
    """Where in the file a tensor goes, see the module's docstring; the sort is stable."""
    if draft.kept:
        item_size = ITEM_SIZE.get(draft.dtype, 1)
        return 2 if item_size == 1 else -item_size
    return 0 if draft.dtype == "F8_E4M3" else 1


def lay_out(drafts: list[Draft], metadata: dict[str, str] | None) -> tuple[bytes, dict[str, Tensor]]:
    """The header's bytes, length prefix included, and each tensor's place in the file."""
    drafts = sorted(drafts, key=_place)
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for draft in drafts:
        offsets = [end, end + draft.nbytes]
        header[draft.name] = {"dtype": draft.dtype, "shape": draft.shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    # Spaces may follow: the FP8 weights begin on a page then, and all are whole pages but for edge blocks.
    first_fp8 = 8 + len(text) + sum(d.nbytes for d in drafts if _place(d) < 0)
    if first_fp8 % 8 == 0:
        text += b" " * (-first_fp8 % PAGE)
    data_start = 8 + len(text)
    outputs = {}
    for draft in drafts:
        start = data_start + header[draft.name]["data_offsets"][0]
        outputs[draft.name] = Tensor(draft.name, draft.dtype, draft.shape, start, draft.nbytes)
    return len(text).to_bytes(8, "little") + text, outputs
