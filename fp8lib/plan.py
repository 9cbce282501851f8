"""From headers to every byte of the output: names, dtypes, shapes, source rows, file offsets.

No tensor data is read here, and every refusal that headers can tell happens here, before any work. What
a plan says is what is written: the shard writer, the index, `modules_to_not_convert`, `--dry_run` and
the verifier all follow it.

An output shard holds what its input shard held, a fused expert tensor as one matrix per expert and
projection. It is laid out so that it can be written front to back while the input is read front to back,
with every tensor aligned to its dtype: first what is kept, by element size, then the FP8 weights (whose
rows are multiples of 128 bytes), then their scales, then what is kept of one-byte dtypes.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from fp8lib import Fp8Error, __version__
from fp8lib.checkpoint import (
    CONFIG,
    INDEX,
    ITEM_SIZE,
    Checkpoint,
    Shard,
    Tensor,
    printable,
    require_supported,
)
from fp8lib.direct import PAGE
from fp8lib.rules import (
    BLOCK,
    blocks,
    expert_weight,
    fused_experts_part,
    fusion_group,
    module_of,
    reason_kept,
    unservable_shape,
)

_QUANTIZABLE = ("BF16", "F16", "F32")
_MAX_EXPERTS = 100_000
"""In a checkpoint; 397B-A17B has 31,232. An empty tensor can claim any number of them."""


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
    """Bytes copied as they are: `output.nbytes` bytes from `start` of the input shard."""

    start: int
    output: Tensor


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output shard: its header's bytes, and what goes where behind it."""

    source: Shard
    header: bytes
    matrices: tuple[Matrix, ...]
    passthrough: tuple[Passthrough, ...]
    size: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def input_bytes(self) -> int:
        """Bytes of tensor data it reads."""
        return sum(t.nbytes for t in self.source.tensors)

    def outputs(self) -> Iterator[Tensor]:
        """Every tensor of the shard, in the order of the file."""
        found = [p.output for p in self.passthrough]
        for matrix in self.matrices:
            found += (matrix.weight, matrix.scale)
        return iter(sorted(found, key=lambda o: (o.start, o.nbytes)))


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that keeps its bytes, and why."""

    tensor: Tensor
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole output."""

    checkpoint: Checkpoint
    shards: tuple[ShardPlan, ...]
    kept: tuple[Kept, ...]
    modules_to_not_convert: tuple[str, ...]

    @property
    def matrices(self) -> Iterator[Matrix]:
        return (matrix for shard in self.shards for matrix in shard.matrices)

    def config(self) -> dict:
        """config.json of the output."""
        return {
            **self.checkpoint.config,
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
                "modules_to_not_convert": list(self.modules_to_not_convert),
                "producer": {"name": "quantize_fp8", "version": __version__},
            },
        }

    def index(self) -> dict:
        """model.safetensors.index.json of the output."""
        weight_map = {o.name: s.name for s in self.shards for o in s.outputs()}
        total = sum(o.nbytes for s in self.shards for o in s.outputs())
        return {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }

    def file_sizes(self) -> dict[str, int]:
        """Bytes of every file of the output, by its path in it; the manifest of the run comes on top."""
        root = self.checkpoint.root
        sizes = {shard.name: shard.size for shard in self.shards}
        sizes |= {p.as_posix(): (root / p).stat().st_size for p in self.checkpoint.extra_files}
        return sizes | {CONFIG: len(to_json(self.config())), INDEX: len(to_json(self.index()))}

    def output_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(self.file_sizes().values())


