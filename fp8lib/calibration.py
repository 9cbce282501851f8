"""One calibration run: from a checkpoint and prompts to a statistics file.

Everything that flags, headers and the prompts file can refuse is refused before transformers is imported
and long before the model is loaded. The file is written at the very end, complete or not at all.
"""

import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lib import Fp8Error, __version__
from fp8lib.checkpoint import Checkpoint, open_checkpoint, printable
from fp8lib.plan import Plan, make_plan
from fp8lib.prompts import Prompt, make_batches, read_prompts, require_tokenizer, tokenize
from fp8lib.report import Printer, size
from fp8lib.stats import SUFFIXES, without_prefix, write_statistics
from fp8lib.writer import partial_path, refusing_disk_errors

if TYPE_CHECKING:  # most refusals need no library, and come faster without
    import torch

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of --device_map that let accelerate divide the model among devices and host."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to do; the flags of collect_activation_stats.py, which document them."""

    model_dir: Path
    output: Path
    prompts_file: Path | None = None
    chat_template: bool = True
    max_tokens: int = 256
    max_prompt_tokens: int = 2048
    batch_size: int = 8
    device_map: str = "auto"
    layerwise: bool = False
    quiet: bool = False
    debug: bool = False


def run(options: Options, printer: Printer, warn: Callable[[str], None]) -> None:
    """Collect statistics and write them.

    Args:
        options: what to do.
        printer: where the summary goes.
        warn: called with one line for each thing a person should know but that stops nothing.

    Raises:
        Fp8Error: refused or failed. There is no new file then.
    """
    started = time.monotonic()
    plan, prompts, device = _refuse_early(options)
    transformers = _transformers(options)

    from fp8lib import calibration_report, coverage

    root = plan.checkpoint.root
    config = _load(transformers.AutoConfig, root, "config.json").get_text_config()
    tokenizer = _load(transformers.AutoTokenizer, root, "the tokenizer")
    ids = _tokens(options, prompts, tokenizer, config.vocab_size)
    batches = make_batches(ids, options.batch_size, options.max_prompt_tokens, tokenizer.pad_token_id or 0)
    inputs, generated = _collect(options, plan, config, tokenizer, batches, device)
    tokens = sum(batch.tokens for batch in batches)
    entries, covered = coverage.make_entries(plan, inputs, tokens + generated)
    _warn_unrecorded(plan, entries, warn)
    provenance = _provenance(options, plan, len(prompts), tokens, generated)
    write_statistics(options.output, entries, provenance)
    facts = {
        "Model": f"{printable(root)} ({provenance['model_type']}), {provenance['mode']}",
        "Prompts": f"{len(prompts)} ({provenance['prompts_file']})",
        "Tokens": f"{tokens + generated:,}: {tokens:,} of prompts, {generated:,} generated",
        "Time": f"{time.monotonic() - started:,.0f} s",
        "Written": f"{printable(options.output)} ({size(options.output.stat().st_size)})",
    }
    calibration_report.print_summary(printer, covered, facts)


