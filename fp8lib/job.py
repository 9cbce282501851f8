"""One run, from an input directory to a verdict.

The order is the safety: everything that headers, flags and the disk's state can refuse is refused before
the output directory is touched; shards become durable one by one, each recorded in the manifest; and
config.json, without which no engine takes a directory for a model, is written last.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fp8lib import Fp8Error, manifest, output_dir, report
from fp8lib.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint, printable
from fp8lib.health import Health, Zone, judge
from fp8lib.manifest import Manifest, ShardResult
from fp8lib.modes import Calibration
from fp8lib.plan import Plan, make_plan, to_json
from fp8lib.stats import Statistics
from fp8lib.writer import copy_file, write_file


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to do; the flags of quantize_fp8.py, which document them.

    `verify_samples` is None for all, `activation_stats` None for none, `workers` 0 for one per core.
    """

    input_dir: Path
    output_dir: Path | None
    calibration: Calibration
    overwrite: bool = False
    activation_stats: Path | None = None
    device: str = "auto"
    workers: int = 0
    verify_samples: int | None = 5
    verify: bool = True
    seed: int = 0
    dry_run: bool = False
    quiet: bool = False


def run(options: Options, printer: report.Printer, warn) -> Zone:
    """Quantize a checkpoint, or print the plan of it.

    Args:
        options: what to do.
        printer: where the plan or the summary goes.
        warn: called with one line for each thing a person should know but that stops nothing.

    Returns:
        The verdict; GOOD for a dry run and where verification was skipped.

    Raises:
        Fp8Error: refused or failed. No config.json is left in the output directory.
    """
    checkpoint = open_checkpoint(options.input_dir)
    plan = make_plan(checkpoint)
    for name in checkpoint.unused:
        warn(f"{printable(name)} is not in the index and is left out")
    if options.output_dir is not None:
        output_dir.check_location(options.input_dir, options.output_dir)
    statistics, covered = _open_statistics(options, plan, warn)
    if options.dry_run:
        report.print_plan(plan, printer)
        return Zone.GOOD
    mine = Manifest(
        settings=_settings(options, statistics),
        inputs={s.name: manifest.identity(s) for s in checkpoint.shards},
        extra_files=[p.as_posix() for p in checkpoint.extra_files],
    )
    state = output_dir.inspect(options.output_dir, plan, mine, options.overwrite)
    output_dir.check_space(options.output_dir, plan, state)
    settings = _pipeline_settings(options, statistics)
    lock = output_dir.Lock(options.output_dir)
    try:
        output_dir.prepare(options.output_dir, state)
        if state.manifest is not None:
            mine.shards = {name: state.manifest.shards[name] for name in state.finished}
        results = _quantize(options, plan, mine, settings)
        health = _judge(options, results)
        _finish(options.output_dir, checkpoint, plan)
    finally:
        lock.release()
    measurements = [m for r in results for m in r.measurements]
    problems = [p for r in results for p in r.problems]
    report.print_summary(printer, plan, str(options.calibration), measurements, problems, health, covered)
    return health.verdict if health else Zone.GOOD


def _open_statistics(options: Options, plan: Plan, warn) -> tuple[Statistics | None, int | None]:
    if options.activation_stats is None:
        return None, None
    statistics = Statistics(options.activation_stats)
    covered = statistics.check((m.weight.name, m.columns) for m in plan.matrices)
    total = sum(len(s.matrices) for s in plan.shards)
    if not options.calibration.uses_activations:
        warn(f"--calib_mode {options.calibration.mode} does not use the activation statistics")
        return None, covered
    if covered == 0:
        raise Fp8Error(
            f"{printable(options.activation_stats)}: no entry matches a quantized tensor; "
            "collect statistics from this model"
        )
    if covered < total:
        warn(f"{total - covered} of {total} tensors have no activation statistics; a_j = 1 for them")
    return statistics, covered


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


def _pipeline_settings(options: Options, statistics: Statistics | None):
    from fp8lib import pipeline

    device = pipeline.choose_device(options.device)
    return pipeline.Settings(
        calibration=options.calibration,
        statistics=statistics,
        device=device,
        workers=options.workers or pipeline.default_workers(device),
        verify_samples=options.verify_samples,
        verify=options.verify,
        seed=options.seed,
    )


def _quantize(options: Options, plan: Plan, mine: Manifest, settings) -> list[ShardResult]:
    """Write and verify every shard that is not done; results of all shards, in the plan's order."""
    from fp8lib.pipeline import process_shards

    verification = _verification(options)
    results: dict[str, ShardResult] = {}
    written = frozenset(mine.shards)
    for name, record in list(mine.shards.items()):
        if result := manifest.from_record(name, record, verification):
            results[name] = result
    mine.save(options.output_dir)
    todo = [s for s in plan.shards if s.name not in results]
    total = sum(s.input_bytes for s in todo)
    with report.Progress(total, len(todo), options.quiet) as progress:
        done = process_shards(todo, options.output_dir, settings, progress.advance, written)
        with closing(done):
            for result in done:
                results[result.name] = result
                mine.shards[result.name] = manifest.to_record(result, verification)
                mine.save(options.output_dir)
                progress.finished(result.name)
    return [results[s.name] for s in plan.shards]


def _judge(options: Options, results: list[ShardResult]) -> Health | None:
    if not options.verify:
        return None
    return judge(
        [m for r in results for m in r.measurements],
        [p for r in results for p in r.problems],
        options.calibration.mode,
        options.calibration.clips,
    )


def _finish(folder: Path, checkpoint: Checkpoint, plan: Plan) -> None:
    """Everything beside the shards; config.json last."""
    for relative in checkpoint.extra_files:
        copy_file(checkpoint.root / relative, folder / relative)
    write_file(folder / INDEX, to_json(plan.index()))
    write_file(folder / CONFIG, to_json(plan.config()))
