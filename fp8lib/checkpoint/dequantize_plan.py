"""Decides about every tensor of a block-FP8 checkpoint that is turned back into BF16, from headers alone.

An FP8 weight and its scale become one BF16 weight. Everything else keeps its bytes, its shard and its place
beside its neighbours. Experts come out in one of the two layouts that BF16 checkpoints have, whatever layout
they or the experts of a kept layer have in the input. A fused tensor lies in the shard of its first expert,
though others of its experts may come from other shards.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import CONFIG, Checkpoint, require_model_type
from fp8lib.checkpoint.experts import check_experts
from fp8lib.checkpoint.headers import ITEM_SIZE, Shard, Tensor
from fp8lib.checkpoint.layout import Draft, Extent, Passthrough, Rewritten, ShardPlan, lay_out, matrices_of
from fp8lib.checkpoint.plan import Plan, check_output_names
from fp8lib.checkpoint.rules import Selection, expert_weight, fused_experts_part, one_expert_part
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import BLOCK, blocks

EXPERT_LAYOUTS = ("fused", "per_expert")
SCALE_SUFFIX = "_scale_inv"
_SCALE_DTYPES = ("BF16", "F32")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True, slots=True)
class DequantizePlan(Plan):
    """The whole output of turning a checkpoint back."""

    expert_layout: str = "fused"

    def config(self) -> dict:
        """config.json of the output: the input's, which no longer says that it is quantized."""

        def plain(section: dict) -> dict:
            return {key: value for key, value in section.items() if key != "quantization_config"}

        return {
            key: plain(value) if key == "text_config" and isinstance(value, dict) else value
            for key, value in plain(self.checkpoint.config).items()
        }


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a matrix of the output comes from.

    Attributes:
        shard: the input shard its rows are in.
        extent: its rows.
        scale, scale_shard: its scales and the input shard they are in, if it is FP8.
        rows, columns: of the matrix.
        dtype: of the output.
    """

    shard: Shard
    extent: Extent
    scale: Extent | None
    scale_shard: Shard | None
    rows: int
    columns: int
    dtype: str


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of the output before it has a place: copied whole from `kept`, or matrix by matrix."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kept: Tensor | None
    matrices: tuple[tuple[str, _Source], ...] = ()


def make_dequantize_plan(checkpoint: Checkpoint, expert_layout: str = "fused") -> DequantizePlan:
    """Decide about every tensor.

    Args:
        checkpoint: in block FP8, of this tool, a publisher or another tool.
        expert_layout: `fused` or `per_expert`.

    Raises:
        Fp8Error: no block-FP8 checkpoint of a supported model, a weight without a scale that fits it, or
            experts that do not fit together.
    """
    _require_block_fp8(checkpoint)
    weights = [t for shard in checkpoint.shards for t in shard.tensors]
    check_experts([t for t in weights if not t.name.endswith(SCALE_SUFFIX)])
    matrices = _matrices(checkpoint)
    first_shard = {shard.name: shard for shard in checkpoint.shards}
    contents: dict[str, list[_Output]] = {name: [] for name in first_shard}
    for shard_name, output in _outputs(checkpoint, matrices, expert_layout):
        contents[shard_name].append(output)
    shards = tuple(_plan_shard(first_shard[name], found) for name, found in contents.items() if found)
    check_output_names(shards)
    return DequantizePlan(checkpoint, Selection(), shards, (), (), expert_layout=expert_layout)


def _require_block_fp8(checkpoint: Checkpoint) -> None:
    path = printable(checkpoint.root / CONFIG)
    config = checkpoint.config
    require_model_type(config, checkpoint.root)
    text = config.get("text_config")
    quantization = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    if not isinstance(quantization, dict):
        raise Fp8Error(f"{path}: has no quantization_config, so there is nothing to turn back")
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or block != [BLOCK, BLOCK]:
        raise Fp8Error(
            f"{path}: quant_method {printable(method)!r} with weight_block_size {printable(block)}; "
            f"only fp8 in blocks of [{BLOCK}, {BLOCK}] can be turned back"
        )


def _matrices(checkpoint: Checkpoint) -> dict[str, _Source]:
    """Every FP8 weight, and every expert's weight whatever its dtype, by name.

    Raises:
        Fp8Error: an FP8 tensor that is no weight with a scale, or a scale without a weight.
    """
    home = {t.name: (shard, t) for shard in checkpoint.shards for t in shard.tensors}
    found: dict[str, _Source] = {}
    for shard, tensor in home.values():
        name = printable(tensor.name)
        if tensor.dtype == "F8_E4M3":
            if len(tensor.shape) != 2 or not tensor.nbytes:
                raise Fp8Error(f"{name}: F8_E4M3 {list(tensor.shape)} is no matrix; cannot be turned back")
            found[tensor.name] = _fp8_source(shard, tensor, home)
        elif tensor.name.endswith(SCALE_SUFFIX):
            weight = home.get(tensor.name.removesuffix(SCALE_SUFFIX))
            if weight is None or not weight[1].dtype.startswith("F8_"):
                raise Fp8Error(f"{name}: a scale without an FP8 weight; complete the checkpoint")
        elif tensor.dtype.startswith("F8_"):
            raise Fp8Error(f"{name}: {tensor.dtype} cannot be turned back; F8_E4M3 with block scales can")
        elif fused_experts_part(tensor.name) or one_expert_part(tensor.name):
            if not matrices_of(tensor) or not tensor.nbytes:
                raise Fp8Error(f"{name}: {list(tensor.shape)} holds no expert's matrix; repair the model")
            start = tensor.start
            for part, rows, columns in matrices_of(tensor):
                extent = Extent(shard.path, tensor.dtype, start)
                found[part] = _Source(shard, extent, None, None, rows, columns, tensor.dtype)
                start += rows * columns * ITEM_SIZE[tensor.dtype]
    if not any(source.scale for source in found.values()):
        raise Fp8Error(f"{printable(checkpoint.root)}: no FP8 weight in it, so there is nothing to turn back")
    return found


def _fp8_source(shard: Shard, tensor: Tensor, home: dict[str, tuple[Shard, Tensor]]) -> _Source:
    rows, columns = tensor.shape
    if tensor.name + SCALE_SUFFIX not in home:
        raise Fp8Error(
            f"{printable(tensor.name)}: FP8 without a {printable(tensor.name)}{SCALE_SUFFIX}; "
            "complete the checkpoint"
        )
    scale_shard, scale = home[tensor.name + SCALE_SUFFIX]
    if scale.dtype not in _SCALE_DTYPES or scale.shape != (blocks(rows), blocks(columns)):
        raise Fp8Error(
            f"{printable(scale.name)}: {scale.dtype} {list(scale.shape)}, expected "
            f"BF16 or F32 {[blocks(rows), blocks(columns)]}; the two are not of one checkpoint"
        )
    extent = Extent(shard.path, tensor.dtype, tensor.start)
    scales = Extent(scale_shard.path, scale.dtype, scale.start)
    return _Source(shard, extent, scales, scale_shard, rows, columns, "BF16")


def _outputs(
    checkpoint: Checkpoint, matrices: dict[str, _Source], expert_layout: str
) -> Iterable[tuple[str, _Output]]:
    """(shard's name, tensor) for every tensor of the output, in the order of the input."""
    experts: dict[str, dict[tuple[int, str], _Source]] = defaultdict(dict)
    for name, source in matrices.items():
        if part := one_expert_part(name):
            experts[part[0]][part[1:]] = source
    fused: set[str] = set()
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            if tensor.name.endswith(SCALE_SUFFIX):
                continue
            stack, single = fused_experts_part(tensor.name), one_expert_part(tensor.name)
            if single and expert_layout == "fused":
                if single[0] not in fused:
                    yield from _fuse(single[0], experts[single[0]])
                fused.add(single[0])
            elif stack and expert_layout == "per_expert":
                for name, _, _ in matrices_of(tensor):
                    yield shard.name, _single(name, matrices[name])
            elif tensor.name in matrices and tensor.dtype == "F8_E4M3":
                yield shard.name, _single(tensor.name, matrices[tensor.name])
            else:
                yield shard.name, _Output(tensor.name, tensor.dtype, tensor.shape, tensor)


def _single(name: str, source: _Source) -> _Output:
    return _Output(name, source.dtype, (source.rows, source.columns), None, ((name, source),))


def _fuse(experts: str, sources: dict[tuple[int, str], _Source]) -> Iterable[tuple[str, _Output]]:
    """The two fused tensors of a layer's experts, and the shards of their first."""
    count = 1 + max(expert for expert, _ in sources)
    dtypes = {source.dtype for source in sources.values()}
    if len(dtypes) > 1:
        raise Fp8Error(
            f"{printable(experts)}: its experts are {' and '.join(sorted(dtypes))}, which no fused tensor "
            "can hold; use --expert_layout per_expert"
        )
    for part, projections in _PARTS.items():
        found = [(expert_weight(experts, e, p), sources[e, p]) for e in range(count) for p in projections]
        first = found[0][1]
        shape = (count, len(projections) * first.rows, first.columns)
        yield first.shard.name, _Output(f"{experts}.{part}", first.dtype, shape, None, tuple(found))


def _plan_shard(source: Shard, outputs: list[_Output]) -> ShardPlan:
    drafts = [
        Draft(o.name, o.dtype, o.shape, _nbytes(o), kept=o.kept is not None)
        for o in sorted(outputs, key=lambda o: 0 if o.kept else -ITEM_SIZE[o.dtype])
    ]
    header, places = lay_out(drafts, source.metadata)
    passthrough: list[Passthrough] = []
    rewritten: list[Rewritten] = []
    read: dict[str, Shard] = {}
    for output in outputs:
        place = places[output.name]
        if output.kept:
            passthrough.append(Passthrough(output.kept.start, place))
        start = place.start
        for name, matrix in output.matrices:
            item = Rewritten(name, matrix.extent, matrix.scale, matrix.rows, matrix.columns, place, start)
            rewritten.append(item)
            start += item.rows * item.row_bytes
            read |= {shard.name: shard for shard in (matrix.shard, matrix.scale_shard) if shard}
    also = tuple(shard for name, shard in sorted(read.items()) if name != source.name)
    size = len(header) + sum(d.nbytes for d in drafts)
    return ShardPlan(source, header, (), tuple(passthrough), size, tuple(rewritten), also)


def _nbytes(output: _Output) -> int:
    if output.kept:
        return output.kept.nbytes
    return sum(m.rows * m.columns for _, m in output.matrices) * ITEM_SIZE[output.dtype]