def _provenance(options: Options, plan: Plan, prompts: int, tokens: int, generated: int) -> dict:
    """Where the statistics come from, for the file itself."""
    import torch
    import transformers

    from fp8lib.coverage import ENOUGH

    return {
        "producer": f"collect_activation_stats {__version__}",
        "model_type": plan.checkpoint.config["model_type"],
        "mode": "one layer at a time" if options.layerwise else "whole model",
        "prompts": prompts,
        "prompts_file": printable(options.prompts_file.name) if options.prompts_file else "built in",
        "prompt_tokens": tokens,
        "generated_tokens": generated,
        "own_statistics_from_tokens": ENOUGH,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


# --- refusals ----------------------------------------------------------------------------------


def _refuse_early(options: Options) -> tuple[Plan, list[Prompt], "torch.device | None"]:
    """Everything that needs no library but torch to be found wrong."""
    _check_output(options.output)
    plan = make_plan(open_checkpoint(options.model_dir))
    prompts = read_prompts(options.prompts_file)
    require_tokenizer(plan.checkpoint.root)
    device = _device(options)
    _check_memory(options, plan.checkpoint, device)
    return plan, prompts, device


def _check_output(path: Path) -> None:
    """Refuse an output file that could not be written at the end of a long run."""
    shown = printable(path)
    if path.suffix not in SUFFIXES:
        raise Fp8Error(f"{shown}: unknown suffix; name the file *.json or *.safetensors")
    if path.is_dir():
        raise Fp8Error(f"{shown}: is a directory; name a file in it")
    if not path.parent.is_dir():
        raise Fp8Error(f"{printable(path.parent)}: no such directory; make it first, or check --output")
    probe = partial_path(path)
    try:
        with refusing_disk_errors(path):
            probe.open("wb").close()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _device(options: Options) -> "torch.device | None":
    """The torch device that --device_map names; None where accelerate is to spread the model."""
    import torch

    name = options.device_map
    if name in _SPREAD:
        if not options.layerwise:
            return None
        if name != "auto":
            raise Fp8Error(f"--device_map {name}: --layerwise runs on one device; use auto, cpu or cuda:N")
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise Fp8Error(f"--device_map {printable(name)}: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise Fp8Error(f"--device_map {name}: there are {count} CUDA devices here; use --device_map cpu")
    return device


def _check_memory(options: Options, checkpoint: Checkpoint, device: "torch.device | None") -> None:
    """Refuse a model, or in layerwise mode a layer, that is larger than the memory there is."""
    from fp8lib import memory

    parts = _bytes_in_bf16(checkpoint)
    there = memory.available(device)
    shown = printable(checkpoint.root)
    if options.layerwise:
        need = max((n for name, n in parts.items() if name.startswith("layers.")), default=0)
        if need > there:
            raise Fp8Error(
                f"{shown}: its largest layer is {size(need)} in BF16, and {size(there)} of memory is free; "
                "use a device with more"
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


def _warn_unrecorded(plan: Plan, entries: dict, warn: Callable[[str], None]) -> None:
    """Say which quantized weights have no entry; more than mtp.* means that something is wrong."""
    left = [m.weight.name for m in plan.matrices if m.weight.name not in entries]
    others = [name for name in left if not name.startswith("mtp.")]
    if len(left) > len(others):
        count = len(left) - len(others)
        warn(f"{count} weights of mtp.* get no statistics: transformers does not load them")
    if others:
        warn(f"{len(others)} weights were never used and get no statistics, such as {printable(others[0])}")


# --- libraries ---------------------------------------------------------------------------------


def _transformers(options: Options):
    """The library: off the network, the model is a local directory, and quiet, unless it is debugged."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not options.debug:
        warnings.simplefilter("ignore")
    import accelerate  # noqa: F401 - device_map needs it, and would say so late
    import transformers

    if not options.debug:
        transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    if options.quiet or not sys.stderr.isatty():
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


def _tokens(options: Options, prompts: list[Prompt], tokenizer, vocabulary: int) -> list[list[int]]:
    ids = tokenize(prompts, tokenizer, options.chat_template, options.max_prompt_tokens)
    largest = max(max(row) for row in ids)
    if largest >= vocabulary:
        raise Fp8Error(
            f"{printable(options.model_dir)}: its tokenizer gives token {largest}, but the model has "
            f"{vocabulary}; copy the tokenizer files of the model it was made from"
        )
    return ids


def _collect(options: Options, plan: Plan, config, tokenizer, batches, device) -> tuple[dict, int]:
    """(statistics by input, generated tokens)."""
    from fp8lib import layerwise, whole_model
    from fp8lib.calibration_report import Progress
    from fp8lib.recording import Recorder

    prompts = sum(len(batch.ids) for batch in batches)
    recorder = Recorder(plan)
    if options.layerwise:
        total = prompts * config.num_hidden_layers
        with Progress(total, "layers", options.quiet) as progress, recorder:
            inputs = layerwise.run(plan.checkpoint, config, batches, device, recorder, progress)
        return inputs, 0
    if not (options.quiet or sys.stderr.isatty()):  # transformers shows a bar on a terminal
        print(f"loading {printable(plan.checkpoint.root)}", file=sys.stderr, flush=True)
    model = whole_model.load(plan.checkpoint.root, options.device_map)
    stop = whole_model.end_tokens(model, tokenizer)
    with Progress(prompts, "prompts", options.quiet) as progress, recorder:
        generated = whole_model.run(model, batches, recorder, progress, options.max_tokens, stop)
        return recorder.take(), generated
