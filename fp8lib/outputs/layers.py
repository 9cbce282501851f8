"""A decoder layer as an engine computes it with a directory's weights, in float32.

The layer is transformers' own, in float32. Three things in it differ:

- An FP8 weight is what its codes and scales say, or what an engine makes of them while it loads.
- The input of a Linear whose weight is FP8 is quantized first, as engines do at run time.
- The experts of a layer stay in memory as they lie in the files, FP8 or BF16, and each is widened when its
  tokens come: in float32 all of them would take 26 GB in a layer of 397B-A17B.

Why float32: engines add up FP8 products in float32, and FP8 times a scale needs more bits than BF16 has.
What lies between the matrix products is BF16 in an engine. Rounding there is part of every BF16 model, too;
computing it in float32 on both sides leaves quantization as the only difference between them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.rules import expert_weight, one_expert_part, without_prefix
from fp8lib.checkpoint.untrusted import printable
from fp8lib.model import internals
from fp8lib.model.stored_weights import FLOATS, Stored, StoredWeights, fill_layer
from fp8lib.numerics import e4m3, served
from fp8lib.numerics.activations import as_quantized
from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.streaming.lanes import Files

SCALE_SUFFIX = "_scale_inv"
_PIECE = 1 << 24
"""FP8 weights dequantized at a time."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What an engine does with FP8 modules. docs/comparing-outputs.md says which engine does what.

    Attributes:
        quantizes_activations: inputs are rounded to FP8; weight-only kernels leave them.
        activation_powers: with scales that are powers of two.
        requantizes_linears, requantizes_experts: weights get power-of-two scales while they load.
    """

    quantizes_activations: bool = True
    activation_powers: bool = False
    requantizes_linears: bool = False
    requantizes_experts: bool = False

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """What a matrix product with an FP8 weight gets in place of x."""
        return as_quantized(x, power_of_two=self.activation_powers) if self.quantizes_activations else x


SERVINGS = {
    "written": Serving(),
    "ue8m0": Serving(activation_powers=True, requantizes_linears=True, requantizes_experts=True),
    "vllm-hopper": Serving(activation_powers=True, requantizes_linears=True),
}
"""The values of --served."""


@dataclass(frozen=True, slots=True)
class ServedLayers:
    """Layers of a directory, FP8 or not; a `layerwise.Source`.

    Attributes:
        weights: its tensors.
        serving: what an engine does where a weight is FP8.
    """

    weights: StoredWeights
    serving: Serving

    def load(self, layer: torch.nn.Module, index: int, files: Files, device: torch.device) -> torch.nn.Module:
        """A layer, ready to run, made of a float32 one on the meta device.

        Raises:
            Fp8Error: tensors are missing or of the wrong shape, or FP8 in a way that engines do not read.
        """
        tensors, name = self.weights.layer(index), self.weights.layer_name(index)
        if (experts := internals.experts_of(layer)) is not None:
            projections = _load_experts(experts, tensors, self.serving, files, device, name)
            own = Experts(projections, internals.activation_of(experts), self.serving)
            internals.replace_experts(layer, own)
        layer = layer.to_empty(device=device)
        scales = {key: stored for key, stored in tensors.items() if key.endswith(SCALE_SUFFIX)}

        def read(stored: Stored, place: torch.Tensor) -> None:
            if stored.tensor.dtype != "F8_E4M3":
                stored.require(place.shape)
                stored.read_into(place, files)
                return
            codes, scale = _require_fp8(stored, names[stored.tensor.name], scales, place.shape)
            for first in range(0, len(place), step := _rows(place.shape[1])):
                piece = place[first : first + step]
                values = _read_fp8(codes, scale, first, piece, files)
                piece.copy_(_dequantized(*values, self.serving.requantizes_linears))

        names = {stored.tensor.name: key for key, stored in tensors.items()}
        fill_layer(layer, tensors, files, name, read)
        if self.serving.quantizes_activations:
            for path, module in layer.named_modules():
                weight = tensors.get(f"{path}.weight")
                if weight is not None and weight.tensor.dtype == "F8_E4M3":
                    module.register_forward_pre_hook(self._quantize_input)
        return layer

    def _quantize_input(self, _module: torch.nn.Module, args: tuple) -> tuple:
        return (self.serving.activations(args[0]), *args[1:])


# --- FP8 weights -------------------------------------------------------------------------------


def _require_fp8(
    stored: Stored, key: str, scales: dict[str, Stored], shape: torch.Size
) -> tuple[Stored, Stored]:
    """An FP8 weight and its scales, checked.

    Raises:
        Fp8Error: it is no FP8 matrix with 128x128 blocks.
    """
    if tuple(stored.tensor.shape) != tuple(shape) or len(shape) != 2:
        raise Fp8Error(
            f"{stored}: F8_E4M3 {list(stored.tensor.shape)} where config.json makes it {list(shape)}"
        )
    scale = scales.get(key + SCALE_SUFFIX)
    if scale is None:
        raise Fp8Error(f"{stored}: FP8 without a {printable(key + SCALE_SUFFIX)}; complete the checkpoint")
    expected = (blocks(shape[0]), blocks(shape[1]))
    if scale.tensor.shape != expected or scale.tensor.dtype not in FLOATS:
        shown = f"{printable(scale.tensor.dtype)} {list(scale.tensor.shape)}"
        raise Fp8Error(f"{scale}: {shown} where blocks of {BLOCK}x{BLOCK} have {list(expected)}")
    return stored, scale


def _rows(columns: int) -> int:
    """Rows dequantized at a time: whole blocks."""
    return max(1, _PIECE // (columns * BLOCK)) * BLOCK


def _read_fp8(
    codes: Stored, scale: Stored, first: int, place: torch.Tensor, files: Files
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 scales of the rows from `first` on that belong to `place`, on its device."""
    rows, columns = place.shape
    found = torch.empty(rows, columns, dtype=torch.uint8, device=place.device)
    codes.read_pieces(found.view(-1), torch.uint8, files, first * columns)
    values = torch.empty(blocks(rows), blocks(columns), device=place.device)
    scale.read_into(values, files, first // BLOCK * blocks(columns))
    return found.view(e4m3.DTYPE), values


def _dequantized(codes: torch.Tensor, scales: torch.Tensor, requantizes: bool) -> torch.Tensor:
    """What an engine multiplies with, float32."""
    if requantizes:
        codes, scales = served.requantize(codes, scales)
    return e4m3.dequantize(codes, scales)


# --- experts -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Projection:
    """The same projection of all experts of a layer.

    Attributes:
        weights: [experts, rows, columns], E4M3 codes or floats.
        scales: float32 [experts, ceil(rows/128), ceil(columns/128)]; None if the weights are floats.
    """

    weights: torch.Tensor
    scales: torch.Tensor | None

    def of(self, expert: int) -> torch.Tensor:
        """One expert's matrix, float32."""
        if self.scales is None:
            return self.weights[expert].float()
        return e4m3.dequantize(self.weights[expert], self.scales[expert])


class Experts(torch.nn.Module):
    """Takes the place of the experts of a layer: the same function of the same arguments, in float32.

    Args:
        projections: "gate_proj", "up_proj" and "down_proj".
        activation: of the gate.
        serving: what an engine does where a projection is FP8.
    """

    def __init__(
        self,
        projections: dict[str, Projection],
        activation: Callable[[torch.Tensor], torch.Tensor],
        serving: Serving,
    ) -> None:
        super().__init__()
        self._projections, self._activation, self._serving = projections, activation, serving

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, channels] of the tokens, [tokens, k] their experts, [tokens, k] the weights of these."""
        gate, up, down = (self._projections[name] for name in ("gate_proj", "up_proj", "down_proj"))
        result = torch.zeros_like(hidden)
        inputs = self._input(hidden, gate), self._input(hidden, up)
        experts, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=len(gate.weights)).tolist()
        first = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            slots = order[first : first + count]
            first += count
            tokens = slots // chosen.shape[1]
            inner = self._activation(inputs[0][tokens] @ gate.of(expert).T)
            inner *= inputs[1][tokens] @ up.of(expert).T
            output = self._input(inner, down) @ down.of(expert).T
            result.index_add_(0, tokens, output * weights.flatten()[slots, None])
        return result

    def _input(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        return x if projection.scales is None else self._serving.activations(x)


def _load_experts(
    module: torch.nn.Module,
    tensors: dict[str, Stored],
    serving: Serving,
    files: Files,
    device: torch.device,
    name: str,
) -> dict[str, Projection]:
    """All experts of a layer, in whichever layout they lie in the files.

    Raises:
        Fp8Error: one is missing, of the wrong shape, or unlike the others.
    """
    count, rows, columns = module.down_proj.shape
    shapes = {"gate_proj": (columns, rows), "up_proj": (columns, rows), "down_proj": (rows, columns)}
    _refuse_too_many(tensors, count, name)
    loaded = {}
    for projection, shape in shapes.items():
        keys = [expert_weight("mlp.experts", e, projection) for e in range(count)]
        fused = "mlp.experts.down_proj" if projection == "down_proj" else "mlp.experts.gate_up_proj"
        if fused in tensors:
            loaded[projection] = _from_fused(tensors[fused], projection, (count, *shape), files, device)
            continue
        for key in keys:
            if key not in tensors:
                raise Fp8Error(f"{printable(name)}.{key}: missing; complete the checkpoint")
        loaded[projection] = _from_single(keys, shape, tensors, serving, files, device)
    return loaded


def _refuse_too_many(tensors: dict[str, Stored], count: int, name: str) -> None:
    for key in tensors:
        part = one_expert_part(f"layers.0.{key}")
        if part and part[1] >= count:
            raise Fp8Error(f"{printable(name)}.{key}: config.json makes it {count} experts; repair the model")


def _from_fused(
    stored: Stored, projection: str, shape: tuple[int, int, int], files: Files, device: torch.device
) -> Projection:
    """A projection of a fused tensor: gate_up_proj holds gate above up."""
    count, rows, columns = shape
    parts = 1 if projection == "down_proj" else 2
    stored.require((count, parts * rows, columns))
    weights = torch.empty(shape, dtype=FLOATS[stored.tensor.dtype], device=device)
    offset = rows * columns if projection == "up_proj" else 0
    for expert in range(count):
        stored.read_into(weights[expert], files, expert * parts * rows * columns + offset)
    return Projection(weights, None)


def _from_single(
    keys: list[str],
    shape: tuple[int, int],
    tensors: dict[str, Stored],
    serving: Serving,
    files: Files,
    device: torch.device,
) -> Projection:
    """A projection of tensors that hold one expert each, all FP8 or all of one float dtype."""
    kind = tensors[keys[0]].tensor.dtype
    for key in keys:
        if tensors[key].tensor.dtype != kind:
            raise Fp8Error(
                f"{tensors[key]}: {printable(tensors[key].tensor.dtype)}, but {printable(kind)} in the "
                "layer's first expert; engines take all experts of a layer in one"
            )
    if kind != "F8_E4M3":
        tensors[keys[0]].require(shape)
        weights = torch.empty(len(keys), *shape, dtype=FLOATS[kind], device=device)
        for place, key in zip(weights, keys, strict=True):
            tensors[key].require(shape)
            tensors[key].read_into(place, files)
        return Projection(weights, None)
    codes = torch.empty(len(keys), *shape, dtype=e4m3.DTYPE, device=device)
    scales = torch.empty(len(keys), blocks(shape[0]), blocks(shape[1]), device=device)
    for expert, key in enumerate(keys):
        found = _require_fp8(tensors[key], key, tensors, torch.Size(shape))
        values = _read_fp8(*found, 0, codes[expert], files)
        if serving.requantizes_experts:
            values = served.requantize(*values)
        codes[expert].view(torch.uint8).copy_(values[0].view(torch.uint8))
        scales[expert].copy_(values[1])
    return Projection(codes, scales)


def bytes_of_layers(original: Checkpoint) -> dict[str, int]:
    """What each layer takes in memory, by its name: experts as they lie in the files, the rest in float32."""
    sizes: Counter[str] = Counter()
    for shard in original.shards:
        for tensor in shard.tensors:
            name = without_prefix(tensor.name)
            if name.startswith("layers."):
                experts = ".mlp.experts." in name
                layer = ".".join(name.split(".")[:2])
                sizes[layer] += tensor.nbytes if experts else 4 * math.prod(tensor.shape)
    return sizes
