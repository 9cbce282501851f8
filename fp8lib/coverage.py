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
from collections.abc import Mapping
from dataclasses import dataclass

from fp8lib.input_statistics import InputStatistics, input_of
from fp8lib.plan import Plan
from fp8lib.stats import Entry

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


def make_entries(
    plan: Plan, inputs: Mapping[str, InputStatistics], tokens: int
) -> tuple[dict[str, Entry], Coverage]:
    """Entries of the statistics file, in the plan's order.

    Args:
        plan: what is to be quantized.
        inputs: recorded statistics, by input; weights without any (`mtp.*`) get no entry.
        tokens: that passed through the model.
    """
    pools: dict[str, InputStatistics] = {}
    entries: dict[str, Entry] = {}
    fed: dict[str, list[int]] = defaultdict(list)
    total = 0
    for matrix in plan.matrices:
        total += 1
        name, expert = input_of(matrix.weight.name)
        if name not in inputs:
            continue
        statistics = inputs[name]
        if expert is None:
            entries[matrix.weight.name] = _entry(statistics, int(statistics.tokens[0]))
            continue
        seen = int(statistics.tokens[expert])
        if seen >= ENOUGH:
            own = statistics.row(expert)
        else:
            own = pools[name] = pools.get(name) or statistics.pooled()
        entries[matrix.weight.name] = _entry(own, seen)
        if name.endswith(".experts"):
            fed.setdefault(name, statistics.tokens.tolist())
    layers = tuple(Layer(name, tuple(counts)) for name, counts in fed.items())
    return entries, Coverage(total, len(entries), layers, tokens)


def _entry(statistics: InputStatistics, tokens: int) -> Entry:
    return Entry(statistics.maximum[0], statistics.mean_square[0], tokens)
