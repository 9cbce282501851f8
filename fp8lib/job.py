"""One run, from an input directory to a verdict.

The order is the safety: everything that headers, flags and the disk's state can refuse is refused before
the output directory is touched; shards become durable one by one, each recorded in the manifest; and
config.json, without which no engine takes a directory for a model, is written last.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fp8lib import Fp8Error, manifest, output_dir, report
from fp8lib.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint, printable
from fp8lib.health import Zone, judge
from fp8lib.manifest import Manifest, ShardResult
from fp8lib.modes import Calibration
from fp8lib.plan import Plan, make_plan, to_json
from fp8lib.ranks import Ranks
from fp8lib.stats import Statistics
from fp8lib.writer import copy_file, write_file


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to do; the flags of quantize_fp8.py, which document them.

    `verify_samples` is None for all, `activation_stats` None for none, `workers` None for the
    device's default. `notes` are said at the start.
    """

    input_dir: Path
    output_dir: Path | None
    calibration: Calibration
    overwrite: bool = False
    activation_stats: Path | None = None
    device: str = "auto"
    workers: int | None = None
    verify_samples: int | None = 5
    verify: bool = True
    verify_only: bool = False
    seed: int = 0
    checksums: bool = False
    dry_run: bool = False
    quiet: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Talk:
    """How a run speaks to a person: the summary or plan on `printer`, one-line notes through `warn`."""

    printer: report.Printer
    warn: Callable[[str], None]


def run(options: Options, talk: Talk) -> Zone:
    """Quantize a checkpoint, or print the plan of it, or verify one that is finished.

    Under torchrun every rank calls this; rank 0 plans, refuses and reports for all.

    Returns:
        The verdict, the same on every rank; GOOD for a dry run and where verification was skipped.

    Raises:
        Fp8Error: refused or failed, on every rank. No config.json is left in the output directory.
    """
    ranks = Ranks()
    if not ranks.is_main:
        talk = Talk(talk.printer, lambda text: None)
    for text in options.notes:
        talk.warn(text)
    try:
        if options.verify_only:
            verdict = _verify_only(options, talk, ranks)
        elif options.dry_run:
            verdict = _dry_run(options, talk, ranks)
        else:
            verdict = _quantize(options, talk, ranks)
    except Exception as error:
        ranks.fail(error)
        ranks.leave()
        raise
    ranks.leave(exit_code=1 if verdict is Zone.FAIL else 0)
    return verdict


# --- planning ----------------------------------------------------------------------------------


def _plan(options: Options, talk: Talk) -> tuple[Plan, Statistics | None, int | None]:
    """The plan, the statistics to use, and how many tensors they cover (None without a file)."""
    checkpoint = open_checkpoint(options.input_dir)
    plan = make_plan(checkpoint)
    for name in checkpoint.unused:
        talk.warn(f"{printable(name)} is not in the index and is left out")
    if options.output_dir is not None:
        output_dir.check_location(options.input_dir, options.output_dir)
    if options.activation_stats is None:
        return plan, None, None
    statistics = Statistics(options.activation_stats)
    covered = statistics.check((m.weight.name, m.columns) for m in plan.matrices)
    if not options.calibration.uses_activations:
        talk.warn(f"--calib_mode {options.calibration.mode} does not use the activation statistics")
        return plan, None, covered
    if covered == 0:
        raise Fp8Error(
            f"{printable(options.activation_stats)}: no entry matches a quantized tensor; "
            "collect statistics from this model"
        )
    if total := sum(1 for _ in plan.matrices) - covered:
        talk.warn(f"{total} of {total + covered} tensors have no activation statistics; a_j = 1 for them")
    return plan, statistics, covered


def _dry_run(options: Options, talk: Talk, ranks: Ranks) -> Zone:
    if ranks.is_main:
        plan, _, _ = _plan(options, talk)
        report.print_plan(plan, talk.printer)
    return _agree(ranks, Zone.GOOD)


def _agree(ranks: Ranks, verdict: Zone | None) -> Zone:
    """Rank 0's verdict, on every rank."""
    if ranks.is_main:
        ranks.publish("verdict", int(verdict))
        return verdict
    return Zone(ranks.wait_for("verdict"))


