"""Which tensor is quantized, which is kept and why, and which modules engines fuse into one.

The two tables below are the only place that knows: the plan, `modules_to_not_convert`, the calibration
hooks and the verifier all ask this module.

Engines load several modules into one parameter with one quantization scheme, and refuse a group of which
only a part is FP8. `fusion_group` names the group; the plan quantizes a group whole or not at all. A
fused parameter also needs every part to end on a block boundary (vLLM and SGLang: "output_partition_size
is not divisible by weight quantization block_n"), and their FP8 kernels quantize activations in groups
of 128 input channels. `unservable_shape` holds that knowledge.

A `Selection` is what a user asks for: one of the eligible sets, and changes to it by name.
"""

import re
from dataclasses import dataclass

from fp8lib.numerics.blocks import BLOCK

SUPPORTED_MODEL_TYPES = ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
"""`model_type` of config.json; Qwen3.6 checkpoints carry the same names."""

ELIGIBILITIES = ("toolkit", "official", "auto")
"""Sets of modules to quantize. `official` is what Qwen's own FP8 releases quantize, more than `toolkit`;
`auto` is that without the fusion groups of which a weight would FAIL."""

KEPT_DTYPES = {"bfloat16": "BF16"}
"""What `--kept_dtype` takes -> safetensors' name of it."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What is asked to be quantized.

    Attributes:
        eligibility: one of `ELIGIBILITIES`.
        keep: fnmatch patterns of module names; the fusion groups they touch are kept. They win over all else.
        quantize: fnmatch patterns of module names; the fusion groups they touch are quantized.
        keep_failing: whether fusion groups of which a weight would FAIL are kept, in any set.
        kept_groups: (fusion group, reason) of groups kept for what their weights are, not for their names.
        kept_dtype: "BF16" to round kept F32 and F16 tensors to it, but for those that `keeps_precision`
            names; None to keep all bytes.
    """

    eligibility: str = "toolkit"
    keep: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    keep_failing: bool = False
    kept_groups: tuple[tuple[str, str], ...] = ()
    kept_dtype: str | None = None

    def settings(self) -> dict[str, object]:
        """What decides bytes, as JSON, whatever the order of the patterns."""
        return {
            "eligibility": self.eligibility,
            "keep_bf16": sorted(set(self.keep)),
            "quantize": sorted(set(self.quantize)),
            "kept_dtype": self.kept_dtype,
            **({"keep_failing": True} if self.keep_failing else {}),
            **({"kept_groups": dict(self.kept_groups)} if self.by_trial else {}),
        }

    @property
    def by_trial(self) -> bool:
        """Whether weights must be quantized in memory first, to know which groups are kept."""
        return self.keep_failing or self.eligibility == "auto"


_LAYER = r"(?P<layer>(?:.+\.)?layers\.\d+)\."

# Modules whose weight can become FP8: the smallest set they belong to, the pattern of the module's name, and
# the group engines fuse it into.
_QUANTIZED = tuple(
    (eligibility, re.compile(f"{_LAYER}(?:{module})$"), group)
    for eligibility, module, group in (
        ("toolkit", r"self_attn\.[qkv]_proj", "self_attn.qkv_proj"),
        ("toolkit", r"self_attn\.o_proj", "self_attn.o_proj"),
        ("toolkit", r"linear_attn\.in_proj_(?:qkv|z)", "linear_attn.in_proj_qkvz"),
        ("toolkit", r"mlp\.(?:gate|up)_proj", "mlp.gate_up_proj"),
        ("toolkit", r"mlp\.down_proj", "mlp.down_proj"),
        ("toolkit", r"mlp\.experts\.\d+\.(?:gate|up|down)_proj", "mlp.experts"),
        ("official", r"linear_attn\.out_proj", "linear_attn.out_proj"),
        ("official", r"mlp\.shared_expert\.(?:gate|up)_proj", "mlp.shared_expert.gate_up_proj"),
        ("official", r"mlp\.shared_expert\.down_proj", "mlp.shared_expert.down_proj"),
    )
)
_ONLY_OFFICIAL = tuple(f".{group}" for eligibility, _, group in _QUANTIZED if eligibility == "official")
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")
"""Ends of groups of one module whose output engines do not cut: its last block may be smaller."""

_FOLLOWED = "FP8 in the official releases; kept, because the toolkit that this tool follows measured large "

