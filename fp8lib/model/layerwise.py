"""Prompts through a model with one decoder layer in memory at a time, or through several models at once.

Every layer's weights are read once; all prompts pass through the layer before the next one is loaded;
hidden states wait in host memory. accelerate's disk offload, which from_pretrained's device_map gives,
also keeps one layer at a time, but moves a *batch* through all layers: the whole checkpoint is read again
for every batch (and for every generated token), and per-expert weights, which transformers fuses while
loading, are first written to disk a second time. Turning the two loops inside out is what it lacks and
what this module adds. There is no generation for the same reason: each new token would need every layer.

A `Stream` is one model's way through: where its layers come from, and its hidden states. Several streams
take turns with each layer, so that what they make of it can be compared before the next one.

The arithmetic is transformers' own. Its text model is built on the meta device, which takes no memory;
in it every layer is replaced by one that passes its input on, except the one in memory. The model's own
`forward`, called with hidden states in place of embeddings, then computes positions, rotary embedding and
masks and runs that layer. Of the embedding only the rows of tokens that occur in the prompts are read.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
import transformers

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.untrusted import printable
from fp8lib.model import internals
from fp8lib.model.progress import Progress
from fp8lib.model.prompts import Batch
from fp8lib.model.stored_weights import StoredWeights, embed, fill_layer
from fp8lib.streaming.lanes import Files

_Taken = TypeVar("_Taken", covariant=True)


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


class Source(Protocol):
    """Where a stream's layers come from.

    Attributes:
        weights: the checkpoint's tensors.
    """

    weights: StoredWeights

    def load(self, layer: torch.nn.Module, index: int, files: Files, device: torch.device) -> torch.nn.Module:
        """A layer, ready to run, made of one on the meta device.

        Raises:
            Fp8Error: tensors are missing or of the wrong shape.
        """


@dataclass(frozen=True, slots=True)
class AsStored:
    """Layers with the checkpoint's own weights; a `Source`."""

    weights: StoredWeights

    def load(self, layer: torch.nn.Module, index: int, files: Files, device: torch.device) -> torch.nn.Module:
        layer = layer.to_empty(device=device)
        fill_layer(layer, self.weights.layer(index), files, self.weights.layer_name(index))
        return layer


@dataclass(slots=True)
class Stream:
    """One model's way through the layers.

    Attributes:
        source: of its layers.
        observer: watches them run, if there is one.
        hidden: hidden states of every batch, on the host: [prompts, tokens, channels].
    """

    source: Source
    observer: Observer | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)


def run(
    checkpoint: Checkpoint,
    config: transformers.PreTrainedConfig,
    batches: Sequence[Batch],
    device: torch.device,
    observer: Observer[_Taken],
    progress: Progress,
) -> Iterator[_Taken]:
    """Pass every batch through every layer of one model, in BF16.

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
    stream = Stream(AsStored(StoredWeights(checkpoint)), observer)
    hollow = internals.hollow_model(config, device, torch.bfloat16)
    for _ in run_streams([stream], hollow, batches, device, progress):
        yield observer.take()


def run_streams(
    streams: Sequence[Stream],
    hollow: internals.Hollow,
    batches: Sequence[Batch],
    device: torch.device,
    progress: Progress,
) -> Iterator[int]:
    """Pass every batch through every layer of several models.

    Args:
        streams: models of one shape. One layer of one of them is in memory at a time.
        hollow: their model without weights; its dtype is that of hidden states.
        batches: prompts.
        device: where layers run.
        progress: told about each batch in each layer of each stream.

    Yields:
        The number of each layer, after all streams have passed it.

    Raises:
        Fp8Error: tensors missing or of the wrong shape, not enough memory.
    """
    model, layers, _ = hollow
    with closing(Files()) as files:
        for stream in streams:
            stream.hidden[:] = embed(stream.source.weights, files, batches, model.dtype)
        for index, template in enumerate(layers):
            progress.label(f"layer {index + 1}/{len(layers)}")
            for stream in streams:
                _pass_layer(stream, model, template, index, batches, device, files, progress)
            yield index


def _pass_layer(
    stream: Stream,
    model: transformers.PreTrainedModel,
    template: torch.nn.Module,
    index: int,
    batches: Sequence[Batch],
    device: torch.device,
    files: Files,
    progress: Progress,
) -> None:
    """Every batch of one stream through one layer, which is in memory only meanwhile."""
    name, observer = stream.source.weights.layer_name(index), stream.observer
    try:
        layer = stream.source.load(copy.deepcopy(template), index, files, device)
        model.layers[index] = layer
        if observer is not None:
            observer.attach(layer, name)
        with torch.no_grad():
            for i, batch in enumerate(batches):
                if observer is not None:
                    observer.look_at(batch.mask)
                inputs = batch.to_model(device)
                output = model(inputs_embeds=stream.hidden[i].to(device), **inputs, use_cache=False)
                stream.hidden[i] = output.last_hidden_state.cpu()
                progress.advance(len(batch.ids), batch.tokens)
    except torch.OutOfMemoryError:
        raise Fp8Error(
            f"{printable(name)}: out of device memory; give a smaller --batch_size or "
            "--max_prompt_tokens, or run on the CPU"
        ) from None
    finally:
        if observer is not None:
            observer.detach()
        model.layers[index] = internals.PassOn()
        layer = None  # its memory, before the next one's
        return_free_memory()


def return_free_memory() -> None:
    """Give free heap pages back to the system.

    glibc keeps what activations of a few MB leave between longer-lived blocks: 30 MB more with every
    layer (measured), which over 60 layers is more than the layers themselves.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
