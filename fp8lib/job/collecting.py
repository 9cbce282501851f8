"""One calibration run: from a checkpoint and prompts to a statistics file.

Everything that flags, headers and the prompts file can refuse is refused before transformers is imported
and long before the model is loaded. The file appears at the very end, complete or not at all.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lib import Fp8Error, __version__
from fp8lib.calibration.second_moments_file import path_beside
from fp8lib.calibration.statistics_file import SUFFIXES, looks_like_statistics
from fp8lib.calibration.statistics_writer import StatisticsWriter
from fp8lib.checkpoint.consistency import check_config
from fp8lib.checkpoint.directory import CONFIG, Checkpoint, open_checkpoint
from fp8lib.checkpoint.plan import Plan, make_plan
from fp8lib.checkpoint.rules import Selection
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job import moments
from fp8lib.job.forward_passes import (
    check_agreement,
    load,
    load_config,
    load_transformers,
    share_of,
    tokens_of,
    weights_by_part,
)
from fp8lib.job.ranks import Ranks
from fp8lib.model.prompts import Batch, Prompt, make_batches, read_prompts, require_tokenizer
from fp8lib.streaming.writer import refuse_unwritable
from fp8lib.terminal import Talk, size

if TYPE_CHECKING:  # most refusals need no library, and come faster without
    import torch

    from fp8lib.calibration.input_statistics import InputStatistics
    from fp8lib.job.moments import Collector

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of --device_map that let accelerate divide the model among devices and host."""


def run(flags: Namespace, talk: Talk) -> None:
    """Collect statistics and write them.

    Under torchrun every rank calls this; rank 0 refuses, writes and reports for all.

    Args:
        flags: of collect_activation_stats.py, whose parser documents them.
        talk: how to speak to the user.

    Raises:
        Fp8Error: refused or failed, on every rank. There is no new file then.
    """
    ranks = Ranks()
    if not ranks.is_main:
        talk = Talk(talk.printer, lambda text: None)
    for text in flags.notes:
        talk.warn(text)
    try:
        _run(flags, talk, ranks)
    except Exception as error:
        ranks.fail(error)
        ranks.leave()
        raise
    ranks.leave(exit_code=0)


def _run(flags: Namespace, talk: Talk, ranks: Ranks) -> None:
    started = time.monotonic()
    if ranks.is_main:
        _check_output(flags.output)
        if flags.second_moments:
            _check_output(path_beside(flags.output))
    else:  # rank 0 refuses for all: the others do and say nothing before
        ranks.wait_for("nothing to refuse")
    plan, prompts, device = _refuse_early(flags, ranks)
    if ranks.is_main:
        ranks.publish("nothing to refuse", True)
    if flags.dry_run:
        if ranks.is_main:
            moments.print_sizes(talk.printer, flags, moments.Sizes.of(flags, plan))
        return
    transformers = load_transformers(flags, ranks)
    import accelerate  # noqa: F401 - device_map needs it, and would say so late

    root = plan.checkpoint.root
    config = load_config(root)
    _check_generation(flags, config)
    tokenizer = load(transformers.AutoTokenizer, root, "the tokenizer")
    ids = tokens_of(flags, root, prompts, tokenizer, config.vocab_size)
    chosen = [flags.batch_size, flags.second_moments, flags.second_moments_limit]
    check_agreement([plan.checkpoint], ids, chosen, ranks)
    batches = make_batches(ids, flags.batch_size, flags.max_prompt_tokens, tokenizer.pad_token_id or 0)

    from fp8lib.calibration import coverage, report

    tokens, generated = sum(batch.tokens for batch in batches), 0
    entries = coverage.Entries(plan)
    with ExitStack() as stack:
        collector = None
        if flags.second_moments:
            provenance = _provenance(flags, plan, len(prompts), tokens, None)
            collector = stack.enter_context(moments.Collector(flags, plan, ranks, tokens, provenance))
        if flags.layerwise:
            layers = _one_layer_at_a_time(flags, plan, config, batches, device, ranks, collector)
            recorded = stack.enter_context(closing(layers))
        else:
            generated, inputs = _whole_model(flags, plan, tokenizer, batches, ranks, collector)
            recorded = iter([inputs])
        provenance = _provenance(flags, plan, len(prompts), tokens, generated)
        if not ranks.is_main:
            for _ in recorded:
                pass  # rank 0 has them
            ranks.wait_for("written")
            return
        weights = [(m.weight.name, m.columns) for m in plan.matrices]
        writer = stack.enter_context(StatisticsWriter(flags.output, weights, provenance))
        for inputs in recorded:
            for weight, entry in entries.make(inputs):
                writer.add(weight, entry)
        if collector:
            collector.commit()
        writer.commit()
    ranks.publish("written", True)
    _warn_unrecorded(entries.left, talk.warn)
    facts = _facts(flags, provenance, time.monotonic() - started, collector)
    report.print_summary(talk.printer, entries.coverage(tokens + generated), facts)


