"""The text model's tensors where a checkpoint has them: by layer, and those that are in none.

Which file holds a tensor is looked up once. Reading goes straight to where the bytes belong, through a
small buffer if device or dtype differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.headers import Shard, Tensor
from fp8lib.checkpoint.rules import one_expert_part, without_prefix
from fp8lib.checkpoint.untrusted import printable
from fp8lib.model.prompts import Batch
from fp8lib.streaming.lanes import DTYPES, Files

FLOATS = DTYPES | {"F64": torch.float64}
"""Torch's dtype for the dtypes that a weight may have which is not quantized."""
_STAGING = 1 << 25
"""Bytes read at a time on their way to another device or dtype."""
_OUTSIDE = re.compile(
    r"(?:model\.)?(?:language_model\.)?(?:model\.)?((?:embed_tokens|norm|lm_head)\.weight)$"
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor and the file it is in."""

    shard: Shard
    tensor: Tensor

    def __str__(self) -> str:
        return printable(self.tensor.name)

    def require(self, shape: Sequence[int]) -> None:
        """Refuse a tensor that is no float tensor of this shape.

        Raises:
            Fp8Error: it is another one.
        """
        if self.tensor.shape != tuple(shape) or self.tensor.dtype not in FLOATS:
            raise Fp8Error(
                f"{self}: {printable(self.tensor.dtype)} {list(self.tensor.shape)} "
                f"where config.json makes it {list(shape)}"
            )

    def read_into(self, place: torch.Tensor, files: Files, first: int = 0) -> None:
        """Fill a contiguous tensor of any float dtype and device with elements from `first` on."""
        self.read_pieces(place.view(-1), FLOATS[self.tensor.dtype], files, first)

    def read_pieces(self, flat: torch.Tensor, dtype: torch.dtype, files: Files, first: int = 0) -> None:
        """The same for a flat tensor, with `dtype` for what lies in the file."""
        start = self.tensor.start + first * dtype.itemsize
        if flat.device.type == "cpu" and flat.dtype == dtype:
            files.read_into(flat.view(torch.uint8), self.shard.path, start)
            return
        count = _STAGING // dtype.itemsize
        buffer = torch.empty(min(count, len(flat)), dtype=dtype)
        for done in range(0, len(flat), count):
            piece = buffer[: min(count, len(flat) - done)]
            files.read_into(piece.view(torch.uint8), self.shard.path, start + done * dtype.itemsize)
            flat[done : done + len(piece)].copy_(piece)


class StoredWeights:
    """Where the text model's tensors are.

    Attributes:
        checkpoint: the directory.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._layers: dict[int, dict[str, Stored]] = {}
        self._prefix: dict[int, str] = {}
        self._outside: dict[str, Stored] = {}
        for shard in checkpoint.shards:
            for tensor in shard.tensors:
                name = without_prefix(tensor.name)
                if name.startswith("layers."):
                    _, index, rest = name.split(".", 2)
                    self._layers.setdefault(int(index), {})[rest] = Stored(shard, tensor)
                    self._prefix.setdefault(int(index), tensor.name.removesuffix(name))
                elif match := _OUTSIDE.match(tensor.name):
                    self._outside[match[1]] = Stored(shard, tensor)

    def layer_name(self, index: int) -> str:
        """Full name of a layer."""
        return f"{self._prefix.get(index, '')}layers.{index}"

    def layer(self, index: int) -> dict[str, Stored]:
        """Name within the layer -> where it is."""
        return self._layers.get(index, {})

    def outside(self, name: str) -> Stored | None:
        """`embed_tokens.weight`, `norm.weight` or `lm_head.weight`."""
        return self._outside.get(name)

    def embedding(self) -> Stored:
        """The embedding.

        Raises:
            Fp8Error: there is none.
        """
        found = self.outside("embed_tokens.weight")
        if found is None:
            raise Fp8Error(
                f"{printable(self.checkpoint.root)}: no embed_tokens.weight in it; complete the checkpoint"
            )
        if len(found.tensor.shape) != 2 or found.tensor.dtype not in FLOATS:
            shown = f"{printable(found.tensor.dtype)} {list(found.tensor.shape)}"
            raise Fp8Error(f"{found}: {shown} is no embedding")
        return found


def fill_layer(
    layer: torch.nn.Module,
    tensors: dict[str, Stored],
    files: Files,
    name: str,
    read: Callable[[Stored, torch.Tensor], None] | None = None,
) -> None:
    """Read a layer's weights, whichever way its experts lie in the checkpoint.

    Args:
        layer: of transformers, its memory allocated.
        tensors: from `StoredWeights.layer`.
        files: to read from.
        name: of the layer, for messages.
        read: reads a tensor to where it belongs; by default as it is.

    Raises:
        Fp8Error: a tensor is missing or has another shape than config.json makes it.
    """

    def as_it_is(stored: Stored, place: torch.Tensor) -> None:
        stored.require(place.shape)
        stored.read_into(place, files)

    parameters = dict(layer.named_parameters())
    missing = {key: parameter.numel() for key, parameter in parameters.items()}
    for key, stored in tensors.items():
        found = _destination(key, parameters)
        if found is None:
            continue  # transformers ignores what its layer has no place for, too
        parameter, place = found
        (read or as_it_is)(stored, place.detach())
        missing[parameter] -= place.numel()
    for key, count in missing.items():
        if count:
            raise Fp8Error(f"{printable(name)}.{printable(key)}: missing; complete the checkpoint")


def _destination(key: str, parameters: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor] | None:
    """(parameter, the part of it) that a tensor of the checkpoint fills.

    Per-expert weights lie in the fused parameters one behind the other, gate above up.
    """
    if key in parameters:
        return key, parameters[key]
    part = one_expert_part(f"layers.0.{key}")
    if part is None:
        return None
    _, expert, projection = part
    parameter = "mlp.experts.down_proj" if projection == "down_proj" else "mlp.experts.gate_up_proj"
    if parameter not in parameters or expert >= len(parameters[parameter]):
        return None
    weight = parameters[parameter][expert]
    if projection != "down_proj":
        half = len(weight) // 2
        weight = weight[:half] if projection == "gate_proj" else weight[half:]
    return parameter, weight


def rows_of(stored: Stored, used: torch.Tensor, files: Files) -> torch.Tensor:
    """Some rows of a matrix, [rows, columns] in its own dtype, on the host."""
    columns = stored.tensor.shape[1]
    rows = torch.empty(len(used), columns, dtype=FLOATS[stored.tensor.dtype])
    for row, number in zip(rows, used.tolist(), strict=True):
        stored.read_into(row, files, number * columns)
    return rows


def embed(weights: StoredWeights, files: Files, batches: Sequence[Batch], dtype: torch.dtype) -> Iterator:
    """Hidden states before the first layer, on the host: [prompts, tokens, hidden] of every batch.

    Only the rows of tokens that occur are read.
    """
    used = torch.unique(torch.cat([batch.ids.flatten() for batch in batches]))
    rows = rows_of(weights.embedding(), used, files).to(dtype)
    return (rows[torch.searchsorted(used, batch.ids)] for batch in batches)
