"""Second moments in a calibration run: what will be written, within which limit, how ranks join theirs."""

from argparse import Namespace
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8lib import Fp8Error
from fp8lib.calibration.second_moments_file import Input, inputs_of, path_beside, triangle
from fp8lib.calibration.second_moments_writer import SecondMomentsWriter
from fp8lib.checkpoint.plan import Plan
from fp8lib.checkpoint.rules import without_prefix
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job.ranks import Ranks
from fp8lib.terminal import WIDTH, Printer, size

if TYPE_CHECKING:
    from fp8lib.calibration.second_moments import Moments


class Sizes:
    """What a file of second moments of a model holds, and what it takes to make it.

    Args:
        plan: what is quantized.
        limit: bytes of the file.
        layerwise: whether layers come one after the other.

    Attributes:
        inputs: all of them.
        pooled: bytes of the file without experts' own matrices.
        every: bytes with those of every expert.
        per_layer: bytes that a layer with experts may add with matrices of their own.
    """

    def __init__(self, plan: Plan, limit: int, layerwise: bool) -> None:
        self.inputs = inputs_of((m.weight.name, m.columns) for m in plan.matrices)
        self.layerwise = layerwise
        self.pooled = sum(each.nbytes for each in self.inputs)
        self.every = sum(each.nbytes * (1 + each.experts) for each in self.inputs)
        mixtures = sum(each.experts > 0 for each in self.inputs)
        self.per_layer = max(limit - self.pooled, 0) // mixtures if mixtures else 0

    @classmethod
    def of(cls, flags: Namespace, plan: Plan) -> "Sizes":
        """Those of a run of collect_activation_stats.py."""
        return cls(plan, flags.second_moments_limit, flags.layerwise)

    def of_own(self, tokens: int | None) -> list[Input]:
        """Inputs whose experts can get matrices of their own: there is room, and tokens enough for one
        expert.

        Args:
            tokens: of the whole run; None if that is not known.
        """
        from fp8lib.calibration.second_moments import TOKENS_PER_CHANNEL

        return [
            each
            for each in self.inputs
            if each.experts
            and self.layerwise  # else sums of all experts of all layers would be in memory
            and each.nbytes <= self.per_layer
            and (tokens is None or tokens >= TOKENS_PER_CHANNEL * each.channels)
        ]

    def memory(self, tokens: int | None) -> int:
        """Bytes of the sums that are in memory together, float64 [n, n] each."""
        own = {each.name for each in self.of_own(tokens)}
        layers: dict[str, int] = {}
        for each in self.inputs:
            count = 1 + (each.experts if each.name in own else 0)
            layer = ".".join(without_prefix(each.name).split(".")[:2]) if self.layerwise else ""
            layers[layer] = layers.get(layer, 0) + 8 * each.channels**2 * count
        return max(layers.values(), default=0)


def print_sizes(printer: Printer, flags: Namespace, sizes: Sizes) -> None:
    """`--dry_run`: what would be written."""
    printer.line("=" * WIDTH)
    printer.line("  SECOND MOMENTS (dry run, nothing written)")
    printer.line("-" * WIDTH)
    kinds: dict[tuple[str, int], list[Input]] = {}
    for each in sizes.inputs:
        kind = ".".join("*" if part.isdigit() else part for part in each.name.split("."))
        kinds.setdefault((kind, each.channels), []).append(each)
    for (kind, channels), members in sorted(kinds.items()):
        total = size(sum(each.nbytes for each in members))
        printer.line(f"  {len(members):>6}  [{channels}, {channels}]  {total:>8}  {printable(kind)}")
    printer.line("-" * WIDTH)
    printer.line(f"  File                : {printable(path_beside(flags.output))}")
    printer.line(f"  Pooled              : {size(sizes.pooled)}")
    if sizes.every > sizes.pooled:
        limit = size(flags.second_moments_limit)
        printer.line(f"  Experts' own        : up to {size(sizes.every - sizes.pooled)} more, within {limit}")
        if not sizes.layerwise:
            printer.line("                        (only with --layerwise)")
    printer.line(f"  Memory for the sums : up to {size(sizes.memory(None))}")
    printer.line("=" * WIDTH)


class Collector(AbstractContextManager):
    """Sums second moments on every rank, and writes them on rank 0.

    Args:
        flags: of collect_activation_stats.py.
        plan: what is quantized.
        ranks: all of them.
        tokens: of the prompts of all ranks.
        provenance: for the file.

    Attributes:
        sums: what the recorder adds to.
        written: matrices written; `own` of them are single experts'.
    """

    def __init__(
        self, flags: Namespace, plan: Plan, ranks: Ranks, tokens: int, provenance: dict[str, object]
    ) -> None:
        from fp8lib.calibration.second_moments import MomentSums

        sizes = Sizes.of(flags, plan)
        own = sizes.of_own(tokens)
        self.sums = MomentSums(frozenset(each.name for each in own))
        self.written = self.own = 0
        self._ranks = ranks
        self._per_layer = sizes.per_layer
        self._writer = None
        if ranks.is_main:
            names = {each.name for each in own}
            inputs = [each if each.name in names else replace(each, experts=0) for each in sizes.inputs]
            self._writer = SecondMomentsWriter(path_beside(flags.output), inputs, provenance)

    def finish(self, number: int, others: list[int]) -> None:
        """Write what was summed since the last call, on rank 0 with what the others summed.

        One matrix at a time travels, so the store holds one of each rank at most.

        Args:
            number: of the layer, the same on every rank.
            others: ranks that have sums for it.

        Raises:
            Fp8Error: some rank failed, or the file cannot be written.
        """
        candidates: list[Moments] = []
        for count, mine in enumerate(self.sums.take()):
            key = f"second moments {number}.{count} of rank"
            if not self._ranks.is_main:
                self._ranks.send(f"{key} {self._ranks.rank}", mine.to_bytes())
                continue
            for rank in others:
                mine = mine.merged(self._ranks.receive(f"{key} {rank}"))
            if not mine.is_own and mine.tokens:
                self._write(mine)
            elif mine.is_own and mine.is_enough:
                candidates.append(mine)
        self._write_own(candidates)

    def _write_own(self, candidates: "list[Moments]") -> None:
        """Single experts' matrices, those of most tokens first, as far as the layer's share goes."""
        room = self._per_layer
        for each in sorted(candidates, key=lambda m: -m.tokens):
            room -= 4 * triangle(each.channels) + 8
            if room < 0:
                return
            self._write(each)
            self.own += 1

    def _write(self, moments: "Moments") -> None:
        self._writer.add(moments.name, moments.channels, moments.mean, moments.tokens)
        self.written += 1

    def commit(self) -> None:
        """Give the file its name."""
        self._writer.commit()

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.__exit__()


def refuse_too_large(flags: Namespace, sizes: Sizes) -> None:
    """Refuse a file that is over the limit without any expert's own matrix.

    Raises:
        Fp8Error: says how large it would be.
    """
    if sizes.pooled > flags.second_moments_limit:
        raise Fp8Error(
            f"{printable(path_beside(flags.output))}: would take {size(sizes.pooled)}, more than "
            f"--second_moments_limit {flags.second_moments_limit / 1e9:g}; give a higher limit"
        )
