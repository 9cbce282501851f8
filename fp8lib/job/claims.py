"""What a run, or the manifest of an earlier one, says about codes and scales: `verification.claim.Claim`."""

from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8lib import Fp8Error, __version__
from fp8lib.calibration.statistics_file import Statistics
from fp8lib.checkpoint.adapters import Adapters
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.job import rounding
from fp8lib.job.manifest import Manifest
from fp8lib.job.rounding import SecondMomentsUse
from fp8lib.numerics.modes import Calibration
from fp8lib.verification.claim import Claim, are_powers_of_two

if TYPE_CHECKING:
    from fp8lib.verification.pairing import Pair


def of_run(flags: Namespace) -> Claim:
    """Of the run itself. Its scales are not chosen again: they have checksums from when they were chosen."""
    return Claim(flags.calibration.powers_of_two, nearest=True)


def applies(earlier: Manifest, original: Checkpoint, adapters: Adapters | None) -> bool:
    """Whether a manifest is about this input and these adapters, so that what it says holds for them."""
    merged = adapters and list(adapters.fingerprints)
    return earlier.made_from(original.shards) and earlier.settings.get("adapters") == merged


def of_manifest(
    flags: Namespace,
    settings,
    moments: SecondMomentsUse | None,
    earlier: Manifest | None,
    pairs: "Iterable[Pair]",
) -> Claim:
    """Of a finished directory.

    Args:
        flags: of this run; its `--activation_stats` is used if it is the same file.
        settings: `streaming.shard_job.Settings` of this run.
        moments: second moments that this run was given, used if they are the same.
        earlier: the directory's manifest; None where it has none, or one about another input.
        pairs: its FP8 weights, whose scales show their format where the manifest does not say it.

    Raises:
        Fp8Error: an --activation_stats that cannot be read.
    """
    from fp8lib.streaming.convert import Nearest

    calibration = None
    if earlier is not None:
        with suppress(Fp8Error):
            calibration = Calibration.parse(str(earlier.settings.get("calibration")))
    if calibration is None:
        return Claim(are_powers_of_two(pairs))
    used, claim = earlier.settings, Claim(calibration.powers_of_two)
    convert = Nearest(calibration)
    if used.get("second_moments") is not None:
        if rounding.settings(moments)["second_moments"] != used["second_moments"]:
            return claim
        convert = replace(settings.convert, calibration=calibration)
    claim = replace(claim, nearest=True)
    if used.get("activation_stats") is not None:
        statistics = flags.activation_stats and Statistics(flags.activation_stats)
        if not statistics or statistics.sha256 != used["activation_stats"]:
            return claim
        convert = replace(convert, importance=statistics.importance)
    return replace(claim, scales=convert.scales) if earlier.version == __version__ else claim
