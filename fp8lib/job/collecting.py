"""One calibration run: from a checkpoint and prompts to a statistics file.

Everything that flags, headers and the prompts file can refuse is refused before transformers is imported
and long before the model is loaded. The file appears at the very end, complete or not at all.
"""

import hashlib
import math
import os
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lib import Fp8Error, __version__
from fp8lib.calibration.statistics_file import SUFFIXES, looks_like_statistics
from fp8lib.calibration.statistics_writer import StatisticsWriter
from fp8lib.checkpoint.directory import Checkpoint, open_checkpoint
from fp8lib.checkpoint.plan import Plan, make_plan
from fp8lib.checkpoint.rules import Selection, without_prefix
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job.ranks import Ranks
from fp8lib.model.prompts import (
    Batch,
    Prompt,
    divide,
    make_batches,
    read_prompts,
    require_tokenizer,
    tokenize,
)
from fp8lib.streaming.writer import partial_path, refusing_disk_errors
from fp8lib.terminal import Talk, size

if TYPE_CHECKING:  # most refusals need no library, and come faster without
    import torch

    from fp8lib.calibration.input_statistics import InputStatistics

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
    else:  # rank 0 refuses for all: the others do and say nothing before
        ranks.wait_for("nothing to refuse")
    plan, prompts, device = _refuse_early(flags, ranks)
    if ranks.is_main:
        ranks.publish("nothing to refuse", True)
    transformers = _transformers(flags, ranks)
    root = plan.checkpoint.root
    config = _load(transformers.AutoConfig, root, "config.json").get_text_config()
    tokenizer = _load(transformers.AutoTokenizer, root, "the tokenizer")
    ids = _tokens(flags, prompts, tokenizer, config.vocab_size)
    _check_agreement(flags, plan, ids, ranks)
    batches = make_batches(ids, flags.batch_size, flags.max_prompt_tokens, tokenizer.pad_token_id or 0)

    from fp8lib.calibration import coverage, report

    tokens, generated = sum(batch.tokens for batch in batches), 0
    entries = coverage.Entries(plan)
    with ExitStack() as stack:
        if flags.layerwise:
            layers = _one_layer_at_a_time(flags, plan, config, batches, device, ranks)
            recorded = stack.enter_context(closing(layers))
        else:
            generated, inputs = _whole_model(flags, plan, tokenizer, batches, ranks)
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
        writer.commit()
    ranks.publish("written", True)
    _warn_unrecorded(entries.left, talk.warn)
    facts = {
        "Model": f"{printable(root)} ({provenance['model_type']}), {provenance['mode']}",
        "Prompts": f"{len(prompts)} ({provenance['prompts_file']})",
        "Tokens": f"{tokens + generated:,}: {tokens:,} of prompts, {generated:,} generated",
        "Time": f"{time.monotonic() - started:,.0f} s",
        "Written": f"{printable(flags.output)} ({size(flags.output.stat().st_size)})",
    }
    report.print_summary(talk.printer, entries.coverage(tokens + generated), facts)


def _provenance(flags: Namespace, plan: Plan, prompts: int, tokens: int, generated: int) -> dict:
    """Where the statistics come from, for the file itself."""
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
        "generated_tokens": generated,
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
    prompts = read_prompts(flags.prompts_file)
    require_tokenizer(plan.checkpoint.root)
    device = _device(flags, ranks)
    _check_memory(flags, plan.checkpoint, device, ranks)
    return plan, prompts, device


