"""What each model predicts: the last norm and the output head, a slice of the vocabulary at a time.

The head of a large model is 248,320 x 4096 and its logits for 20,000 tokens are 20 GB, so neither is ever
whole in memory. The head is read once, slice by slice; every position passes through each slice, and what is
kept of a slice's logits a_i (reference) and b_i (another model) are running sums in float64:

    m = max a_i        S = sum exp(a_i - m)        T = sum exp(a_i - m) * (a_i - b_i)
    log Z = m + log S                              KL = T / S - log Z_a + log Z_b

which is sum p_i (log p_i - log q_i). Where both models are the same bit for bit, T = 0 and the two log Z are
equal, so KL is exactly 0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch

from fp8lib import Fp8Error
from fp8lib.checkpoint.untrusted import printable
from fp8lib.model import internals
from fp8lib.model.progress import Progress
from fp8lib.model.prompts import Batch
from fp8lib.model.stored_weights import FLOATS, Stored, StoredWeights, rows_of
from fp8lib.streaming.lanes import Files

_SLICE = 1 << 25
"""Weights of the head widened to float32 at a time: 128 MiB."""
_TILE = 1 << 22
"""Logits of each model at a time, widened to float64: 32 MiB."""


def scored(batch: Batch) -> torch.Tensor:
    """Positions whose next token is known: bool [prompts, tokens]."""
    mask = batch.mask.clone()
    mask[:, -1] = False  # padding is on the left, so every prompt ends in the last column
    return mask


def predictions(
    weights: Sequence[StoredWeights],
    hidden: Sequence[list[torch.Tensor]],
    batches: Sequence[Batch],
    hollow: internals.Hollow,
    device: torch.device,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """What the models say at every scored position, batch after batch, prompt after prompt.

    Args:
        weights: of each model, the reference first.
        hidden: of each model and batch, behind the last layer: float32 [prompts, tokens, channels]. Emptied.
        batches: the prompts.
        hollow: the model without weights.
        device: where to compute.
        progress: told about every prompt of every model.

    Returns:
        [positions] each: `token`, the one that follows; for every model n `nll{n}`, its negative logarithm of
        the probability of that token, `rank{n}`, how many tokens it holds for more likely, and `top{n}`, the
        one it holds for the most likely; for every model but the first `kl{n}`, in nats.

    Raises:
        Fp8Error: a head or norm is missing or of the wrong shape.
    """
    targets = torch.cat([batch.ids.roll(-1, 1)[scored(batch)] for batch in batches])
    config = hollow.model.config
    with closing(Files()) as files, torch.no_grad():
        models = []
        for stored, states in zip(weights, hidden, strict=True):
            rows = _normed(hollow.norm, stored, states, batches, config, files, device)
            states.clear()
            models.append(_Model(_head(stored, config), rows, targets, files))
        columns = config.hidden_size
        step = max(1, _SLICE // columns)
        done = 0
        for first in range(0, config.vocab_size, step):
            last = min(first + step, config.vocab_size)
            slices = [model.slice(first, last, files, device) for model in models]
            for tile in torch.arange(len(targets)).split(max(1, _TILE // (last - first))):
                _add(models, slices, tile, targets[tile], first, device)
            share = last / config.vocab_size
            now = round(share * sum(len(batch.ids) for batch in batches) * len(models))
            tokens = sum(batch.tokens for batch in batches) * len(models)
            progress.advance(now - done, round(tokens * (last - first) / config.vocab_size))
            done = now
    return _results(models, targets)


class _Model:
    """One model's running sums, float64 or int64 [positions], on the host."""

    def __init__(self, head: Stored, rows: torch.Tensor, targets: torch.Tensor, files: Files) -> None:
        count = len(targets)
        self.head, self.rows = head, rows
        self.target = _logits_of(head, rows, targets, files)
        self.largest = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.sum = torch.zeros(count, dtype=torch.float64)
        self.weighted = torch.zeros(count, dtype=torch.float64)
        self.logit = torch.full((count,), torch.nan, dtype=torch.float64)
        self.top, self.rank = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)

    def slice(self, first: int, last: int, files: Files, device: torch.device) -> torch.Tensor:
        """Rows of the head, float32 [last - first, channels]."""
        rows = torch.empty(last - first, self.rows.shape[1], device=device)
        self.head.read_into(rows, files, first * self.rows.shape[1])
        return rows


