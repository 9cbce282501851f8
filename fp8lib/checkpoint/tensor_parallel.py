"""Which tensor-parallel sizes the engines accept for a directory, and what each GPU holds then.

Engines cut most weights into as many parts as there are GPUs, and an FP8 weight on block boundaries only.
The rules, from the engines' source:

vLLM 0.32.0    `validate_fp8_block_shape` in vllm/model_executor/layers/quantization/utils/fp8_utils.py for
               linears. Experts whose part is no multiple of 128 are still loaded if 32 divides it: their
               scales are repeated for smaller blocks, which Triton kernels alone can read
               (`refine_fp8_moe_block_shape` in layers/fused_moe/oracle/fp8.py)
SGLang 0.5.23  `validate_block_quant_shapes` and the experts' check in
               sglang/srt/layers/quantization/fp8.py: whole blocks everywhere
both           heads are divided, and KV heads repeated when there are fewer than GPUs
               (`Qwen3NextAttention` in vllm/model_executor/models/qwen3_next.py,
               `Qwen3_5AttentionDecoderLayer` in sglang/srt/models/qwen3_5.py)

vLLM does not check a merged weight of which a part ends inside a block; it then cuts its scales in the wrong
places. Such a size counts as one that does not load.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.rules import without_prefix
from fp8lib.numerics.blocks import BLOCK

SIZES = (1, 2, 4, 8, 16)
"""The models have 16 key heads in linear attention, so no other size up to 16 divides them."""
ENGINES = ("vLLM", "SGLang")
EXPERT_PARALLELISM = "use expert parallelism"
"""End of a refusal that it helps against."""
_SMALLEST_REFINED = 32
"""Rows and columns of the smallest blocks that vLLM divides an expert's into."""
_ROW_PARALLEL = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
_LINEAR = re.compile(r"layers\.\*\..+_(?:proj|qkv|z)\.weight$|\.experts\.down_proj$")
_LAST_PARTS = ("v_proj.weight", "up_proj.weight", "in_proj_z.weight")
_HEADS = (
    ("self_attn.", "num_attention_heads"),
    ("linear_attn.", "linear_num_key_heads"),
    ("linear_attn.", "linear_num_value_heads"),
)
_OTHERS = (
    ("self_attn.", "num_key_value_heads"),
    ("linear_attn.", "linear_key_head_dim"),
    ("mlp.experts.", "num_experts"),
)
_REPLICATED = re.compile(
    r"(?:norm[^.]*\.(?:weight|bias)|mlp\.gate\.weight|shared_expert_gate\.weight|mtp\.fc\.weight|"
    r"patch_embed\..+|pos_embed\..+|(?:proj|linear_fc2)\.bias)$"
)


@dataclass(frozen=True, slots=True)
class Size:
    """One tensor-parallel size.

    Attributes:
        ranks: number of GPUs.
        refusals: engine -> why it does not load; engines that do are not in it.
        nbytes: weights on the fullest GPU, vision tower and draft layer included.
    """

    ranks: int
    refusals: dict[str, str]
    nbytes: int

    @property
    def loads_everywhere(self) -> bool:
        return not self.refusals


@dataclass(frozen=True, slots=True)
class _Kind:
    """Tensors that differ in layer and expert numbers only."""

    name: str
    fp8: bool
    shape: tuple[int, ...]


def tensor_parallel(tensors: Iterable[Tensor], config: dict) -> list[Size] | str:
    """What every size of `SIZES` does.

    Args:
        tensors: of the FP8 directory, from headers.
        config: its config.json.

    Returns:
        A row per size, or the key that config.json lacks.
    """
    kinds: Counter[_Kind] = Counter()
    nbytes: Counter[_Kind] = Counter()
    for tensor in tensors:
        name = re.sub(r"\.\d+(?=\.)", ".*", without_prefix(tensor.name))
        kind = _Kind(name, tensor.dtype == "F8_E4M3", tensor.shape)
        kinds[kind] += 1
        nbytes[kind] += tensor.nbytes
    try:
        heads = _heads(kinds, config)
    except KeyError as missing:
        return str(missing.args[0])
    return [_size(ranks, kinds, nbytes, heads) for ranks in SIZES]


def _size(ranks: int, kinds: Counter, nbytes: Counter, heads: dict[str, int]) -> Size:
    first = {engine: next(_refusals(kinds, heads, ranks, engine), None) for engine in ENGINES}
    held = sum(_share(kind, total, heads, ranks) for kind, total in nbytes.items())
    return Size(ranks, {engine: why for engine, why in first.items() if why}, held)


def _heads(kinds: Iterable[_Kind], config: dict) -> dict[str, int]:
    """Numbers of heads, as far as the tensors need them.

    Raises:
        KeyError: config.json does not say one.
    """
    text = config.get("text_config")
    sections = {"text": text if isinstance(text, dict) else config, "vision": config.get("vision_config")}
    names = [kind.name for kind in kinds]
    wanted = [("text", key, part) for part, key in (*_HEADS, *_OTHERS)]
    wanted.append(("vision", "num_heads", "visual."))
    found = {}
    for section, key, part in wanted:
        if not any(part in name for name in names):
            continue
        values = sections[section]
        value = values.get(key) if isinstance(values, dict) else None
        if type(value) is not int or value < 1:
            raise KeyError(f"vision_config.{key}" if section == "vision" else key)
        found[key] = value
    return found