def _facts(flags: Namespace, provenance: dict, seconds: float, collector: "Collector | None") -> dict:
    """What the summary says about the run: label -> value."""
    tokens, generated = provenance["prompt_tokens"], provenance["generated_tokens"]
    facts = {
        "Model": f"{printable(flags.model_dir)} ({provenance['model_type']}), {provenance['mode']}",
        "Prompts": f"{provenance['prompts']} ({provenance['prompts_file']})",
        "Tokens": f"{tokens + generated:,}: {tokens:,} of prompts, {generated:,} generated",
        "Time": f"{seconds:,.0f} s",
        "Written": f"{printable(flags.output)} ({size(flags.output.stat().st_size)})",
    }
    if collector:
        beside = path_beside(flags.output)
        own = f", {collector.own:,} of them single experts'" if collector.own else ""
        facts["Second moments"] = f"{collector.written:,}{own}"
        facts[""] = f"{printable(beside)} ({size(beside.stat().st_size)})"
    return facts


def _provenance(flags: Namespace, plan: Plan, prompts: int, tokens: int, generated: int | None) -> dict:
    """Where the statistics come from, for the file itself; `generated` is None where it is not known yet."""
    import torch
    import transformers

    from fp8lib.calibration.coverage import ENOUGH

    return {
        "producer": f"collect_activation_stats {__version__}",
        "model_type": plan.checkpoint.config["model_type"],
        "mode": "one layer at a time" if flags.layerwise else "whole model",
        "prompts": prompts,
        "prompts_file": printable(flags.prompts_file.name) if flags.prompts_file else "built in",
        "prompt_tokens": tokens,
        **({} if generated is None else {"generated_tokens": generated}),
        "own_statistics_from_tokens": ENOUGH,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


# --- refusals ----------------------------------------------------------------------------------


def _refuse_early(flags: Namespace, ranks: Ranks) -> tuple[Plan, list[Prompt], "torch.device | None"]:
    """Everything that needs no library but torch to be found wrong."""
    if ranks.world > 1 and not flags.layerwise:
        raise Fp8Error("under torchrun: add --layerwise; without it one process spreads the model itself")
    # The largest set, so that one file serves every choice of the quantizer.
    plan = make_plan(open_checkpoint(flags.model_dir), Selection("official"))
    check_config(plan.checkpoint)
    prompts = read_prompts(flags.prompts_file)
    require_tokenizer(plan.checkpoint.root)
    device = _device(flags, ranks)
    extra = 0
    if flags.second_moments:
        moments.refuse_too_large(flags, sizes := moments.Sizes.of(flags, plan))
        extra = sizes.memory(None)
    if not flags.dry_run:
        _check_memory(flags, plan.checkpoint, device, ranks, extra)
    return plan, prompts, device


def _check_generation(flags: Namespace, config) -> None:
    """Refuse to generate with a model that has no full attention: transformers' cache has no place for it."""
    if flags.layerwise or flags.max_tokens < 2 or "full_attention" in config.layer_types:
        return
    raise Fp8Error(
        f"{printable(flags.model_dir / CONFIG)}: none of its {config.num_hidden_layers} layers is full "
        "attention, and transformers cannot generate without; add --layerwise or --max_tokens 0"
    )


def _check_output(path: Path) -> None:
    """Refuse an output file that could not be written at the end of a long run, or that replaces another."""
    shown = printable(path)
    if path.suffix not in SUFFIXES:
        raise Fp8Error(f"{shown}: unknown suffix; name the file *.json or *.safetensors")
    if path.is_dir():
        raise Fp8Error(f"{shown}: is a directory; name a file in it")
    if not path.parent.is_dir():
        raise Fp8Error(f"{printable(path.parent)}: no such directory; make it first, or check --output")
    if path.exists() and not looks_like_statistics(path):
        raise Fp8Error(f"{shown}: exists and is no statistics file; choose another name, or remove it")
    refuse_unwritable(path)


def _device(flags: Namespace, ranks: Ranks) -> "torch.device | None":
    """The torch device that --device_map names; None where accelerate is to spread the model."""
    if flags.device_map in _SPREAD and not flags.layerwise:
        return None
    from fp8lib.streaming.devices import choose_device, make_current

    device = choose_device(flags.device_map, ranks.local_rank, flag="--device_map")
    make_current(device)
    return device


def _check_memory(
    flags: Namespace, checkpoint: Checkpoint, device: "torch.device | None", ranks: Ranks, sums: int
) -> None:
    """Refuse a model, or in layerwise mode a layer, that is larger than the memory there is.

    `sums` is what second moments take beside it.
    """
    from fp8lib.model import memory

    parts = {name: 2 * count for name, count in weights_by_part(checkpoint).items()}
    there = memory.available(device)
    shown = printable(checkpoint.root)
    beside = " with its second moments" if sums else ""
    if flags.layerwise:
        layers = ranks.local_world if device.type == "cpu" else 1  # every rank of a machine holds one
        need = max((n for name, n in parts.items() if name.startswith("layers.")), default=0)
        need = layers * (need + sums)
        if need > there:
            what = "its largest layer is" if layers == 1 else f"the largest layers of {layers} ranks are"
            raise Fp8Error(
                f"{shown}: {what} {size(need)} in BF16{beside}, and {size(there)} of memory is free; "
                f"use {'a device with more' if layers == 1 else 'fewer ranks'}"
            )
    elif (need := sum(parts.values(), sums)) > there:
        raise Fp8Error(
            f"{shown}: {size(need)} in BF16{beside}, and {size(there)} of memory is free; "
            "add --layerwise to hold one layer at a time"
        )


def _warn_unrecorded(left: set[str], warn: Callable[[str], None]) -> None:
    """Say which quantized weights have no entry; more than mtp.* means that something is wrong."""
    others = sorted(name for name in left if not name.startswith("mtp."))
    if len(left) > len(others):
        count = len(left) - len(others)
        warn(f"{count} weights of mtp.* get no statistics: transformers does not load them")
    if others:
        warn(f"{len(others)} weights were never used and get no statistics, such as {printable(others[0])}")


# --- work --------------------------------------------------------------------------------------


def _whole_model(
    flags: Namespace,
    plan: Plan,
    tokenizer,
    batches: list[Batch],
    ranks: Ranks,
    collector: "Collector | None",
) -> tuple[int, dict[str, "InputStatistics"]]:
    """(generated tokens, statistics by input)."""
    from fp8lib.calibration.recording import Recorder
    from fp8lib.model import whole_model
    from fp8lib.model.progress import Progress

    if not (flags.quiet or sys.stderr.isatty()):  # transformers shows a bar on a terminal
        print(f"loading {printable(plan.checkpoint.root)}", file=sys.stderr, flush=True)
    model = whole_model.load(plan.checkpoint.root, flags.device_map)
    stop = whole_model.end_tokens(model, tokenizer)
    prompts = sum(len(batch.ids) for batch in batches)
    recording = Recorder(plan, collector and collector.sums)
    with Progress(prompts, "prompts", flags.quiet, ranks) as progress, recording as recorder:
        generated = whole_model.run(model, batches, recorder, progress, flags.max_tokens, stop)
        inputs = recorder.take()
        if collector:
            collector.finish(0, [])
        return generated, inputs


def _one_layer_at_a_time(
    flags: Namespace,
    plan: Plan,
    config,
    batches: list[Batch],
    device: "torch.device",
    ranks: Ranks,
    collector: "Collector | None",
) -> Iterator[dict[str, "InputStatistics"]]:
    """Statistics by input, layer after layer; on rank 0 those of all ranks' tokens together."""
    from fp8lib.calibration.input_statistics import pack, unpack
    from fp8lib.calibration.recording import Recorder
    from fp8lib.model import layerwise
    from fp8lib.model.progress import Progress

    shares = share_of(batches, ranks, device)
    others = [rank for rank in range(1, ranks.world) if shares[rank]]
    if not shares[ranks.rank]:
        return
    total = sum(len(batch.ids) for batch in batches) * config.num_hidden_layers
    quiet = flags.quiet or not ranks.is_main
    recording = Recorder(plan, collector and collector.sums)
    with Progress(total, "layers", quiet, ranks, "prompts x layers") as progress, recording as recorder:
        layers = layerwise.run(plan.checkpoint, config, shares[ranks.rank], device, recorder, progress)
        for number, inputs in enumerate(layers):
            if not ranks.is_main:
                ranks.send(f"layer {number} of rank {ranks.rank}", pack(inputs))
            for rank in others if ranks.is_main else ():
                theirs = unpack(ranks.receive(f"layer {number} of rank {rank}"))
                inputs = {name: mine.merged(theirs[name]) for name, mine in inputs.items()}
            if collector:
                collector.finish(number, others)
            progress.show()
            yield inputs