# --- quantizing --------------------------------------------------------------------------------


def _quantize(options: Options, talk: Talk, ranks: Ranks) -> Zone:
    # Rank 0 refuses for all: the others say and do nothing before it has agreed.
    todo = None if ranks.is_main else Todo(**ranks.wait_for("todo"))
    plan, statistics, covered = _plan(options, talk)
    settings = _pipeline_settings(options, statistics, ranks)
    terms = _terms(options, plan, statistics)
    if todo is not None:
        _check_agreement(options, terms, todo.terms, ranks)
        _work_for_main(ranks, settings, options.output_dir, _work(options, plan, settings, ranks, todo))
        return _agree(ranks, None)

    mine = Manifest(
        settings=_settings(options, statistics),
        inputs={s.name: manifest.identity(s) for s in plan.checkpoint.shards},
        extra_files=[p.as_posix() for p in plan.checkpoint.extra_files],
    )
    state = output_dir.inspect(options.output_dir, plan, mine, options.overwrite)
    samples = options.verify_samples if options.verify else 0
    measured = sum(len(s.matrices[:samples]) for s in plan.shards)
    output_dir.check_space(options.output_dir, plan, state, measured)
    with closing(output_dir.Lock(options.output_dir, ranks.attempt)), _no_leftovers(options, mine):
        # Once more: another run may have ended here since.
        state = output_dir.inspect(options.output_dir, plan, mine, options.overwrite)
        results, todo = _resume(options, plan, state, mine, terms)
        output_dir.prepare(options.output_dir, state, complete=not todo.quantize)
        journal = _Journal(mine, options)
        journal.save()

        def record(result: ShardResult) -> None:
            recorded = journal.record(result)
            if result.final:
                results[result.name] = recorded

        ranks.publish("todo", asdict(todo))
        work = _work(options, plan, settings, ranks, todo)
        total = sum(s.input_bytes for s in plan.shards if s.name in todo.quantize)
        _work_and_gather(options, settings, ranks, work, todo.count, total, record)
        journal.save()
        _finish(options, plan, results)
    ordered = [results[s.name] for s in plan.shards]
    label, totals = str(options.calibration), report.Totals.of(plan)
    return _agree(ranks, _summarize(options, talk, label, ordered, totals, covered))


class _Journal:
    """Records results in the manifest on disk.

    A shard that is complete is recorded at once. That it is verified, too, may wait while saving takes long
    (2.6 s with the measurements of all 92,000 matrices of a 397B): if it is lost, it is verified again.
    """

    def __init__(self, mine: Manifest, options: Options) -> None:
        self._manifest, self._options = mine, options
        self._saved, self._not_before = False, 0.0

    def record(self, result: ShardResult) -> ShardResult:
        """Record a result; returns it with the checksum that an earlier one of that shard had."""
        earlier = self._manifest.shards.get(result.name)
        result = replace(result, sha256=result.sha256 or (earlier or {}).get("sha256"))
        verification = _verification(self._options) if result.final else None
        self._manifest.shards[result.name] = manifest.to_record(result, verification)
        self._saved = False
        if earlier is None or time.monotonic() >= self._not_before:
            self.save()
        return result

    def save(self) -> None:
        """Save what is not saved yet."""
        if self._saved:
            return
        begun = time.monotonic()
        self._manifest.save(self._options.output_dir)
        took = time.monotonic() - begun
        self._saved, self._not_before = True, begun + (20 * took if took > 0.2 else 0)


@dataclass(frozen=True, slots=True)
class Todo:
    """Names of the shards that are to be quantized, of those that only need verification, and `_terms`."""

    quantize: list[str]
    verify: list[str]
    terms: dict

    @property
    def count(self) -> int:
        return len(self.quantize) + len(self.verify)


def _settings(options: Options, statistics: Statistics | None) -> dict:
    """The flags that decide bytes, as the manifest keeps them."""
    return {
        "calibration": str(options.calibration),
        "activation_stats": statistics.sha256 if statistics else None,
    }


