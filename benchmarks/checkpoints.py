"""Makes checkpoints of the real models' shapes: full of random weights, or as sparse files.

Names, shapes and sharding follow the official BF16 releases: fused experts `[E, 2*I, H]`, every fourth
layer full attention, one draft layer under `mtp.`; the vision tower (0.45 B) only where it is asked for. A
sparse file has a true header and true length but no data blocks: hundreds of GB that take megabytes on disk
and read as zeros.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

BF16_BYTES = 2


@dataclass(frozen=True)
class Vision:
    """Sizes of a vision tower."""

    hidden: int = 1152
    intermediate: int = 4304
    depth: int = 27
    heads: int = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `experts` 0 for a dense one, then `intermediate` is the MLP's width.

    A shared expert is as wide as a routed one. Without `fused` every expert has tensors of its own, as in
    what transformers saves.
    """

    hidden: int
    layers: int
    intermediate: int
    experts: int = 0
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 256
    linear_key_heads: int = 16
    linear_value_heads: int = 32
    linear_head_dim: int = 128
    vocabulary: int = 248320
    mtp: bool = True
    fused: bool = True
    tied: bool = False
    vision: Vision | None = None


MODELS = {
    "397B-A17B": Shape(4096, 60, 1024, 512, heads=32, linear_value_heads=64),
    "122B-A10B": Shape(3072, 48, 1024, 256, heads=32, linear_value_heads=64),
    "35B-A3B": Shape(2048, 40, 512, 256),
    "27B": Shape(5120, 64, 17408, heads=24, kv_heads=4, linear_value_heads=48),
    "9B": Shape(4096, 32, 12288, kv_heads=4),
    "4B": Shape(2560, 32, 9216, kv_heads=4, tied=True),
    "2B": Shape(2048, 24, 6144, heads=8, linear_value_heads=16, tied=True),
    "0.8B": Shape(1024, 24, 3584, heads=8, linear_value_heads=16, tied=True),
}
"""The names count neither the draft layer (6.6 B of 397B-A17B) nor all of the vision tower."""
VISION = {"4B": Vision(1024, 4096, 24), "2B": Vision(1024, 4096, 24), "0.8B": Vision(768, 3072, 12, heads=12)}
"""Of the sizes that have a smaller tower."""
SHARDS = {"397B-A17B": 94, "122B-A10B": 39, "35B-A3B": 14}
"""Files of the BF16 releases."""
BENCHMARK = replace(MODELS["35B-A3B"], layers=4, experts=128, vocabulary=32768, mtp=False)
"""1.9 B parameters at the shapes of 35B-A3B."""