def _check_agreement(flags: Namespace, plan: Plan, ids: list[list[int]], ranks: Ranks) -> None:
    """Refuse, on a rank other than 0, another model or other prompts: every machine has its own disk."""
    mine = {
        "model": {s.name: [s.size, s.header_sha256] for s in plan.checkpoint.shards},
        "prompts": hashlib.sha256(repr((ids, flags.batch_size)).encode()).hexdigest(),
    }
    if ranks.is_main:
        ranks.publish("terms", mine)
        return
    theirs = ranks.wait_for("terms")
    for key in mine:
        if mine[key] != theirs[key]:
            raise Fp8Error(
                f"{printable(flags.model_dir)}: rank {ranks.rank} has another {key} than rank 0; "
                "give all machines the same files and flags"
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
    probe = partial_path(path)
    try:
        with refusing_disk_errors(path):
            probe.open("wb").close()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _device(flags: Namespace, ranks: Ranks) -> "torch.device | None":
    """The torch device that --device_map names; None where accelerate is to spread the model."""
    if flags.device_map in _SPREAD and not flags.layerwise:
        return None
    from fp8lib.streaming.devices import choose_device

    return choose_device(flags.device_map, ranks.local_rank, flag="--device_map")


def _check_memory(
    flags: Namespace, checkpoint: Checkpoint, device: "torch.device | None", ranks: Ranks
) -> None:
    """Refuse a model, or in layerwise mode a layer, that is larger than the memory there is."""
    from fp8lib.model import memory

    parts = _bytes_in_bf16(checkpoint)
    there = memory.available(device)
    shown = printable(checkpoint.root)
    if flags.layerwise:
        layers = ranks.local_world if device.type == "cpu" else 1  # every rank of a machine holds one
        need = layers * max((n for name, n in parts.items() if name.startswith("layers.")), default=0)
        if need > there:
            what = "its largest layer is" if layers == 1 else f"the largest layers of {layers} ranks are"
            raise Fp8Error(
                f"{shown}: {what} {size(need)} in BF16, and {size(there)} of memory is free; "
                f"use {'a device with more' if layers == 1 else 'fewer ranks'}"
            )
    elif (need := sum(parts.values())) > there:
        raise Fp8Error(
            f"{shown}: {size(need)} in BF16, and {size(there)} of memory is free; "
            "add --layerwise to hold one layer at a time"
        )


def _bytes_in_bf16(checkpoint: Checkpoint) -> dict[str, int]:
    """What the text model takes in memory, by layer and by tensor that is in none."""
    parts: Counter[str] = Counter()
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            name = without_prefix(tensor.name)
            if not name.startswith("mtp.") and ".visual." not in f".{name}":
                part = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
                parts[part] += 2 * math.prod(tensor.shape)
    return parts


def _warn_unrecorded(left: set[str], warn: Callable[[str], None]) -> None:
    """Say which quantized weights have no entry; more than mtp.* means that something is wrong."""
    others = sorted(name for name in left if not name.startswith("mtp."))
    if len(left) > len(others):
        count = len(left) - len(others)
        warn(f"{count} weights of mtp.* get no statistics: transformers does not load them")
    if others:
        warn(f"{len(others)} weights were never used and get no statistics, such as {printable(others[0])}")


# --- libraries ---------------------------------------------------------------------------------


def _transformers(flags: Namespace, ranks: Ranks):
    """The library: off the network, the model is a local directory, and quiet, unless it is debugged."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not flags.debug:
        warnings.simplefilter("ignore")
    import accelerate  # noqa: F401 - device_map needs it, and would say so late
    import transformers

    if not flags.debug:
        transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    if flags.quiet or not ranks.is_main or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers


def _load(kind, root: Path, what: str):
    """A config or tokenizer from the directory, without running any code that lies in it."""
    try:
        return kind.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever any of the libraries below may raise
        raise Fp8Error(
            f"{printable(root)}: transformers cannot read {what} "
            f"({type(error).__name__}: {printable(' '.join(str(error).split()))})"
        ) from error


# --- work --------------------------------------------------------------------------------------


def _tokens(flags: Namespace, prompts: list[Prompt], tokenizer, vocabulary: int) -> list[list[int]]:
    ids = tokenize(prompts, tokenizer, not flags.no_chat_template, flags.max_prompt_tokens)
    largest = max(max(row) for row in ids)
    if largest >= vocabulary:
        raise Fp8Error(
            f"{printable(flags.model_dir)}: its tokenizer gives token {largest}, but the model has "
            f"{vocabulary}; copy the tokenizer files of the model it was made from"
        )
    return ids


def _whole_model(
    flags: Namespace, plan: Plan, tokenizer, batches: list[Batch], ranks: Ranks
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
    with Progress(prompts, "prompts", flags.quiet, ranks) as progress, Recorder(plan) as recorder:
        generated = whole_model.run(model, batches, recorder, progress, flags.max_tokens, stop)
        return generated, recorder.take()


def _one_layer_at_a_time(
    flags: Namespace, plan: Plan, config, batches: list[Batch], device: "torch.device", ranks: Ranks
) -> Iterator[dict[str, "InputStatistics"]]:
    """Statistics by input, layer after layer; on rank 0 those of all ranks' tokens together."""
    import torch

    from fp8lib.calibration.input_statistics import pack, unpack
    from fp8lib.calibration.recording import Recorder
    from fp8lib.model import layerwise
    from fp8lib.model.progress import Progress
    from fp8lib.streaming.devices import cores_of_rank

    if ranks.world > 1 and device.type == "cpu":  # torchrun leaves every rank one thread
        torch.set_num_threads(cores_of_rank(ranks.local_world))
    shares = divide(batches, ranks.world)
    others = [rank for rank in range(1, ranks.world) if shares[rank]]
    if not shares[ranks.rank]:
        return
    total = sum(len(batch.ids) for batch in batches) * config.num_hidden_layers
    quiet = flags.quiet or not ranks.is_main
    with Progress(total, "layers", quiet, ranks) as progress, Recorder(plan) as recorder:
        layers = layerwise.run(plan.checkpoint, config, shares[ranks.rank], device, recorder, progress)
        for number, inputs in enumerate(layers):
            if not ranks.is_main:
                ranks.send(f"layer {number} of rank {ranks.rank}", pack(inputs))
            for rank in others if ranks.is_main else ():
                theirs = unpack(ranks.receive(f"layer {number} of rank {rank}"))
                inputs = {name: mine.merged(theirs[name]) for name, mine in inputs.items()}
            progress.show()
            yield inputs
