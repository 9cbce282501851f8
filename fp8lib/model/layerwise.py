"""Prompts through a model with one decoder layer in memory at a time.

Every layer's weights are read once; all prompts pass through the layer before the next one is loaded;
hidden states wait in host memory. accelerate's disk offload, which from_pretrained's device_map gives,
also keeps one layer at a time, but moves a *batch* through all layers: the whole checkpoint is read again
for every batch (and for every generated token), and per-expert weights, which transformers fuses while
loading, are first written to disk a second time. Turning the two loops inside out is what it lacks and
what this module adds. There is no generation for the same reason: each new token would need every layer.

The arithmetic is transformers' own. Its text model is built on the meta device, which takes no memory;
in it every layer is replaced by one that passes its input on, except the one in memory. The model's own
`forward`, called with hidden states in place of embeddings, then computes positions, rotary embedding and
masks and runs that layer. Of the embedding only the rows of tokens that occur in the prompts are read.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import transformers

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.headers import Shard, Tensor
from fp8lib.checkpoint.rules import one_expert_part, without_prefix
from fp8lib.checkpoint.untrusted import printable
from fp8lib.model import internals
from fp8lib.model.progress import Progress
from fp8lib.model.prompts import Batch
from fp8lib.streaming.lanes import DTYPES, Files

_DTYPES = DTYPES | {"F64": torch.float64}
_Taken = TypeVar("_Taken", covariant=True)
_STAGING = 1 << 25
"""Bytes read at a time on their way to another device or dtype."""


class Observer(Protocol[_Taken]):
    """Watches a layer run; `calibration.recording.Recorder` is one."""

    def attach(self, layer: torch.nn.Module, name: str) -> None:
        """Watch a layer that is called `name` in the model."""

    def look_at(self, mask: torch.Tensor) -> None:
        """Say which tokens of the next forward pass count: bool [prompts, tokens]."""

    def take(self) -> _Taken:
        """What was seen since the last call."""

    def detach(self) -> None:
        """Watch nothing any more."""


def run(
    checkpoint: Checkpoint,
    config: transformers.PreTrainedConfig,
    batches: Sequence[Batch],
    device: torch.device,
    observer: Observer[_Taken],
    progress: Progress,
) -> Iterator[_Taken]:
    """Pass every batch through every layer.

    Args:
        checkpoint: where the weights are.
        config: of the text model.
        batches: prompts.
        device: where layers run.
        observer: sees every token once.
        progress: told about each batch in each layer.

    Yields:
        What the observer took, layer after layer.

    Raises:
        Fp8Error: tensors missing or of the wrong shape, NaN or infinite activations, not enough memory.
    """
    model, layers, _ = internals.hollow_model(config, device, torch.bfloat16)
    weights = _weights_by_layer(checkpoint)
    with closing(Files()) as files:
        hidden = _embed(checkpoint, files, batches)
        for index, layer in enumerate(layers):
            name = f"{weights[index].prefix}layers.{index}"
            progress.label(f"layer {index + 1}/{len(layers)}")
            try:
                _load(layer.to_empty(device=device), weights[index], files, name)
                model.layers[index] = layer
                observer.attach(layer, name)
                for i, batch in enumerate(batches):
                    observer.look_at(batch.mask)
                    hidden[i] = _forward(model, hidden[i].to(device), batch)
                    progress.advance(len(batch.ids), batch.tokens)
            except torch.OutOfMemoryError:
                raise Fp8Error(
                    f"{printable(name)}: out of device memory; give a smaller --batch_size or "
                    "--max_prompt_tokens, or --device_map cpu"
                ) from None
            taken = observer.take()
            observer.detach()
            model.layers[index] = internals.PassOn()
            layers[index] = layer = None  # its memory, before the next one's
            _return_free_memory()
            yield taken


@torch.no_grad()
def _forward(model: transformers.PreTrainedModel, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A batch's hidden states behind the layer in memory, on the host."""
    output = model(inputs_embeds=hidden, **batch.to_model(hidden.device), use_cache=False)
    return output.last_hidden_state.cpu()


