"""Figures about how far one model's predictions are from another's, in llama.cpp's terms.

Positions of one prompt are not independent, so errors are over prompts: a mean over all positions is a ratio
of two sums over prompts, sum s_i / sum n_i, whose variance is estimated by

    k / (k - 1) * sum (s_i - mean * n_i)^2 / (sum n_i)^2        k prompts

(the linearized variance of a ratio in cluster sampling: Cochran, Sampling Techniques, 3rd ed., ch. 9A).
Of functions of a mean (perplexity, root mean square), the error is the mean's times the slope.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

EDGES = tuple(float(f"{m}e{e}") for e in range(-9, 2) for m in (1, 3.16))
"""Edges of the histogram's bins, nats: two per power of ten; below and above are bins of their own."""


@dataclass(frozen=True, slots=True)
class Figure:
    """An estimate.

    Attributes:
        value: what was measured.
        error: its standard error; None where a single prompt tells nothing about it.
    """

    value: float
    error: float | None

    def times(self, factor: float) -> Figure:
        return Figure(self.value * factor, None if self.error is None else self.error * abs(factor))


@dataclass(frozen=True, slots=True)
class Divergence:
    """One model against the reference, over some positions.

    Attributes:
        positions, prompts: how many.
        mean_kld: of the reference from the model, nats.
        max_kld, kld_999, kld_99, kld_95, kld_90, median_kld: largest and percentiles over positions.
        same_top: share of positions where both hold the same token for the most likely.
        mean_dp, rms_dp: change of the probability of the token that follows.
        ppl_reference, ppl: perplexities.
        ppl_ratio: of the model to the reference.
    """

    positions: int
    prompts: int
    mean_kld: Figure
    max_kld: float
    kld_999: float
    kld_99: float
    kld_95: float
    kld_90: float
    median_kld: float
    same_top: Figure
    mean_dp: Figure
    rms_dp: Figure
    ppl_reference: Figure
    ppl: Figure
    ppl_ratio: Figure


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was found about one directory.

    Attributes:
        directory: its path.
        overall: over all positions.
        by_topic: topic of prompts -> over theirs; empty where prompts name none.
        histogram: positions with a KL divergence below the first of `EDGES`, between two, above the last.
        layers: mean over tokens of |h - h_reference| / |h_reference| behind each layer.
        not_finite: the first layer whose output is NaN or infinite, None if all are finite.
    """

    directory: str
    overall: Divergence
    by_topic: dict[str, Divergence]
    histogram: tuple[int, ...]
    layers: tuple[float, ...]
    not_finite: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A whole comparison.

    Attributes:
        reference: the original's path.
        candidates: one directory, or two.
        difference: mean KL divergence of the first minus that of the second, position by position.
        layer_names: full names.
        prompts, tokens: that ran.
        settings: how engines were emulated, and with what.
    """

    reference: str
    candidates: tuple[Candidate, ...]
    difference: Figure | None
    layer_names: tuple[str, ...]
    prompts: int
    tokens: int
    settings: dict[str, str]

    def to_json(self) -> dict:
        """The same as JSON's types; what is not finite is a string, as JSON has no number for it."""
        return _json(asdict(self) | {"histogram_edges_nats": EDGES})


def _json(value: object) -> object:
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def divergence(
    results: Mapping[str, np.ndarray], number: int, chosen: np.ndarray | None = None
) -> Divergence:
    """Figures of one model.

    Args:
        results: `head.predictions`, and `prompt` [positions], the number of the prompt of each.
        number: of the model.
        chosen: bool [positions]; None for all.
    """
    keep = slice(None) if chosen is None else chosen
    prompt = results["prompt"][keep]
    kl = results[f"kl{number}"][keep]
    before, after = results["nll0"][keep], results[f"nll{number}"][keep]
    change = np.exp(-after) - np.exp(-before)
    same = results["top0"][keep] == results[f"top{number}"][keep]
    square = mean_over_prompts(change**2, prompt)
    root = math.sqrt(square.value)
    return Divergence(
        len(kl),
        len(np.unique(prompt)),
        mean_over_prompts(kl, prompt),
        float(kl.max()),
        *(float(v) for v in np.percentile(kl, [99.9, 99, 95, 90, 50])),
        same_top=mean_over_prompts(same.astype(float), prompt),
        mean_dp=mean_over_prompts(change, prompt),
        rms_dp=Figure(root, None if square.error is None else square.error / (2 * root) if root else 0.0),
        ppl_reference=_exponential(mean_over_prompts(before, prompt)),
        ppl=_exponential(mean_over_prompts(after, prompt)),
        ppl_ratio=_exponential(mean_over_prompts(after - before, prompt)),
    )


def difference(results: Mapping[str, np.ndarray]) -> Figure:
    """Mean KL divergence of model 1 minus that of model 2; its error is that of paired values."""
    return mean_over_prompts(results["kl1"] - results["kl2"], results["prompt"])


def histogram(kl: np.ndarray) -> tuple[int, ...]:
    """Positions below the first of `EDGES`, between each two, and above the last."""
    return tuple(np.histogram(kl[~np.isnan(kl)], (-np.inf, *EDGES, np.inf))[0].tolist())


def mean_over_prompts(values: np.ndarray, prompt: np.ndarray) -> Figure:
    """Mean over all positions, with its standard error over prompts.

    Args:
        values: float64 [positions].
        prompt: [positions], the number of the prompt of each.
    """
    _, index = np.unique(prompt, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    mean = sums.sum() / counts.sum()
    clusters = len(counts)
    if clusters < 2:
        return Figure(float(mean), None)
    variance = clusters / (clusters - 1) * ((sums - mean * counts) ** 2).sum() / counts.sum() ** 2
    return Figure(float(mean), float(np.sqrt(variance)))


def _exponential(figure: Figure) -> Figure:
    value = float(np.exp(figure.value))
    return Figure(value, None if figure.error is None else value * figure.error)