def _verification(options: Options) -> dict | None:
    """How shards are verified, as the manifest keeps it."""
    if not options.verify:
        return None
    samples = "all" if options.verify_samples is None else options.verify_samples
    return {"samples": samples, "seed": options.seed}


def _terms(options: Options, plan: Plan, statistics: Statistics | None) -> dict:
    """What all ranks must agree on: every machine has its own command line and its own view of the disk."""
    return {
        **_settings(options, statistics),
        "verification": _verification(options),
        "checksums": options.checksums,
        "input": {s.name: [s.size, s.header_sha256] for s in plan.checkpoint.shards},
    }


def _check_agreement(options: Options, mine: dict, theirs: dict, ranks: Ranks) -> None:
    """Refuse, on a rank other than 0, another input, other flags or another output directory."""
    for key, value in mine.items():
        if value != theirs[key]:
            raise Fp8Error(
                f"{printable(options.input_dir)}: rank {ranks.rank} has other {key.replace('_', ' ')} "
                "than rank 0; give all machines the same files and flags"
            )
    output_dir.await_lock(options.output_dir, ranks.attempt)


@contextmanager
def _no_leftovers(options: Options, mine: Manifest) -> Iterator[None]:
    """On failure, also remove what no living rank has open."""
    try:
        yield
    except BaseException:
        output_dir.remove_partial_files(options.output_dir, mine)
        raise


def _pipeline_settings(options: Options, statistics: Statistics | None, ranks: Ranks):
    from fp8lib import devices, pipeline

    device = devices.choose_device(options.device, ranks.local_rank)
    return pipeline.Settings(
        calibration=options.calibration,
        statistics=statistics,
        device=device,
        workers=options.workers or devices.default_workers(device, ranks.local_world),
        verify_samples=options.verify_samples,
        verify=options.verify,
        seed=options.seed,
        checksums=options.checksums,
    )


def _resume(
    options: Options, plan: Plan, state: output_dir.State, mine: Manifest, terms: dict
) -> tuple[dict[str, ShardResult], Todo]:
    """Take over an earlier run's finished shards: the results that still stand, and what is left to do."""
    results, todo = {}, Todo([], [], terms)
    for shard in plan.shards:
        record = state.manifest.shards.get(shard.name) if shard.name in state.finished else None
        if record is None or (options.checksums and not record.get("sha256")):
            todo.quantize.append(shard.name)
            continue
        mine.shards[shard.name] = record
        if result := manifest.from_record(shard.name, record, _verification(options)):
            results[shard.name] = result
        else:
            todo.verify.append(shard.name)
    return results, todo


def _work(options: Options, plan: Plan, settings, ranks: Ranks, todo: Todo) -> list:
    """Everything there is to do, the same list on every rank."""
    from fp8lib import pipeline

    shards = {s.name: s for s in plan.shards}
    units = pipeline.divide([shards[name] for name in todo.quantize], ranks.world, settings.checksums)
    return units + [pipeline.written_as_planned(shards[name], options.output_dir) for name in todo.verify]


def _work_for_main(ranks: Ranks, settings, folder: Path, work: list) -> None:
    """Another rank's share: results go to rank 0."""
    with closing(_process(ranks, settings, folder, work, lambda name, count: ranks.progress(count))) as done:
        for result in done:
            ranks.send_result([result.name, manifest.to_record(result, None), result.final])
    ranks.look()


def _work_and_gather(
    options: Options,
    settings,
    ranks: Ranks,
    work: list,
    expected: int,
    total_bytes: int,
    record: Callable[[ShardResult], None],
) -> None:
    """Rank 0's share of the work, and the results of all ranks as they come."""
    with report.Progress(total_bytes, expected, options.quiet) as progress:

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

        with closing(_process(ranks, settings, options.output_dir, work, on_bytes)) as done:
            for result in done:
                finished(result)
        # Not before every rank has had its chance to refuse: the outcome must not depend on speed.
        while progress.done < expected or not ranks.all_at_work():
            progress.show("", ranks.look_again())
            receive()
        progress.show("", total_bytes)


