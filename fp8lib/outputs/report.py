"""Prints a comparison, in llama.cpp's terms (`llama-perplexity --kl-divergence`)."""

from fp8lib.outputs.figures import Candidate, Comparison, Divergence, Figure
from fp8lib.terminal import WIDTH, Printer

_PER_LINE = 6
"""Layers on a line."""


def print_comparison(printer: Printer, comparison: Comparison, verdict: str) -> None:
    """The comparison of one directory with the original, or of two.

    Args:
        printer: where to.
        comparison: what was found.
        verdict: what follows from it, in a sentence.
    """
    printer.line("=" * WIDTH)
    printer.line("  OUTPUTS COMPARED")
    printer.line(f"  Reference           : {comparison.reference}")
    printer.line(f"  Prompts             : {comparison.prompts} ({comparison.tokens:,} tokens)")
    for name, value in comparison.settings.items():
        printer.line(f"  {name:<20}: {value}")
    for candidate in comparison.candidates:
        printer.line("-" * WIDTH)
        printer.line(f"  {candidate.directory}")
        if candidate.not_finite:
            printer.line(f"  NaN or infinity behind {candidate.not_finite}")
            continue
        _print_figures(printer, candidate.overall)
        _print_topics(printer, candidate)
        _print_layers(printer, candidate, comparison.layer_names)
    if comparison.difference is not None:
        _print_difference(printer, comparison)
    printer.line("-" * WIDTH)
    printer.wrapped(verdict)
    printer.line("=" * WIDTH)


def _print_figures(printer: Printer, found: Divergence) -> None:
    printer.line(f"  Scored positions    : {found.positions:,}")
    rows = (
        ("Mean    KLD", _shown(found.mean_kld, 6)),
        ("Maximum KLD", f"{found.max_kld:.6f}"),
        ("99.9%   KLD", f"{found.kld_999:.6f}"),
        ("99.0%   KLD", f"{found.kld_99:.6f}"),
        ("95.0%   KLD", f"{found.kld_95:.6f}"),
        ("90.0%   KLD", f"{found.kld_90:.6f}"),
        ("Median  KLD", f"{found.median_kld:.6f}"),
        ("Same top p", _shown(found.same_top.times(100), 3, " %")),
        ("Mean Δp", _shown(found.mean_dp.times(100), 3, " %")),
        ("RMS Δp", _shown(found.rms_dp.times(100), 3, " %")),
        ("PPL(BF16)", _shown(found.ppl_reference, 4)),
        ("PPL(FP8)", _shown(found.ppl, 4)),
        ("PPL(FP8)/PPL(BF16)", _shown(found.ppl_ratio, 6)),
    )
    for label, value in rows:
        printer.line(f"  {label:<20}: {value}")


def _print_topics(printer: Printer, candidate: Candidate) -> None:
    if not candidate.by_topic:
        return
    width = max(12, *map(len, candidate.by_topic))
    printer.line()
    printer.line(f"  {'topic':<{width}}  {'mean KLD':<22}{'same top p':<12}PPL ratio")
    for topic, found in candidate.by_topic.items():
        kld, same = _shown(found.mean_kld, 6), f"{100 * found.same_top.value:.2f} %"
        printer.line(f"  {topic:<{width}}  {kld:<22}{same:<12}{found.ppl_ratio.value:.4f}")


def _print_layers(printer: Printer, candidate: Candidate, names: tuple[str, ...]) -> None:
    errors = candidate.layers
    printer.line()
    printer.line("  Relative error of the hidden state behind each layer")
    for first in range(0, len(errors), _PER_LINE):
        values = "".join(f"{error:>9.4f}" for error in errors[first : first + _PER_LINE])
        printer.line(f"  {first:>4}{values}")
    layer, rise = largest_rise(errors)
    before = errors[layer - 1] if layer else 0.0
    printer.line(f"  Largest rise        : {names[layer]}, {before:.4f} to {errors[layer]:.4f} (+{rise:.4f})")


def largest_rise(errors: tuple[float, ...]) -> tuple[int, float]:
    """(layer that adds most to the relative error of the hidden state, how much)."""
    rises = [after - before for before, after in zip((0.0, *errors), errors, strict=False)]
    layer = max(range(len(rises)), key=rises.__getitem__)
    return layer, rises[layer]


def _print_difference(printer: Printer, comparison: Comparison) -> None:
    one, two = (candidate.overall.mean_kld.value for candidate in comparison.candidates)
    printer.line("-" * WIDTH)
    printer.line("  Paired comparison, the first directory with the second")
    shown = _shown(comparison.difference, 6)
    printer.line(f"  mean KLD {one:.6f} vs {two:.6f}, difference {shown}")
    printer.line(f"  {closer(comparison)}")


def closer(comparison: Comparison) -> str:
    """Which of two directories is closer to the original, as far as the prompts can tell."""
    difference = comparison.difference
    if difference.value == 0 and not difference.error:
        return "The two say the same."
    if difference.error is None or abs(difference.value) < 2 * difference.error:
        return "These prompts do not tell which is closer: less than two standard errors."
    nearer = comparison.candidates[0 if difference.value < 0 else 1]
    return f"Closer to the original: {nearer.directory}"


def _shown(figure: Figure, digits: int, unit: str = "") -> str:
    error = "n/a (one prompt)" if figure.error is None else f"{figure.error:.{digits}f}"
    return f"{figure.value:.{digits}f} ± {error}{unit if figure.error is not None else ''}"
