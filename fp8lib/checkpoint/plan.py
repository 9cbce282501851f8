"""Decides about every tensor of a checkpoint, from headers alone.

No tensor data is read here, and every refusal that headers can tell happens here, before any work. What
a plan says is what is written: the shard writer, the index, `modules_to_not_convert`, `--dry_run` and
the verifier all follow it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from fp8lib import Fp8Error, __version__
from fp8lib.checkpoint.adapters import Adapters
from fp8lib.checkpoint.directory import CONFIG, INDEX, Checkpoint, require_supported
from fp8lib.checkpoint.experts import check_experts
from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.layout import Matrix, ShardPlan, plan_shard
from fp8lib.checkpoint.matching import has_tied_head, mismatches
from fp8lib.checkpoint.rules import Selection, keeps_precision, module_of, reason_kept
from fp8lib.checkpoint.selection import decide, group_of
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import BLOCK


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that keeps its bytes, and why."""

    tensor: Tensor
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole output.

    Attributes:
        checkpoint: the input.
        selection: what was asked for.
        shards: of the output, in the input's order.
        kept: tensors that keep their bytes.
        modules_to_not_convert: as config.json lists them.
        notes: what a user should know of the selection, one line each.
        adapters: what is merged before quantizing; `merged_plan.with_adapters` gives it.
    """

    checkpoint: Checkpoint
    selection: Selection
    shards: tuple[ShardPlan, ...]
    kept: tuple[Kept, ...]
    modules_to_not_convert: tuple[str, ...]
    notes: tuple[str, ...] = ()
    adapters: Adapters | None = None

    @property
    def matrices(self) -> Iterator[Matrix]:
        return (matrix for shard in self.shards for matrix in shard.matrices)

    def outputs(self) -> Iterator[Tensor]:
        """Every tensor of the output."""
        return (tensor for shard in self.shards for tensor in shard.outputs())

    def config(self) -> dict:
        """config.json of the output."""
        config = self.checkpoint.config
        producer: dict[str, object] = {"name": "quantize_fp8", "version": __version__}
        if self.adapters:
            producer["adapters"] = list(self.adapters.fingerprints)
        return {
            **(_in_bfloat16(config) if self.selection.kept_dtype else config),
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
                "modules_to_not_convert": list(self.modules_to_not_convert),
                "producer": producer,
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


def make_plan(checkpoint: Checkpoint, selection: Selection | None = None) -> Plan:
    """Decide about every tensor.

    Args:
        checkpoint: the input.
        selection: what to quantize; the default set for None.

    Raises:
        Fp8Error: unsupported or quantized model, a dtype that cannot be quantized, experts that do not
            fit together, a pattern that does nothing, nothing to quantize, or an output that an engine
            would misread.
    """
    selection = selection or Selection()
    require_supported(checkpoint.config, checkpoint.root)
    tensors = [t for shard in checkpoint.shards for t in shard.tensors]
    for tensor in tensors:
        if tensor.dtype.startswith("F8_"):
            raise Fp8Error(
                f"{printable(tensor.name)}: {tensor.dtype}, so already quantized; give the BF16 original"
            )
    check_experts(tensors)
    decision = decide(tensors, selection)
    kept = [
        Kept(tensor, reason) for tensor in tensors if (reason := _why_kept(tensor, decision.kept)) is not None
    ]
    if len(kept) == len(tensors):
        raise Fp8Error(f"{printable(checkpoint.root)}: no weight in it can be quantized")
    kept_names = {k.tensor.name for k in kept}
    rounded = {
        t.name: selection.kept_dtype
        for t in (k.tensor for k in kept)
        if selection.kept_dtype and t.dtype in ("F32", "F16") and not keeps_precision(t.name)
    }
    shards = tuple(plan_shard(shard, kept_names, rounded) for shard in checkpoint.shards)
    check_output_names(shards)
    listed = _modules_to_not_convert(checkpoint, kept)
    plan = Plan(checkpoint, selection, shards, tuple(kept), listed, decision.notes)
    if found := mismatches(plan.outputs(), plan.config()):
        raise Fp8Error(f"{printable(checkpoint.root)}: the output would be misread: {found[0]}")
    return plan


def _in_bfloat16(config: dict) -> dict:
    """A config.json that names BF16 wherever it names F32 or F16 as the weights' dtype."""
    sections = ("text_config", "vision_config")
    keys = ("torch_dtype", "dtype")
    return {
        key: "bfloat16"
        if key in keys and value in ("float32", "float16")
        else _in_bfloat16(value)
        if key in sections and isinstance(value, dict)
        else value
        for key, value in config.items()
    }


# --- decisions ---------------------------------------------------------------------------------


def _why_kept(tensor: Tensor, kept_groups: dict[str, str]) -> str | None:
    group = group_of(tensor)
    return reason_kept(tensor.name) if group is None else kept_groups.get(group)


def check_output_names(shards: tuple[ShardPlan, ...]) -> None:
    """Refuse an output that would hold a name twice.

    Raises:
        Fp8Error: names it.
    """
    seen: set[str] = set()
    for shard in shards:
        for output in shard.outputs():
            if output.name in seen:
                raise Fp8Error(
                    f"{printable(output.name)}: the output would hold it twice; remove the stale tensor"
                )
            seen.add(output.name)


def _modules_to_not_convert(checkpoint: Checkpoint, kept: list[Kept]) -> tuple[str, ...]:
    """Every module whose weight has two or more dimensions and is not FP8.

    Kept experts are listed as their layer's `….mlp.experts`: transformers ignores the name of a single one.
    """
    modules = set()
    for tensor in (k.tensor for k in kept):
        if (group := group_of(tensor)) and group.endswith(".experts"):
            modules.add(group)
        elif len(tensor.shape) >= 2 and (module := module_of(tensor.name)):
            modules.add(module)
    if has_tied_head(checkpoint.config) and any(m.endswith("embed_tokens") for m in modules):
        # The head is the embedding then: a module with a BF16 weight that the files do not name.
        modules.add("lm_head")
    return tuple(sorted(modules))