# Why everything else keeps its bytes; the first pattern that a tensor's name matches says it.
_KEPT = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(?:^|\.)visual\.", "vision tower: small, sensitive, BF16 in the official releases"),
        (r"(?:^|\.)embed_tokens\.", "embedding: a table look-up, not a matrix product"),
        (r"(?:^|\.)lm_head\.", "output head: its error goes straight into the logits"),
        (r"norm[^.]*\.weight$", "norm"),
        (r"\.linear_attn\.in_proj_[ab]\.", "decay and write gates: tiny, and exponentiated"),
        (
            r"\.linear_attn\.out_proj\.",
            "linear attention output: " + _FOLLOWED + "absolute errors in it on fine-tunes",
        ),
        (r"\.linear_attn\.", "linear attention state: convolution, decay, time step"),
        (r"\.mlp\.gate\.", "router: a small error sends tokens to other experts"),
        (r"\.shared_expert\.", "shared expert: " + _FOLLOWED + "absolute errors in it on fine-tunes"),
        (r"\.shared_expert_gate\.", "gate of the shared expert: a single row, BF16 in the official releases"),
        (r"(?:^|\.)mtp\.fc\.", "draft head input: small, BF16 in the official releases"),
        (r"\.bias$", "bias"),
    )
)

_PRECISE = re.compile(r"norm[^.]*\.(?:weight|bias)$|\.mlp\.gate\.|\.(?:A_log|dt_bias)$")
"""Norms, routers, the state of linear attention: small, and engines compute with them in F32."""

_PREFIX = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(?=layers\.|mtp\.)")

_FUSED_EXPERTS = re.compile(_LAYER + r"mlp\.experts\.(?P<part>gate_up_proj|down_proj)$")
_ONE_EXPERT = re.compile(_LAYER + r"mlp\.experts\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight$")


def without_prefix(name: str) -> str:
    """A tensor's or module's name from `layers.` or `mtp.` on: the prefix is what loaders disagree about."""
    return _PREFIX.sub("", name)


def canonical(name: str) -> str:
    """A tensor's name without the prefix that loaders disagree about and without `.weight`."""
    return without_prefix(name.removesuffix(".weight"))


def module_of(tensor: str) -> str | None:
    """`X` for `X.weight`, None for any other tensor."""
    return tensor[: -len(".weight")] if tensor.endswith(".weight") else None


def fusion_group(tensor: str) -> str | None:
    """The group of modules that engines load as one, if a tensor can be quantized at all.

    Args:
        tensor: full name in the checkpoint, `….weight`.

    Returns:
        A full name such as `model.layers.3.self_attn.qkv_proj`, or `model.layers.3.mlp.experts` for every
        expert of a layer; None if every set keeps the tensor as it is.
    """
    module = module_of(tensor)
    if module is None or ".visual." in f".{tensor}":
        return None
    for _, pattern, group in _QUANTIZED:
        if match := pattern.match(module):
            return f"{match['layer']}.{group}"
    return None


def is_eligible(group: str, eligibility: str) -> bool:
    """Whether a set, one of `ELIGIBILITIES`, holds a fusion group."""
    return eligibility != "toolkit" or not group.endswith(_ONLY_OFFICIAL)


def fused_experts_part(tensor: str) -> tuple[str, str] | None:
    """(`….mlp.experts`, `gate_up_proj` or `down_proj`) for a fused 3-D expert tensor, else None."""
    match = _FUSED_EXPERTS.match(tensor)
    if match is None or ".visual." in f".{tensor}":
        return None
    return f"{match['layer']}.mlp.experts", match["part"]


def expert_weight(experts: str, expert: int, projection: str) -> str:
    """Name of one expert's weight in the output: `….mlp.experts.{e}.{projection}.weight`."""
    return f"{experts}.{expert}.{projection}.weight"


def one_expert_part(tensor: str) -> tuple[str, int, str] | None:
    """(`….mlp.experts`, expert, `gate_proj`, `up_proj` or `down_proj`) for one expert's weight, else None.

    The inverse of `expert_weight`.
    """
    match = _ONE_EXPERT.match(tensor)
    if match is None or ".visual." in f".{tensor}":
        return None
    return f"{match['layer']}.mlp.experts", int(match["expert"]), f"{match['part']}_proj"


def reason_kept(tensor: str) -> str:
    """Why the rules keep a tensor, for a person to read."""
    for pattern, reason in _KEPT:
        if pattern.search(tensor):
            return reason
    return "not a Linear of a decoder layer"


def keeps_precision(tensor: str) -> bool:
    """Whether a kept tensor stays F32 or F16 whatever `--kept_dtype` says."""
    return bool(_PRECISE.search(tensor))


def unservable_shape(group: str, rows: int, columns: int) -> str | None:
    """Why engines could not serve this matrix in FP8, or None if they can.

    Args:
        group: what `fusion_group` returned.
        rows: output features.
        columns: input features.
    """
    if rows < BLOCK or columns < BLOCK:
        return f"a dimension under {BLOCK}"
    if columns % BLOCK:
        return f"engines quantize activations by {BLOCK}: {columns} input features are no multiple"
    if rows % BLOCK and not group.endswith(_ROW_PARALLEL):
        return f"engines fuse whole blocks of {BLOCK}: {rows} output features are no multiple"
    return None
