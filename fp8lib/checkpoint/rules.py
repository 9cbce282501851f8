"""Which tensor is quantized, which is kept and why, and which modules engines fuse into one.

The two tables below are the only place that knows: the plan, `modules_to_not_convert`, the calibration
hooks and the verifier all ask this module.

Engines load several modules into one parameter with one quantization scheme, and refuse a group of which
only a part is FP8. `fusion_group` names the group; the plan quantizes a group whole or not at all. A
fused parameter also needs every part to end on a block boundary (vLLM and SGLang: "output_partition_size
is not divisible by weight quantization block_n"), and their FP8 kernels quantize activations in groups
of 128 input channels. `unservable_shape` holds that knowledge.
"""

import re

from fp8lib.numerics.blocks import BLOCK

SUPPORTED_MODEL_TYPES = ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
"""`model_type` of config.json; Qwen3.6 checkpoints carry the same names."""

_LAYER = r"(?P<layer>(?:.+\.)?layers\.\d+)\."

# Modules whose weight becomes FP8: pattern of the module's name -> name of the group engines fuse it into.
_QUANTIZED = tuple(
    (re.compile(f"{_LAYER}(?:{module})$"), group)
    for module, group in (
        (r"self_attn\.[qkv]_proj", "self_attn.qkv_proj"),
        (r"self_attn\.o_proj", "self_attn.o_proj"),
        (r"linear_attn\.in_proj_(?:qkv|z)", "linear_attn.in_proj_qkvz"),
        (r"mlp\.(?:gate|up)_proj", "mlp.gate_up_proj"),
        (r"mlp\.down_proj", "mlp.down_proj"),
        (r"mlp\.experts\.\d+\.(?:gate|up|down)_proj", "mlp.experts"),
    )
)

# Why everything else keeps its bytes; the first pattern that a tensor's name matches says it.
_KEPT = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(?:^|\.)visual\.", "vision tower: small, sensitive, BF16 in the official releases"),
        (r"(?:^|\.)embed_tokens\.", "embedding: a table look-up, not a matrix product"),
        (r"(?:^|\.)lm_head\.", "output head: its error goes straight into the logits"),
        (r"norm[^.]*\.weight$", "norm"),
        (r"\.linear_attn\.in_proj_[ab]\.", "decay and write gates: tiny, and exponentiated"),
        (r"\.linear_attn\.out_proj\.", "linear attention output: large absolute errors on fine-tunes"),
        (r"\.linear_attn\.", "linear attention state: convolution, decay, time step"),
        (r"\.mlp\.gate\.", "router: a small error sends tokens to other experts"),
        (r"\.shared_expert(?:_gate)?\.", "shared expert: small, and every token passes through it"),
        (r"(?:^|\.)mtp\.fc\.", "draft head input: small, BF16 in the official releases"),
        (r"\.bias$", "bias"),
    )
)

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
    """The group of modules that engines load as one, if the rules quantize this tensor.

    Args:
        tensor: full name in the checkpoint, `….weight`.

    Returns:
        A full name such as `model.layers.3.self_attn.qkv_proj`, or `model.layers.3.mlp.experts` for every
        expert of a layer; None if the rules keep the tensor as it is.
    """
    module = module_of(tensor)
    if module is None or ".visual." in f".{tensor}":
        return None
    for pattern, group in _QUANTIZED:
        if match := pattern.match(module):
            return f"{match['layer']}.{group}"
    return None


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
    if rows % BLOCK and not group.endswith(("o_proj", "down_proj")):
        return f"engines fuse whole blocks of {BLOCK}: {rows} output features are no multiple"
    return None