def _refusals(kinds: Iterable[_Kind], heads: dict[str, int], ranks: int, engine: str) -> Iterator[str]:
    """Why an engine does not load a size, what no flag helps against first."""
    for key in (key for _, key in _HEADS if key in heads):
        if heads[key] % ranks:
            yield f"{key} {heads[key]} / {ranks} is not whole"
    kv_heads = heads.get("num_key_value_heads", 1)
    if max(kv_heads, ranks) % min(kv_heads, ranks):
        yield f"num_key_value_heads {kv_heads} and {ranks} do not divide each other"
    if engine == "vLLM" and ranks > heads.get("num_experts", ranks):
        yield f"{heads['num_experts']} experts are fewer than {ranks} GPUs"
    keys = heads.get("linear_num_key_heads", 0) * heads.get("linear_key_head_dim", 0)
    matrices = (k for k in kinds if len(k.shape) >= 2 and _LINEAR.search(k.name))
    linears = sorted({(k.name, k.fp8, k.shape[-2:]) for k in matrices})
    for name, fp8, shape in linears:
        for part, count, parts in _parts(name, shape, keys, kv_heads, ranks):
            # Uncut, a row-parallel weight may end inside a block; in vLLM a merged weight's last part, too.
            ends_inside = (*_ROW_PARALLEL, *(_LAST_PARTS if engine == "vLLM" else ()))
            on_blocks = fp8 and not (ranks == 1 and name.endswith(ends_inside))
            if why := _uneven(part, count, parts, on_blocks):
                yield why
    if heads.get("num_heads", ranks) % ranks:
        yield f"vision_config.num_heads {heads['num_heads']} / {ranks} is not whole"
    for name, fp8, shape in linears:
        if ".experts." in name and ".down_proj" in name and (why := _experts(fp8, shape, ranks, engine)):
            yield why


def _parts(
    name: str, shape: tuple[int, ...], keys: int, kv_heads: int, ranks: int
) -> Iterator[tuple[str, int, int]]:
    """(what it is, size, number of parts) of everything that engines cut in a linear that is no expert's.

    Args:
        name: of the tensor, numbers left out.
        shape: its own.
        keys: channels of linear attention's keys.
        kv_heads: key and value heads of full attention.
        ranks: the tensor-parallel size.
    """
    module = name.removesuffix(".weight").partition("*.")[2]
    kind = module.rpartition(".")[2]
    width = "shared_expert_intermediate_size" if ".shared_expert." in module else "intermediate_size"
    if ".experts." in module:
        return
    if kind in ("gate_proj", "up_proj"):
        yield width, shape[0], ranks
    elif kind == "down_proj":
        yield width, shape[1], ranks
    elif kind in ("o_proj", "out_proj"):
        yield f"{module} input", shape[1], ranks
    elif kind in ("q_proj", "in_proj_z"):
        yield f"{module} output", shape[0], ranks
    elif kind in ("k_proj", "v_proj"):
        yield f"{module} output", shape[0], min(ranks, kv_heads)
    elif kind == "in_proj_qkv":
        yield "linear attention's keys", keys, ranks
        yield "linear attention's values", shape[0] - 2 * keys, ranks


def _experts(fp8: bool, shape: tuple[int, ...], ranks: int, engine: str) -> str | None:
    """Why an engine does not cut the experts, given the shape of their down_proj; None if it does."""
    hidden, width = shape
    if fp8 and engine == "vLLM" and width % ranks == 0:
        refined = math.gcd(BLOCK, width // ranks, hidden)
        if refined >= _SMALLEST_REFINED:
            return None
    why = _uneven("moe_intermediate_size", width, ranks, fp8)
    return why and f"{why}; {EXPERT_PARALLELISM}"


def _uneven(label: str, count: int, ranks: int, blocks: bool) -> str | None:
    """What is wrong with cutting something into parts, on block boundaries if it has `blocks`."""
    if count % ranks:
        return f"{label} {count} / {ranks} is not whole"
    if blocks and count // ranks % BLOCK:
        of = f" / {ranks} = {count // ranks}" if ranks > 1 else ""
        return f"{label} {count}{of} is no multiple of {BLOCK}"
    return None


def _share(kind: _Kind, nbytes: int, heads: dict[str, int], ranks: int) -> int:
    """Bytes that the fullest GPU holds of some tensors."""
    if _REPLICATED.search(kind.name):
        return nbytes
    if re.search(r"\.[kv]_proj\.", kind.name):
        ranks = min(ranks, heads.get("num_key_value_heads", ranks))
    return -(-nbytes // ranks)