def to_json(document: dict) -> bytes:
    """The one way this tool writes JSON: indented, UTF-8, a newline at the end."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def make_plan(checkpoint: Checkpoint) -> Plan:
    """Decide about every tensor.

    Raises:
        Fp8Error: unsupported or quantized model, a dtype that cannot be quantized, experts that do not
            fit together, or nothing to quantize.
    """
    require_supported(checkpoint.config, checkpoint.root)
    tensors = [t for shard in checkpoint.shards for t in shard.tensors]
    for tensor in tensors:
        if tensor.dtype.startswith("F8_"):
            raise Fp8Error(
                f"{printable(tensor.name)}: {tensor.dtype}, so already quantized; give the BF16 original"
            )
    _check_experts(tensors)
    kept_groups = _unservable_groups(tensors)
    kept = [
        Kept(tensor, reason) for tensor in tensors if (reason := _why_kept(tensor, kept_groups)) is not None
    ]
    if len(kept) == len(tensors):
        raise Fp8Error(f"{printable(checkpoint.root)}: no weight in it can be quantized")
    kept_names = {k.tensor.name for k in kept}
    shards = tuple(_plan_shard(shard, kept_names) for shard in checkpoint.shards)
    _check_output_names(shards)
    return Plan(checkpoint, shards, tuple(kept), _modules_to_not_convert(checkpoint, kept))


# --- decisions ---------------------------------------------------------------------------------


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


def _group_of(tensor: Tensor) -> str | None:
    part = fused_experts_part(tensor.name)
    return part[0] if part else fusion_group(tensor.name)


def _unservable_groups(tensors: list[Tensor]) -> dict[str, str]:
    """Groups that stay as they are, because of a member that engines could not serve in FP8."""
    reasons: dict[str, str] = {}
    for tensor in tensors:
        group = _group_of(tensor)
        if group is None:
            continue
        if tensor.dtype not in _QUANTIZABLE:
            raise Fp8Error(
                f"{printable(tensor.name)}: {printable(tensor.dtype)} cannot be quantized; "
                "BF16, F16 and F32 can"
            )
        matrices = matrices_of(tensor)
        if not matrices:
            reasons.setdefault(group, f"{len(tensor.shape)}-D, not a matrix")
        elif why := unservable_shape(group, *matrices[0][1:]):
            reasons.setdefault(group, why)
    return reasons


def _why_kept(tensor: Tensor, kept_groups: dict[str, str]) -> str | None:
    group = _group_of(tensor)
    return reason_kept(tensor.name) if group is None else kept_groups.get(group)


def _check_experts(tensors: list[Tensor]) -> None:
    """Experts of a layer must be complete, alike, and in one layout."""
    fused: dict[str, dict[str, Tensor]] = defaultdict(dict)
    single: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for tensor in tensors:
        if part := fused_experts_part(tensor.name):
            fused[part[0]][part[1]] = tensor
        elif (group := fusion_group(tensor.name)) and group.endswith(".experts"):
            single[group][tensor.name] = tensor
    count = sum(part.shape[0] for parts in fused.values() for part in parts.values() if part.shape)
    if count > 2 * _MAX_EXPERTS:
        raise Fp8Error(
            f"{printable(next(iter(fused)))}: {count // 2:,} experts in all, more than any model has"
        )
    for experts, parts in fused.items():
        if experts in single:
            raise Fp8Error(f"{printable(experts)}: holds fused and single experts; keep one of the two")
        _check_fused(experts, parts)
    for experts, members in single.items():
        _check_single(experts, members)


def _check_fused(experts: str, parts: dict[str, Tensor]) -> None:
    for projection in ("gate_up_proj", "down_proj"):
        if projection not in parts:
            raise Fp8Error(f"{printable(experts)}.{projection}: missing; complete the checkpoint")
        if len(parts[projection].shape) != 3:
            raise Fp8Error(f"{printable(experts)}.{projection}: {parts[projection].shape} is not 3-D")
    up, down = parts["gate_up_proj"], parts["down_proj"]
    if up.shape[1] % 2:
        raise Fp8Error(
            f"{printable(up.name)}: {up.shape[1]} rows cannot be halved into gate_proj and up_proj; "
            "repair the model"
        )
    if (up.shape[0], up.shape[2], up.shape[1] // 2) != down.shape:
        raise Fp8Error(
            f"{printable(experts)}: gate_up_proj {list(up.shape)} and down_proj {list(down.shape)} "
            "do not fit together; repair the model"
        )


def _check_single(experts: str, members: dict[str, Tensor]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    count = 1 + max(int(name[len(experts) + 1 :].split(".")[0]) for name in members)
    for e in range(min(count, len(members))):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = expert_weight(experts, e, projection)
            if name not in members:
                raise Fp8Error(f"{printable(name)}: missing; complete the checkpoint")
            expected = shapes.setdefault(projection, members[name].shape)
            if members[name].shape != expected:
                raise Fp8Error(
                    f"{printable(name)}: {list(members[name].shape)}, "
                    f"but {list(expected)} in the layer's first expert"
                )
    if shapes["gate_proj"] != shapes["up_proj"] or shapes["gate_proj"][::-1] != shapes["down_proj"]:
        raise Fp8Error(
            f"{printable(experts)}: shapes of gate, up and down do not fit: {list(shapes.values())}; "
            "repair the model"
        )


def _check_output_names(shards: tuple[ShardPlan, ...]) -> None:
    seen: set[str] = set()
    for shard in shards:
        for output in shard.outputs():
            if output.name in seen:
                raise Fp8Error(
                    f"{printable(output.name)}: the output would hold it twice; remove the stale tensor"
                )
            seen.add(output.name)


def _modules_to_not_convert(checkpoint: Checkpoint, kept: list[Kept]) -> tuple[str, ...]:
    """Every module whose weight has two or more dimensions and is not FP8."""
    modules = set()
    for tensor in (k.tensor for k in kept):
        if len(tensor.shape) >= 2 and (module := module_of(tensor.name)):
            modules.add(module)
        if (group := _group_of(tensor)) and group.endswith(".experts"):
            modules.add(group)
    config = checkpoint.config
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings", isinstance(text, dict) and text.get("tie_word_embeddings"))
    if tied and any(m.endswith("embed_tokens") for m in modules):
        # The head is the embedding then: a module with a BF16 weight that the files do not name.
        modules.add("lm_head")
    return tuple(sorted(modules))


# --- layout ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Draft:
    """An output tensor before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    kept: bool


