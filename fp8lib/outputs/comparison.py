"""Prompts through the original and the FP8 directories made from it, and what came out.

All models take turns with each layer (`model.layerwise`), so one layer of one of them is in memory at a time.
A rank of a job does this with its share of the prompts and hands over a `Record`. What is in it does not
depend on which rank it was, and sums are made in the order of the prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.numpy import load, save

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.untrusted import printable
from fp8lib.model import internals
from fp8lib.model.layerwise import Stream, return_free_memory, run_streams
from fp8lib.model.progress import Progress
from fp8lib.model.prompts import Batch
from fp8lib.model.stored_weights import StoredWeights
from fp8lib.outputs.figures import Candidate, Comparison, difference, divergence, histogram
from fp8lib.outputs.head import predictions, scored
from fp8lib.outputs.layers import ServedLayers, Serving


@dataclass(frozen=True, slots=True)
class Record:
    """What a process found with its share of the prompts.

    Attributes:
        results: `head.predictions`; `prompt`, the number of the prompt of each position, and `position`, its
            place in it.
        layers: float64 [batches, layers, candidates], sums over tokens of the relative error.
        tokens: int64 [batches].
        batches: int64 [batches], the number of the first prompt of each.
        not_finite: int64 [candidates], the first layer whose output is not finite; number of layers if none.
    """

    results: dict[str, np.ndarray]
    layers: np.ndarray
    tokens: np.ndarray
    batches: np.ndarray
    not_finite: np.ndarray

    def pack(self) -> bytes:
        """As bytes, for another process."""
        own = {name: getattr(self, name) for name in ("layers", "tokens", "batches", "not_finite")}
        return save({f".{key}": value for key, value in own.items()} | self.results)

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """What was packed."""
        arrays = load(data)
        own = {key[1:]: arrays.pop(key) for key in list(arrays) if key.startswith(".")}
        return cls(arrays, **own)


def run(
    original: Checkpoint,
    candidates: Sequence[Checkpoint],
    serving: Serving,
    config: object,
    batches: Sequence[Batch],
    device: torch.device,
    progress: Progress,
) -> Record:
    """Pass prompts through the original and the candidates.

    Args:
        original: the reference; it runs as it is.
        candidates: FP8 directories.
        serving: what an engine does with their FP8 modules.
        config: of the original's text model.
        batches: prompts.
        device: where to compute.
        progress: told about every prompt in every layer of every model, the head being one more layer.

    Raises:
        Fp8Error: tensors missing or of the wrong shape, not enough memory, or the original computes NaN.
    """
    weights = [StoredWeights(checkpoint) for checkpoint in (original, *candidates)]
    servings = [Serving(), *[serving] * len(candidates)]
    streams = [Stream(ServedLayers(w, s)) for w, s in zip(weights, servings, strict=True)]
    sums: list[np.ndarray] = []
    broken = np.full(len(candidates), config.num_hidden_layers)
    hollow = internals.hollow_model(config, device, torch.float32)
    with _precise(), internals.torch_kernels(hollow.model):
        for index in run_streams(streams, hollow, batches, device, progress):
            errors, finite = _errors(streams, batches, device)
            sums.append(errors)
            if not finite[0]:
                raise Fp8Error(
                    f"{printable(weights[0].layer_name(index))}: NaN or infinite activations, so the "
                    "original itself is broken; check the download or the fine-tune"
                )
            broken[~finite[1:] & (broken > index)] = index
        progress.label("output head")
        results = predictions(weights, [s.hidden for s in streams], batches, hollow, device, progress)
    return_free_memory()
    return Record(
        results | _places(batches),
        np.stack(sums, axis=1),
        np.array([batch.tokens for batch in batches]),
        np.array([batch.prompts[0] for batch in batches]),
        broken,
    )


@contextmanager
def _precise() -> Iterator[None]:
    """Within it, float32 products are float32 products: no TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _errors(
    streams: Sequence[Stream], batches: Sequence[Batch], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """(sums over tokens of the relative error [batches, candidates], whether each stream is finite)."""
    sums = np.zeros((len(batches), len(streams) - 1))
    finite = np.ones(len(streams), bool)
    for i, batch in enumerate(batches):
        mask = batch.mask.to(device)
        states = [stream.hidden[i].to(device)[mask] for stream in streams]
        length = states[0].double().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        for number, state in enumerate(states):
            finite[number] &= bool(state.isfinite().all())
            if number:
                distance = (state.double() - states[0].double()).norm(dim=-1)
                sums[i, number - 1] = float((distance / length).sum())
    return sums, finite


def _places(batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """The prompt of every scored position, and its place in it."""
    prompts, positions = [], []
    for batch in batches:
        mask = scored(batch)
        start = (~batch.mask).sum(1, keepdim=True)
        positions.append((torch.arange(mask.shape[1]) - start)[mask])
        prompts.append(torch.tensor(batch.prompts)[:, None].expand(mask.shape)[mask])
    return {"prompt": torch.cat(prompts).numpy(), "position": torch.cat(positions).numpy()}


def merged(records: Sequence[Record]) -> Record:
    """The records of all processes as one, in the order of the prompts."""
    names = records[0].results
    results = {name: np.concatenate([record.results[name] for record in records]) for name in names}
    order = np.lexsort((results["position"], results["prompt"]))
    batches = np.concatenate([record.batches for record in records])
    first = np.argsort(batches)
    return Record(
        {name: values[order] for name, values in results.items()},
        np.concatenate([record.layers for record in records])[first],
        np.concatenate([record.tokens for record in records])[first],
        batches[first],
        np.min([record.not_finite for record in records], axis=0),
    )


def evaluate(
    record: Record,
    original: Checkpoint,
    candidates: Sequence[Checkpoint],
    topics: Sequence[str | None],
    settings: Mapping[str, str],
) -> Comparison:
    """What a merged record says.

    Args:
        record: of all prompts.
        original, candidates: as in `run`.
        topics: of every prompt.
        settings: how engines were emulated, for the record.
    """
    weights = StoredWeights(original)
    names = tuple(weights.layer_name(i) for i in range(record.layers.shape[1]))
    of_position = np.array([topic or "" for topic in topics])[record.results["prompt"]]
    found = []
    for number, candidate in enumerate(candidates, start=1):
        by_topic = {
            topic: divergence(record.results, number, of_position == topic)
            for topic in dict.fromkeys(topic for topic in topics if topic)
            if (of_position == topic).any()
        }
        layers = record.layers[:, :, number - 1].sum(0) / record.tokens.sum()
        broken = int(record.not_finite[number - 1])
        found.append(
            Candidate(
                printable(candidate.root),
                divergence(record.results, number),
                by_topic,
                histogram(record.results[f"kl{number}"]),
                tuple(layers.tolist()),
                names[broken] if broken < len(names) else None,
            )
        )
    return Comparison(
        printable(original.root),
        tuple(found),
        difference(record.results) if len(found) == 2 else None,
        names,
        len(topics),
        int(record.tokens.sum()),
        dict(settings),
    )
