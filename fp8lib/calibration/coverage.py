"""From what was recorded to the statistics file's entries; how well the experts were covered.

A router sends each token to a few experts, and some experts get almost none. A mean square over n tokens
is off by about sqrt(2/n) for Gaussian activations and by twice that for heavy-tailed ones, and noise in
a_j does harm: weights that were quantized with it can end up worse than with a_j = 1. Simulated with
heavy-tailed activations (Student t, 5 degrees), channels that differ by a factor of 10 to 100 and experts
whose channels differ from their layer's by e^(0.25) to e^1, the share of the possible gain that an expert
gets is

    from n of its own tokens     n = 4   -1.4 .. 0.7
                                    16   -0.2 .. 0.9
                                    64    0.6 .. 1.0
                                   256    0.9 .. 1.0
    from all tokens of its layer          0.1 .. 1.0

so from 64 tokens on its own statistics are worth having and never hurt; below, the layer's are taken.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fp8lib.calibration.input_statistics import InputStatistics, input_of
from fp8lib.calibration.statistics_writer import Entry
from fp8lib.checkpoint.plan import Plan

ENOUGH = 64
"""Tokens from which on an expert's own statistics are used, see above."""
_POOR = 0.10
"""Share of experts with too few tokens from which on the summary warns."""
_FEW = 1000
"""Tokens in total below which it does: a prompt or two, which is one topic in one language."""


@dataclass(frozen=True, slots=True)
class Layer:
    """How the experts of one layer were fed."""

    name: str
    tokens: tuple[int, ...]

    @property
    def starved(self) -> int:
        """Experts with fewer tokens than enough."""
        return sum(n < ENOUGH for n in self.tokens)


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the entries rest on.

    Attributes:
        weights: quantized weights, of which `recorded` have an entry.
        layers: those with experts.
        tokens: seen by each weight that is no expert's.
    """

    weights: int
    recorded: int
    layers: tuple[Layer, ...]
    tokens: int

    @property
    def experts(self) -> int:
        return sum(len(layer.tokens) for layer in self.layers)

    @property
    def unseen(self) -> int:
        return sum(n == 0 for layer in self.layers for n in layer.tokens)

    @property
    def starved(self) -> int:
        return sum(layer.starved for layer in self.layers)

    @property
    def least_fed(self) -> Layer:
        """The layer with the most starved experts; among equals, the one whose poorest has least."""
        return max(self.layers, key=lambda layer: (layer.starved, -min(layer.tokens)))

    def advice(self) -> str | None:
        """What to do about poor coverage; None if it is good."""
        if self.tokens < _FEW:
            return (
                f"Only {self.tokens} tokens: too few to stand for what the model is used for. "
                "Give more and longer prompts with --prompts_file."
            )
        if self.starved > _POOR * self.experts:
            return (
                f"{self.starved / self.experts:.0%} of the experts saw fewer than {ENOUGH} tokens and took "
                "their layer's statistics. Give more text with --prompts_file, of the kinds the model is "
                "used for, or (not with --layerwise) generate more with --max_tokens."
            )
        return None


class Entries:
    """Makes the statistics file's entries of what was recorded, and keeps count.

    Args:
        plan: what is to be quantized.

    Attributes:
        left: quantized weights that have no entry yet.
    """

    def __init__(self, plan: Plan) -> None:
        self._weights: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
        for matrix in plan.matrices:
            name, expert = input_of(matrix.weight.name)
            self._weights[name].append((matrix.weight.name, expert))
        self._total = sum(map(len, self._weights.values()))
        self._layers: list[Layer] = []
        self.left = {weight for weights in self._weights.values() for weight, _ in weights}

    def make(self, inputs: Mapping[str, InputStatistics]) -> Iterator[tuple[str, Entry]]:
        """(full tensor name, entry) of every weight that has one of these inputs.

        Args:
            inputs: recorded statistics, by input, complete.
        """
        for name, statistics in inputs.items():
            if name.endswith(".experts"):
                self._layers.append(Layer(name, tuple(statistics.tokens.tolist())))
            own, pooled = statistics.mean_square, statistics.pooled()
            pool = pooled.maximum[0], pooled.mean_square[0]
            for weight, expert in self._weights[name]:
                tokens = int(statistics.tokens[expert or 0])
                enough = expert is None or tokens >= ENOUGH
                lists = (statistics.maximum[expert or 0], own[expert or 0]) if enough else pool
                self.left.discard(weight)
                yield weight, Entry(*lists, tokens)

    def coverage(self, tokens: int) -> Coverage:
        """What the entries made so far rest on.

        Args:
            tokens: that passed through the model.
        """
        return Coverage(self._total, self._total - len(self.left), tuple(self._layers), tokens)
