"""One run of quantize_fp8.py, from its flags to a verdict: what quantizing and verifying have in common.

Under torchrun every rank comes here. Rank 0 plans, refuses and reports for all.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lib import Fp8Error
from fp8lib.calibration.statistics_file import Statistics
from fp8lib.checkpoint.adapters import Adapters, open_adapters
from fp8lib.checkpoint.dequantize_plan import make_dequantize_plan
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.layout import ShardPlan
from fp8lib.checkpoint.merged_plan import with_adapters
from fp8lib.checkpoint.plan import Plan, make_plan
from fp8lib.checkpoint.rules import keeps_precision
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job import claims, dry_run, manifest, output_dir
from fp8lib.job.manifest import ShardResult
from fp8lib.job.progress import Progress
from fp8lib.job.ranks import Ranks
from fp8lib.job.rounding import SecondMomentsUse, moments_for
from fp8lib.terminal import Talk, size
from fp8lib.verification import report
from fp8lib.verification.claim import Claim
from fp8lib.verification.findings import Findings
from fp8lib.verification.health import Zone, judge

if TYPE_CHECKING:
    from fp8lib.streaming.units import Unit


def run(flags: Namespace, talk: Talk) -> Zone:
    """Quantize a checkpoint, or print the plan of it, or verify one that is finished.

    Args:
        flags: of quantize_fp8.py, whose parser documents them.
        talk: how to speak to the user.

    Returns:
        The verdict, the same on every rank; GOOD for a dry run and where verification was skipped.

    Raises:
        Fp8Error: refused or failed, on every rank. No config.json is left in the output directory.
    """
    ranks = Ranks()
    if not ranks.is_main:
        talk = Talk(talk.printer, lambda text: None)
    for text in flags.notes:
        talk.warn(text)
    found = compared = None
    try:
        # Imported where they are needed: together they take a tenth of a second.
        if flags.report and ranks.is_main:
            from fp8lib.job import reporting

            reporting.check(flags)
        if flags.compare_outputs:
            from fp8lib.job import comparing

            inputs = comparing.prepare(flags, ranks) if ranks.is_main else None
        if flags.verify_only and flags.dequantize:
            from fp8lib.job import dequantizing

            verdict = dequantizing.verify_only(flags, talk, ranks)
        elif flags.verify_only:
            from fp8lib.job import verifying

            verdict, found = verifying.verify_only(flags, talk, ranks)
        elif flags.dry_run:
            verdict = _dry_run(flags, talk, ranks)
        else:
            from fp8lib.job import quantizing

            verdict, found = quantizing.quantize(flags, talk, ranks)
        if flags.compare_outputs:
            verdict, compared = comparing.compare(flags, talk, ranks, verdict, inputs)
        if flags.report and found is not None:
            reporting.write(flags, found, verdict, compared)
    except Exception as error:
        ranks.fail(error)
        ranks.leave()
        raise
    ranks.leave(exit_code=exit_code(flags, verdict))
    return verdict


def exit_code(flags: Namespace, verdict: Zone) -> int:
    """1 for FAIL, and with --strict for WARN."""
    return int(verdict is Zone.FAIL or (flags.strict and verdict is Zone.WARN))


def plan_for(flags: Namespace, talk: Talk) -> tuple[Plan, Statistics | None, int | None]:
    """The plan, the statistics to use, and how many tensors they cover (None without a file).

    Raises:
        Fp8Error: everything that headers and flags can refuse.
    """
    checkpoint = open_checkpoint(flags.input_dir)
    if flags.dequantize:
        plan: Plan = make_dequantize_plan(checkpoint, flags.expert_layout)
    else:
        plan = make_plan(checkpoint, flags.selection)
    if flags.lora_dir:
        plan = with_adapters(plan, open_adapters(flags.lora_dir, checkpoint))
    for note in plan.notes:
        talk.warn(note)
    for name in checkpoint.unused:
        talk.warn(f"{printable(name)} is not in the index and is left out")
    for name in checkpoint.strays:
        talk.warn(f"{printable(name)} belongs to no model and is left out")
    if not flags.dequantize and not flags.lora_dir:
        _note_kept_dtype(plan, talk)
    if flags.output_dir is not None:
        output_dir.check_location(flags.input_dir, flags.output_dir)
    if flags.activation_stats is None or flags.dequantize:
        return plan, None, None
    statistics = Statistics(flags.activation_stats)
    covered = statistics.check((m.weight.name, m.columns) for m in plan.matrices)
    if not flags.calibration.uses_activations:
        talk.warn(f"--calib_mode {flags.calibration.mode} does not use the activation statistics")
        return plan, None, covered
    if covered == 0:
        raise Fp8Error(
            f"{printable(flags.activation_stats)}: no entry matches a quantized tensor; "
            "collect statistics from this model"
        )
    if total := sum(1 for _ in plan.matrices) - covered:
        talk.warn(f"{total} of {total + covered} tensors have no activation statistics; a_j = 1 for them")
    return plan, statistics, covered


def _note_kept_dtype(plan: Plan, talk: Talk) -> None:
    """Say what --kept_dtype would save, or that it changes nothing."""
    kept = [k.tensor for k in plan.kept if not keeps_precision(k.tensor.name)]
    if plan.selection.kept_dtype:
        if not any(t.dtype in ("F32", "F16") for t in kept):
            talk.warn("--kept_dtype has no effect: nothing of the input that it touches is F32 or F16")
    elif nbytes := sum(t.nbytes for t in kept if t.dtype == "F32"):
        talk.warn(f"kept tensors stay F32 ({size(nbytes)}); --kept_dtype bfloat16 halves them")


def _dry_run(flags: Namespace, talk: Talk, ranks: Ranks) -> Zone:
    if ranks.is_main:
        plan, _, _ = plan_for(flags, talk)
        if not flags.dequantize:
            moments_for(flags, plan, talk)
        (dry_run.print_restoring if flags.dequantize else dry_run.print_plan)(plan, talk.printer)
    return agree(ranks, Zone.GOOD)


def agree_on(ranks: Ranks, found: Findings | None) -> tuple[Zone, Findings | None]:
    """(rank 0's verdict, on every rank; what it found, None on others)."""
    return agree(ranks, found and (found.health.verdict if found.health else Zone.GOOD)), found


def agree(ranks: Ranks, verdict: Zone | None) -> Zone:
    """Rank 0's verdict, on every rank."""
    if ranks.is_main:
        ranks.publish("verdict", int(verdict))
        return verdict
    return Zone(ranks.wait_for("verdict"))


# --- shared work -------------------------------------------------------------------------------


def settings_for(
    flags: Namespace,
    statistics: Statistics | None,
    ranks: Ranks,
    moments: SecondMomentsUse | None = None,
    adapters: Adapters | None = None,
):
    """How this rank processes shards: `streaming.shard_job.Settings`."""
    from fp8lib.streaming import devices
    from fp8lib.streaming.convert import Nearest
    from fp8lib.streaming.merging import AdapterMerge
    from fp8lib.streaming.shard_job import Settings

    device = devices.choose_device(flags.device, ranks.local_rank)
    importance = statistics.importance if statistics else None
    if moments:
        convert = moments.conversion(flags, importance, device)
    else:
        convert = Nearest(flags.calibration, importance)
    return Settings(
        convert=convert,
        piece=convert.piece(device) if moments else 0,
        device=device,
        workers=flags.workers or devices.default_workers(device, ranks.local_world),
        checksums=flags.checksums,
        readers=devices.default_readers(device, ranks.local_world),
        merge=AdapterMerge(adapters) if adapters else None,
    )


def shard_check(
    flags: Namespace,
    settings,
    claim: Claim,
    name: str,
    pairs: Sequence,
    problems: Sequence[str],
    merged: Sequence = (),
    **facts: object,
):
    """The check of one shard that the flags ask for: `verification.shard_check.ShardCheck`.

    `facts` are its other fields.
    """
    from fp8lib.verification.shard_check import ShardCheck

    return ShardCheck(
        name,
        tuple(pairs),
        list(problems),
        flags.verify_samples,
        flags.seed,
        claim,
        getattr(settings.convert, "factors", None),
        settings.merge,
        tuple(merged),
        **facts,
    )


def planned_check(flags: Namespace, settings) -> Callable | None:
    """(plan, path) -> check of a shard that was written as planned; None if verification is skipped.

    What was copied is read back only where all is to be verified; of what was merged, a sample.
    """
    from fp8lib.streaming.sums import Origin
    from fp8lib.verification.pairing import planned_kept, planned_pairs, structural_problems
    from fp8lib.verification.restored import RestoredCheck, planned_restored
    from fp8lib.verification.shard_check import sample

    claim = None if flags.dequantize else claims.of_run(flags)

    def check(plan: ShardPlan, path: Path):
        problems, rewritten = structural_problems(plan, path), planned_restored(plan, path)
        if flags.dequantize:
            kept = planned_kept(plan, path)
            return RestoredCheck(plan.name, rewritten, problems, kept, len(plan.header))
        return shard_check(
            flags,
            settings,
            claim,
            plan.name,
            planned_pairs(plan, path),
            problems,
            sample(rewritten, flags.verify_samples, flags.seed, plan.name),
            kept=planned_kept(plan, path) if flags.verify_samples is None else (),
            origin=Origin.of(plan.outputs()),
            header_bytes=len(plan.header),
        )

    return None if flags.skip_verify else check


def work_for_main(flags: Namespace, ranks: Ranks, settings, work: list) -> None:
    """Another rank's share of the work. Its results go to rank 0."""
    with closing(_process(flags, ranks, settings, work, lambda _, count: ranks.progress(count))) as results:
        for result in results:
            ranks.send_result([result.name, manifest.to_record(result, None), result.final])
    ranks.look()


def work_and_gather(
    flags: Namespace,
    ranks: Ranks,
    settings,
    work: list,
    progress: Progress,
    record: Callable[[ShardResult], None],
) -> None:
    """Rank 0's share of the work, and the results of all ranks as they come.

    Args:
        flags: of the run.
        ranks: all of them.
        settings: how shards are processed.
        work: units and shards to check, the same list on every rank.
        progress: of the shards that will have a final result; closed at the end.
        record: called with every result.
    """
    with progress:

        def finished(result: ShardResult) -> None:
            record(result)
            if result.final:
                progress.finished(result.name)

        def receive() -> None:
            for name, body, final in ranks.new_results():
                finished(replace(manifest.from_record(name, body, None), final=final))

        def on_bytes(name: str, count: int) -> None:
            if (total := ranks.progress(count)) is not None:
                progress.show(name, total)
                receive()

        with closing(_process(flags, ranks, settings, work, on_bytes)) as results:
            for result in results:
                finished(result)
        # Wait until every rank has either refused or begun. Otherwise a fast rank 0 could end first, and
        # whether the run fails would depend on speed.
        while not (progress.is_done and ranks.all_at_work()):
            progress.show("", ranks.look_again())
            receive()
        progress.show_all()


def _process(flags: Namespace, ranks: Ranks, settings, work: list, on_bytes) -> Iterator[ShardResult]:
    from fp8lib.streaming import pipeline
    from fp8lib.streaming.sums import Sums

    def add_up(unit: "Unit", sums: Sums) -> Sums:
        name = f"sums of {unit.plan.name}"
        return Sums.of_halves(ranks.add(f"{name}/{i}", half) for i, half in enumerate(sums.halves()))

    shards = pipeline.process(
        ranks.claims(work),
        flags.output_dir,
        settings,
        on_bytes,
        lambda unit: ranks.count(f"parts of {unit.plan.name}") == unit.parts,
        planned_check(flags, settings),
        add_up,
    )
    with closing(shards):
        for done in shards:
            result = ShardResult(done.name, done.size, done.sha256, (), (), done.final, sums=done.sums)
            if check := done.check:
                measurements = check.measurements()
                damage = check.damage(measurements)
                result = replace(
                    result,
                    measurements=measurements,
                    problems=(*check.found_problems(done.sums), *damage),
                    damaged=bool(damage),
                    looked_at=check.looked_at,
                )
            yield result


def summarize(
    flags: Namespace, talk: Talk, found: Findings, advise: Callable[[Findings], Sequence[str]]
) -> Findings:
    """Judge what was found, unless verification was skipped, and print the summary.

    Args:
        flags: of the run.
        talk: how to speak to the user.
        found: not judged yet.
        advise: what to do about tensors that are not GOOD, where nothing worse is wrong.

    Returns:
        It, judged.
    """
    if not flags.skip_verify:
        health = judge(
            found.measurements,
            found.problems,
            found.finished,
            flags.bands,
            found.damaged,
        )
        found = replace(found, health=health, bands=flags.bands)
        if health.flagged and not found.problems:
            health = replace(health, recommendations=tuple(advise(found)))
            found = replace(found, health=health)
    report.print_summary(talk.printer, found)
    return found