def _place(draft: _Draft) -> int:
    """Where in the file a tensor goes, see the module's docstring; the sort is stable."""
    if draft.kept:
        item_size = ITEM_SIZE.get(draft.dtype, 1)
        return 2 if item_size == 1 else -item_size
    return 0 if draft.dtype == "F8_E4M3" else 1


def _plan_shard(shard: Shard, kept_names: set[str]) -> ShardPlan:
    drafts: list[_Draft] = []
    for tensor in shard.tensors:
        if tensor.name in kept_names:
            drafts.append(_Draft(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, True))
        else:
            for name, rows, columns in matrices_of(tensor):
                scale = (blocks(rows), blocks(columns))
                drafts.append(_Draft(name, "F8_E4M3", (rows, columns), rows * columns, False))
                drafts.append(_Draft(f"{name}_scale_inv", "BF16", scale, 2 * scale[0] * scale[1], False))
    drafts.sort(key=_place)
    header, outputs = _lay_out(drafts, shard.metadata)
    matrices, passthrough = [], []
    for tensor in shard.tensors:
        if tensor.name in kept_names:
            passthrough.append(Passthrough(tensor.start, outputs[tensor.name]))
            continue
        start = tensor.start
        for name, rows, columns in matrices_of(tensor):
            weight, scale = outputs[name], outputs[f"{name}_scale_inv"]
            matrices.append(Matrix(tensor.dtype, start, rows, columns, weight, scale))
            start += rows * columns * ITEM_SIZE[tensor.dtype]
    size = len(header) + sum(d.nbytes for d in drafts)
    return ShardPlan(shard, header, tuple(matrices), tuple(passthrough), size)


def _lay_out(drafts: list[_Draft], metadata: dict[str, str] | None) -> tuple[bytes, dict[str, Tensor]]:
    """The header's bytes, length prefix included, and each tensor's place in the file."""
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