def _add(
    models: Sequence[_Model],
    slices: Sequence[torch.Tensor],
    tile: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    device: torch.device,
) -> None:
    """Count a slice of the vocabulary, whose first token is `first`, at some positions of all models."""
    inside = (targets >= first) & (targets < first + len(slices[0]))
    column = (targets - first)[inside].to(device)
    row = inside.nonzero().flatten().to(device)
    logits = [(m.rows[tile].to(device) @ w.T).double() for m, w in zip(models, slices, strict=True)]
    for number, (model, x) in enumerate(zip(models, logits, strict=True)):
        before = model.largest[tile].to(device)
        value, top = x.max(-1)
        largest = torch.maximum(before, value)
        share = (x - largest[:, None]).exp_()
        shrink = (before - largest).exp()
        model.sum[tile] = (model.sum[tile].to(device) * shrink + share.sum(-1)).cpu()
        model.top[tile] = torch.where(value > before, top + first, model.top[tile].to(device)).cpu()
        model.largest[tile] = largest.cpu()
        model.logit[tile[inside]] = x[row, column].cpu()
        above = x > model.target[tile].to(device)[:, None]
        above[row, column] = False
        model.rank[tile] += above.sum(-1).cpu()
        if number == 0:
            reference = share, shrink
            continue
        difference = (reference[0] * (logits[0] - x)).sum(-1)
        model.weighted[tile] = (model.weighted[tile].to(device) * reference[1] + difference).cpu()


def _results(models: Sequence[_Model], targets: torch.Tensor) -> dict[str, np.ndarray]:
    results = {"token": targets.numpy()}
    log_sums = [model.largest + model.sum.log() for model in models]
    for number, (model, log_sum) in enumerate(zip(models, log_sums, strict=True)):
        results[f"nll{number}"] = (log_sum - model.logit).numpy()
        results[f"rank{number}"] = model.rank.numpy()
        results[f"top{number}"] = model.top.numpy()
        if number:
            # Never below 0 but by rounding, of 1e-16 times the logits.
            kl = model.weighted / models[0].sum - log_sums[0] + log_sum
            results[f"kl{number}"] = kl.clamp(min=0).numpy()
    return results


def _normed(
    norm: torch.nn.Module,
    stored: StoredWeights,
    hidden: Sequence[torch.Tensor],
    batches: Sequence[Batch],
    config: object,
    files: Files,
    device: torch.device,
) -> torch.Tensor:
    """Inputs of the head at all scored positions: float32 [positions, channels], on the host."""
    found = stored.outside("norm.weight")
    if found is None:
        raise Fp8Error(f"{printable(stored.checkpoint.root)}: no norm.weight in it; complete the checkpoint")
    found.require((config.hidden_size,))
    norm = copy.deepcopy(norm).to_empty(device=device)
    found.read_into(norm.weight.detach(), files)
    rows = [norm(x[scored(batch)].to(device)).cpu() for x, batch in zip(hidden, batches, strict=True)]
    return torch.cat(rows)


def _head(stored: StoredWeights, config: object) -> Stored:
    """The output head: `lm_head.weight`, or the embedding where the two are tied."""
    found = stored.outside("lm_head.weight")
    raw = stored.checkpoint.config
    tied = any(part.get("tie_word_embeddings") for part in (raw, raw.get("text_config") or {}))
    if found is None and not tied:
        raise Fp8Error(
            f"{printable(stored.checkpoint.root)}: no lm_head.weight in it; complete the checkpoint"
        )
    found = found or stored.embedding()
    if found.tensor.dtype not in FLOATS:
        raise Fp8Error(f"{found}: {found.tensor.dtype}; engines read no head of this dtype")
    found.require((config.vocab_size, config.hidden_size))
    return found


def _logits_of(head: Stored, rows: torch.Tensor, targets: torch.Tensor, files: Files) -> torch.Tensor:
    """The logit of one token at each position, float64: what other tokens are compared with for its rank."""
    used, place = torch.unique(targets, return_inverse=True)
    weights = rows_of(head, used, files).double()
    parts = zip(rows.split(1024), place.split(1024), strict=True)
    return torch.cat([(part.double() * weights[at]).sum(-1) for part, at in parts])