def complete(model: str) -> Shape:
    """A model with its vision tower, as released."""
    return replace(MODELS[model], vision=VISION.get(model, Vision()))


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, dimensions) of every BF16 tensor, in the order of the layers."""
    root = "model.language_model"
    yield f"{root}.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        yield from _layer(f"{root}.layers.{layer}", shape, full_attention=layer % 4 == 3)
    yield f"{root}.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)
    if shape.vision:
        yield from _vision("model.visual", shape.vision, shape.hidden)
    if shape.mtp:
        yield "mtp.fc.weight", (shape.hidden, 2 * shape.hidden)
        for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            yield f"mtp.{norm}.weight", (shape.hidden,)
        yield from _layer("mtp.layers.0", shape, full_attention=True)


def parameters(shape: Shape) -> int:
    """Number of weights of a model."""
    return sum(_nbytes(dimensions) // BF16_BYTES for _, dimensions in tensors(shape))


def _layer(name: str, s: Shape, *, full_attention: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.input_layernorm.weight", (s.hidden,)
    yield f"{name}.post_attention_layernorm.weight", (s.hidden,)
    if full_attention:
        queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
        yield f"{name}.self_attn.q_proj.weight", (2 * queries, s.hidden)
        yield f"{name}.self_attn.k_proj.weight", (keys, s.hidden)
        yield f"{name}.self_attn.v_proj.weight", (keys, s.hidden)
        yield f"{name}.self_attn.o_proj.weight", (s.hidden, queries)
        yield f"{name}.self_attn.q_norm.weight", (s.head_dim,)
        yield f"{name}.self_attn.k_norm.weight", (s.head_dim,)
    else:
        keys, values = s.linear_key_heads * s.linear_head_dim, s.linear_value_heads * s.linear_head_dim
        yield f"{name}.linear_attn.in_proj_qkv.weight", (2 * keys + values, s.hidden)
        yield f"{name}.linear_attn.in_proj_z.weight", (values, s.hidden)
        yield f"{name}.linear_attn.in_proj_a.weight", (s.linear_value_heads, s.hidden)
        yield f"{name}.linear_attn.in_proj_b.weight", (s.linear_value_heads, s.hidden)
        yield f"{name}.linear_attn.conv1d.weight", (2 * keys + values, 1, 4)
        yield f"{name}.linear_attn.A_log", (s.linear_value_heads,)
        yield f"{name}.linear_attn.dt_bias", (s.linear_value_heads,)
        yield f"{name}.linear_attn.norm.weight", (s.linear_head_dim,)
        yield f"{name}.linear_attn.out_proj.weight", (s.hidden, values)
    if not s.experts:
        yield from _mlp(f"{name}.mlp", s)
        return
    yield f"{name}.mlp.gate.weight", (s.experts, s.hidden)
    if s.fused:
        yield f"{name}.mlp.experts.gate_up_proj", (s.experts, 2 * s.intermediate, s.hidden)
        yield f"{name}.mlp.experts.down_proj", (s.experts, s.hidden, s.intermediate)
    for expert in range(0 if s.fused else s.experts):
        yield from _mlp(f"{name}.mlp.experts.{expert}", s)
    yield from _mlp(f"{name}.mlp.shared_expert", s)
    yield f"{name}.mlp.shared_expert_gate.weight", (1, s.hidden)


def _mlp(name: str, s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    for projection in ("gate_proj", "up_proj"):
        yield f"{name}.{projection}.weight", (s.intermediate, s.hidden)
    yield f"{name}.down_proj.weight", (s.hidden, s.intermediate)


def _vision(name: str, v: Vision, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    def linear(module: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.{module}.weight", (rows, columns)
        yield f"{name}.{module}.bias", (rows,)

    def norm(module: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.{module}.weight", (v.hidden,)
        yield f"{name}.{module}.bias", (v.hidden,)

    yield f"{name}.patch_embed.proj.weight", (v.hidden, 3, 2, 16, 16)
    yield f"{name}.patch_embed.proj.bias", (v.hidden,)
    yield f"{name}.pos_embed.weight", (2304, v.hidden)
    for block in (f"blocks.{number}" for number in range(v.depth)):
        yield from norm(f"{block}.norm1")
        yield from norm(f"{block}.norm2")
        yield from linear(f"{block}.attn.qkv", 3 * v.hidden, v.hidden)
        yield from linear(f"{block}.attn.proj", v.hidden, v.hidden)
        yield from linear(f"{block}.mlp.linear_fc1", v.intermediate, v.hidden)
        yield from linear(f"{block}.mlp.linear_fc2", v.hidden, v.intermediate)
    yield from norm("merger.norm")
    yield from linear("merger.linear_fc1", 4 * v.hidden, 4 * v.hidden)
    yield from linear("merger.linear_fc2", out, 4 * v.hidden)


def config(shape: Shape) -> dict:
    """What config.json says of a model's sizes, with the keys of the releases."""
    text = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "linear_num_key_heads": shape.linear_key_heads,
        "linear_num_value_heads": shape.linear_value_heads,
        "linear_key_head_dim": shape.linear_head_dim,
        "linear_value_head_dim": shape.linear_head_dim,
    }
    if shape.experts:
        text |= {"num_experts": shape.experts, "moe_intermediate_size": shape.intermediate}
        text["shared_expert_intermediate_size"] = shape.intermediate
    else:
        text["intermediate_size"] = shape.intermediate
    moe = "_moe" if shape.experts else ""
    found = {"model_type": f"qwen3_5{moe}", "text_config": text, "tie_word_embeddings": shape.tied}
    found["architectures"] = [f"Qwen3_5{'Moe' * bool(shape.experts)}ForConditionalGeneration"]
    if shape.vision:
        found["vision_config"] = {"depth": shape.vision.depth, "num_heads": shape.vision.heads}
    return found


def write(folder: Path, shape: Shape, shards: int, *, sparse: bool = False, std: float = 0.02) -> None:
    """Write a checkpoint directory.

    Args:
        folder: made if missing; existing files of the same names are replaced.
        shape: of the model.
        shards: number of files, of nearly equal size.
        sparse: leave the weights out: holes that read as zeros.
        std: of the Gaussian weights otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = _split(list(tensors(shape)), shards)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_shard(folder / name, group, sparse=sparse, std=std, seed=number)
        weight_map.update((tensor, name) for tensor, _ in group)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(shape)))


def _nbytes(dimensions: tuple[int, ...]) -> int:
    total = BF16_BYTES
    for extent in dimensions:
        total *= extent
    return total


def _split(items: list, shards: int) -> list[list]:
    target = sum(_nbytes(d) for _, d in items) / shards
    groups, size = [[]], 0
    for item in items:
        if groups[-1] and size + _nbytes(item[1]) / 2 > target * len(groups) and len(groups) < shards:
            groups.append([])
        groups[-1].append(item)
        size += _nbytes(item[1])
    return groups


def _write_shard(path: Path, group: list, *, sparse: bool, std: float, seed: int) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dimensions in group:
        start, end = end, end + _nbytes(dimensions)
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + end)
            return
        import torch

        generator = torch.Generator().manual_seed(seed)
        for _, dimensions in group:
            left = _nbytes(dimensions) // BF16_BYTES
            while left:
                count = min(left, 1 << 24)
                values = torch.randn(count, generator=generator).mul_(std).bfloat16()
                file.write(memoryview(values.view(torch.uint8).numpy()))
                left -= count
        file.flush()
        os.fsync(file.fileno())