def _return_free_memory() -> None:
    """Give free heap pages back to the system.

    glibc keeps what activations of a few MB leave between longer-lived blocks: 30 MB more with every
    layer (measured), which over 60 layers is more than the layers themselves.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


# --- weights -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Weights:
    """Tensors of one layer.

    Attributes:
        prefix: what stands before `layers.` in their names.
        tensors: name within the layer -> where it is.
    """

    prefix: str
    tensors: dict[str, tuple[Shard, Tensor]]


def _weights_by_layer(checkpoint: Checkpoint) -> dict[int, _Weights]:
    found: dict[int, _Weights] = defaultdict(lambda: _Weights("", {}))
    for shard, tensor in _tensors(checkpoint):
        name = without_prefix(tensor.name)
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            layer = found.setdefault(int(index), _Weights(tensor.name.removesuffix(name), {}))
            layer.tensors[rest] = (shard, tensor)
    return found


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[Shard, Tensor]]:
    return ((shard, tensor) for shard in checkpoint.shards for tensor in shard.tensors)


def _load(layer: torch.nn.Module, weights: _Weights, files: Files, name: str) -> None:
    """Read a layer's weights from the checkpoint, whichever way its experts lie there."""
    parameters = dict(layer.named_parameters())
    missing = {key: parameter.numel() for key, parameter in parameters.items()}
    for key, (shard, tensor) in weights.tensors.items():
        found = _destination(key, parameters)
        if found is None:
            continue  # transformers ignores what its layer has no place for, too
        parameter, place = found
        if tuple(place.shape) != tensor.shape or tensor.dtype not in _DTYPES:
            raise Fp8Error(
                f"{printable(tensor.name)}: {printable(tensor.dtype)} {list(tensor.shape)} "
                f"where config.json makes it {list(place.shape)}"
            )
        _fill(place, shard, tensor, files)
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


def _fill(place: torch.Tensor, shard: Shard, tensor: Tensor, files: Files) -> None:
    """Read a tensor's bytes to where they belong; through a small buffer if device or dtype differ."""
    dtype = _DTYPES[tensor.dtype]
    if place.device.type == "cpu" and place.dtype == dtype:
        files.read_into(_bytes(place.detach()), shard.path, tensor.start)
        return
    flat = place.detach().view(-1)
    count = _STAGING // dtype.itemsize
    buffer = torch.empty(min(count, len(flat)), dtype=dtype)
    for first in range(0, len(flat), count):
        piece = buffer[: min(count, len(flat) - first)]
        files.read_into(_bytes(piece), shard.path, tensor.start + first * dtype.itemsize)
        flat[first : first + len(piece)].copy_(piece)


def _bytes(contiguous: torch.Tensor) -> torch.Tensor:
    return contiguous.view(-1).view(torch.uint8)


# --- embeddings --------------------------------------------------------------------------------


def _embed(checkpoint: Checkpoint, files: Files, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Hidden states before the first layer, on the host: BF16 [prompts, tokens, hidden] of every batch."""
    shard, tensor = _embedding(checkpoint)
    used = torch.unique(torch.cat([batch.ids.flatten() for batch in batches]))
    dtype = _DTYPES[tensor.dtype]
    rows = torch.empty(len(used), tensor.shape[1], dtype=dtype)
    for row, token in zip(rows, used.tolist(), strict=True):
        files.read_into(_bytes(row), shard.path, tensor.start + token * row.nbytes)
    rows = rows.bfloat16()
    return [rows[torch.searchsorted(used, batch.ids)] for batch in batches]


def _embedding(checkpoint: Checkpoint) -> tuple[Shard, Tensor]:
    for shard, tensor in _tensors(checkpoint):
        if tensor.name.endswith("embed_tokens.weight") and not tensor.name.startswith("mtp."):
            if len(tensor.shape) != 2 or tensor.dtype not in _DTYPES:
                shown = f"{printable(tensor.dtype)} {list(tensor.shape)}"
                raise Fp8Error(f"{printable(tensor.name)}: {shown} is no embedding")
            return shard, tensor
    raise Fp8Error(f"{printable(checkpoint.root)}: no embed_tokens.weight in it; complete the checkpoint")