def _process(ranks: Ranks, settings, folder: Path, work: list, on_bytes) -> Iterator[ShardResult]:
    from fp8lib import pipeline

    return pipeline.process(
        ranks.claims(work),
        folder,
        settings,
        on_bytes,
        lambda unit: ranks.count(f"parts of {unit.plan.name}") == unit.parts,
    )


def _finish(options: Options, plan: Plan, results: dict[str, ShardResult]) -> None:
    """Everything beside the shards; config.json last."""
    folder, checkpoint = options.output_dir, plan.checkpoint
    for relative in checkpoint.extra_files:
        copy_file(checkpoint.root / relative, folder / relative)
    if options.checksums:
        lines = "".join(f"{results[s.name].sha256}  {s.name}\n" for s in plan.shards)
        write_file(folder / output_dir.CHECKSUMS, lines.encode())
    write_file(folder / INDEX, to_json(plan.index()))
    if any(r.problems for r in results.values()):
        output_dir.unpublish(folder)
    else:
        write_file(folder / CONFIG, to_json(plan.config()))


# --- verifying ---------------------------------------------------------------------------------


def _verify_only(options: Options, talk: Talk, ranks: Ranks) -> Zone:
    from fp8lib import pipeline
    from fp8lib.pairing import pair_directories

    original, quantized = open_checkpoint(options.input_dir), _open_finished(options.output_dir)
    settings = _pipeline_settings(options, None, ranks)
    work = [
        pipeline.Written(shard.name, shard.size, tuple(pairs), tuple(problems))
        for shard, pairs, problems in pair_directories(original, quantized)
    ]
    earlier = None
    with suppress(Fp8Error):  # another tool's, or damaged: nothing depends on it
        earlier = manifest.load(options.output_dir)
    if earlier and not earlier.made_from(original.shards):
        talk.warn(f"by its {manifest.MANIFEST}, {printable(options.output_dir)} was not made from this input")
    if "quantization_config" not in quantized.config:
        problem = f"{CONFIG}: has no quantization_config, so no engine will read the weights as FP8"
        work[0] = replace(work[0], problems=(*work[0].problems, problem))
    if not ranks.is_main:
        _work_for_main(ranks, settings, options.output_dir, work)
        return _agree(ranks, None)
    results: dict[str, ShardResult] = {}
    _work_and_gather(
        options, settings, ranks, work, len(work), 0, lambda result: results.update({result.name: result})
    )
    calibration = earlier and earlier.settings.get("calibration")
    with suppress(Fp8Error):  # advice is for the mode that was used, if that is known
        options = replace(options, calibration=Calibration.parse(str(calibration)))
    fp8 = sum(len(item.pairs) for item in work)
    kept = sum(len(shard.tensors) for shard in quantized.shards) - 2 * fp8
    ordered = [results[item.name] for item in work]
    label = f"{printable(calibration or 'unknown')} (verify only)"
    return _agree(ranks, _summarize(options, talk, label, ordered, report.Totals(len(work), fp8, kept), None))


def _open_finished(folder: Path) -> Checkpoint:
    if os.path.lexists(folder / manifest.MANIFEST) and not os.path.lexists(folder / CONFIG):
        raise Fp8Error(
            f"{printable(folder / CONFIG)}: not there, as the run that wrote the rest is not finished "
            "or FAILed; repeat its command to continue it, with --overwrite if it FAILed"
        )
    return open_checkpoint(folder)


def _summarize(
    options: Options,
    talk: Talk,
    calibration: str,
    results: list[ShardResult],
    totals: report.Totals,
    covered: int | None,
) -> Zone:
    """Print the summary; returns the verdict."""
    measurements = [m for r in results for m in r.measurements]
    problems = [p for r in results for p in r.problems]
    health = None
    if options.verify:
        mode = options.calibration
        health = judge(measurements, problems, mode.mode, mode.clips, finished=options.verify_only)
    failed = sum(bool(r.problems) for r in results)
    report.print_summary(talk.printer, totals, failed, calibration, measurements, problems, health, covered)
    return health.verdict if health else Zone.GOOD
