"""`--compare_outputs`: what the FP8 directory makes of the original's predictions.

Everything that can be refused is refused before quantizing begins; what is compared is the directory that
is there at the end. The only file that is written is the one of --logits_out, at the very end.
"""

import json
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lib import Fp8Error
from fp8lib.checkpoint.consistency import check_config
from fp8lib.checkpoint.directory import CONFIG, Checkpoint, open_checkpoint, require_supported
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job.forward_passes import (
    check_agreement,
    load,
    load_config,
    load_transformers,
    share_of,
    tokens_of,
)
from fp8lib.job.ranks import Ranks
from fp8lib.model.prompts import Batch, make_batches, read_prompts, require_tokenizer
from fp8lib.streaming.writer import refuse_unwritable, write_file
from fp8lib.terminal import Talk, size
from fp8lib.verification.health import Zone

if TYPE_CHECKING:
    import torch

    from fp8lib.outputs.comparison import Record
    from fp8lib.outputs.figures import Comparison

LOGITS_SUFFIX = ".safetensors"
WORSE_PERPLEXITY = 1.10
"""Ratio of perplexities above which a healthy directory gets WARN."""

_SAME_MODEL = (
    "vocab_size", "hidden_size", "num_hidden_layers", "layer_types", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "moe_intermediate_size",
    "shared_expert_intermediate_size", "num_experts", "num_experts_per_tok", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
    "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias",
)  # fmt: skip
"""What config.json must say alike in two directories of one model: all that the layers compute by."""
_SERVED = {
    "written": "as in the files",
    "ue8m0": "power-of-two scales, requantized while loading",
    "vllm-hopper": "Linears with power-of-two scales, experts as in the files",
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known before anything is quantized.

    Attributes:
        original: the reference.
        config: transformers' config of its text model.
        tokens: ids of every prompt.
        topics: of every prompt.
        pad: id to pad with.
        device: where to compute.
    """

    original: Checkpoint
    config: object
    tokens: list[list[int]]
    topics: list[str | None]
    pad: int
    device: "torch.device"


def prepare(flags: Namespace, ranks: Ranks) -> Inputs:
    """Refuse what can be refused before quantizing, and tokenize the prompts.

    Raises:
        Fp8Error: no tokenizer, prompts that cannot be read, directories of other models, too little memory.
    """
    from fp8lib.streaming.devices import choose_device, make_current

    original = open_checkpoint(flags.input_dir)
    require_supported(original.config, original.root)
    check_config(original)
    _check_logits_out(flags)
    prompts = read_prompts(flags.prompts_file)
    require_tokenizer(original.root)
    finished = [flags.output_dir] if flags.verify_only else []
    others = [open_checkpoint(root) for root in (*finished, *filter(None, [flags.against]))]
    for other in others:
        check_config(other)
        require_tokenizer(other.root)
    device = choose_device(flags.device, ranks.local_rank)
    make_current(device)
    transformers = load_transformers(flags, ranks)
    config = load_config(original.root)
    tokenizer = load(transformers.AutoTokenizer, original.root, "the tokenizer")
    tokens = tokens_of(flags, original.root, prompts, tokenizer, config.vocab_size)
    if all(len(row) < 2 for row in tokens):
        raise Fp8Error(f"{prompts[0].where}: no prompt has a second token to predict; give longer prompts")
    for other in others:
        _check_same_model(original, config, other, load(transformers.AutoConfig, other.root, CONFIG))
        theirs = load(transformers.AutoTokenizer, other.root, "the tokenizer")
        if tokens_of(flags, other.root, prompts, theirs, config.vocab_size) != tokens:
            raise Fp8Error(
                f"{printable(other.root)}: its tokenizer makes other tokens of the prompts than that of "
                f"{printable(original.root)}; copy the tokenizer files of the original"
            )
    models = 2 + (flags.against is not None)
    _check_memory(original, config, models * sum(map(len, tokens)), device, ranks)
    topics = [prompt.topic for prompt in prompts]
    return Inputs(original, config, tokens, topics, tokenizer.pad_token_id or 0, device)


def compare(
    flags: Namespace, talk: Talk, ranks: Ranks, verdict: Zone, inputs: Inputs | None
) -> tuple[Zone, "Comparison | None"]:
    """Compare `flags.output_dir`, and `flags.against`, with the original, and print what was found.

    Args:
        flags: of quantize_fp8.py.
        talk: how to speak to the user.
        ranks: all ranks come here.
        verdict: of the weights.
        inputs: what `prepare` returned, on rank 0.

    Returns:
        (the verdict with that of the outputs, the comparison on rank 0).

    Raises:
        Fp8Error: refused or failed, on every rank.
    """
    if ranks.is_main:
        complete = os.path.lexists(flags.output_dir / CONFIG)
        ranks.publish("compare", complete)
    else:
        complete = ranks.wait_for("compare")
    if not complete:
        talk.warn(f"outputs are not compared: {printable(flags.output_dir)} has no {CONFIG}")
        return verdict, None
    inputs = inputs or prepare(flags, ranks)
    directories = [flags.output_dir, *filter(None, [flags.against])]
    candidates = [open_checkpoint(root) for root in directories]
    chosen = [flags.batch_size, flags.activations, flags.served]
    check_agreement([inputs.original, *candidates], inputs.tokens, chosen, ranks)
    record = _run(flags, inputs, candidates, ranks)
    if not ranks.is_main:
        return Zone(ranks.wait_for("verdict of outputs")), None

    from fp8lib.outputs.comparison import evaluate
    from fp8lib.outputs.report import print_comparison

    found = evaluate(record, inputs.original, candidates, inputs.topics, _settings(flags, inputs))
    mine, reason = judge(found)
    if flags.logits_out is not None:
        _write_logits(flags, record)
    text = _not_run(inputs.original) + reason
    print_comparison(talk.printer, found, text)
    if mine > verdict:
        talk.printer.line(f"  VERDICT: {talk.printer.mark(mine, mine.name)}")
    verdict = max(verdict, mine)
    ranks.publish("verdict of outputs", int(verdict))
    return verdict, found


def judge(found: "Comparison") -> tuple[Zone, str]:
    """What the outputs of the first directory mean for the verdict, and why."""
    first = found.candidates[0]
    if first.not_finite:
        return Zone.FAIL, f"NaN or infinity behind {first.not_finite}: do not deploy this directory."
    ratio = first.overall.ppl_ratio.value
    if not ratio <= WORSE_PERPLEXITY:
        limit = f"{100 * (WORSE_PERPLEXITY - 1):.0f} %"
        return Zone.WARN, f"Perplexity is {100 * (ratio - 1):.1f} % worse than the original's, over {limit}."
    return Zone.GOOD, "Outputs do not change the verdict: perplexity is not more than 10 % worse."


def _run(flags: Namespace, inputs: Inputs, candidates: Sequence[Checkpoint], ranks: Ranks) -> "Record":
    """This rank's share of the prompts; on rank 0 all of them."""
    from fp8lib.model.progress import Progress
    from fp8lib.outputs import comparison
    from fp8lib.outputs.layers import SERVINGS

    serving = replace(SERVINGS[flags.served], quantizes_activations=flags.activations == "fp8")
    batches = make_batches(inputs.tokens, flags.batch_size, flags.max_prompt_tokens, inputs.pad)
    shares = share_of(_with_positions(batches), ranks, inputs.device)
    steps = inputs.config.num_hidden_layers + 1
    prompts = sum(len(batch.ids) for share in shares for batch in share)
    ranks.count_anew("prompts compared")
    record = None
    total, quiet = prompts * steps * (1 + len(candidates)), flags.quiet or not ranks.is_main
    with Progress(total, "layers", quiet, ranks, "prompts x layers") as progress:
        if share := shares[ranks.rank]:
            record = comparison.run(
                inputs.original, candidates, serving, inputs.config, share, inputs.device, progress
            )
        if not ranks.is_main:
            if record is not None:
                ranks.send(f"outputs of rank {ranks.rank}", record.pack())
            return record
        records = [record]
        for rank in range(1, ranks.world):
            if shares[rank]:
                received = ranks.receive(f"outputs of rank {rank}")
                records.append(comparison.Record.unpack(received))
        progress.show()
    return comparison.merged(records)


def _with_positions(batches: Sequence[Batch]) -> list[Batch]:
    """Batches in which something can be scored."""
    return [batch for batch in batches if batch.ids.shape[1] > 1]


def _settings(flags: Namespace, inputs: Inputs) -> dict[str, str]:
    """How engines were emulated, for a person."""
    import torch
    import transformers

    kind = "power-of-two scales" if flags.served != "written" else "float32 scales"
    activations = f"FP8 per token and 128 channels, {kind}" if flags.activations == "fp8" else "not quantized"
    return {
        "FP8 weights": _SERVED[flags.served],
        "Activations": activations,
        "Computed": f"in float32 on {inputs.device}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }


def _not_run(original: Checkpoint) -> str:
    names = [tensor.name for shard in original.shards for tensor in shard.tensors]
    parts = {"MTP": lambda name: name.startswith("mtp."), "the vision tower": lambda name: ".visual." in name}
    there: dict[str, Callable] = {what: has for what, has in parts.items() if any(map(has, names))}
    return f"Not run: {' and '.join(there)}. " if there else ""


# --- refusals ----------------------------------------------------------------------------------


def _check_same_model(original: Checkpoint, config: object, other: Checkpoint, theirs: object) -> None:
    """Refuse a directory of another model: one whose layers compute something else."""
    mine, theirs = config.to_dict(), theirs.get_text_config().to_dict()
    for key in _SAME_MODEL:
        if mine.get(key) != theirs.get(key):
            raise Fp8Error(
                f"{printable(other.root / CONFIG)}: {key} is {printable(theirs.get(key))}, but "
                f"{printable(mine.get(key))} in {printable(original.root)}; give directories of one model"
            )


def _check_memory(
    original: Checkpoint, config: object, tokens: int, device: "torch.device", ranks: Ranks
) -> None:
    """Refuse what does not fit: the largest layer on the device, hidden states of all models on the host."""
    from fp8lib.model import memory
    from fp8lib.outputs.layers import bytes_of_layers

    need, there = max(bytes_of_layers(original).values(), default=0), memory.available(device)
    if device.type == "cpu":
        need *= ranks.local_world
    if need > there:
        raise Fp8Error(
            f"{printable(original.root)}: its largest layer takes {size(need)} to compare outputs, and "
            f"{size(there)} of memory is free; use a device with more, or fewer ranks"
        )
    need, there = tokens * config.hidden_size * 4, memory.available(None)
    if need > there:
        raise Fp8Error(
            f"{printable(original.root)}: hidden states of the prompts take {size(need)}, and {size(there)} "
            "of memory is free; give fewer prompts or a smaller --max_prompt_tokens"
        )


# --- the file of --logits_out ------------------------------------------------------------------


def _check_logits_out(flags: Namespace) -> None:
    """Refuse a file that could not be written at the end, or that an engine would take for weights."""
    path: Path | None = flags.logits_out
    if path is None:
        return
    shown = printable(path)
    if path.suffix != LOGITS_SUFFIX:
        raise Fp8Error(f"{shown}: unknown suffix; name the file *{LOGITS_SUFFIX}")
    if not path.parent.is_dir():
        raise Fp8Error(f"{printable(path.parent)}: no such directory; make it first, or check --logits_out")
    for folder in filter(None, (flags.input_dir, flags.output_dir, flags.against)):
        if path.resolve().is_relative_to(folder.resolve()):
            raise Fp8Error(f"{shown}: engines would take it for weights there; put it outside of the model")
    if os.path.lexists(path) and not _is_logits(path):
        raise Fp8Error(f"{shown}: exists and holds something else; choose another name, or remove it")
    refuse_unwritable(path)


def _is_logits(path: Path) -> bool:
    """Whether an earlier run of this tool wrote a file."""
    from fp8lib.checkpoint.headers import read_shard

    with suppress(Fp8Error):
        return {"prompt", "position", "token", "kl1"} <= {t.name for t in read_shard(path).tensors}
    return False


def _write_logits(flags: Namespace, record: "Record") -> None:
    from safetensors.numpy import save

    directories = [str(d) for d in (flags.input_dir, flags.output_dir, flags.against) if d is not None]
    # One entry: safetensors writes several in any order, and the same comparison is to give the same bytes.
    write_file(flags.logits_out, save(record.results, {"models": json.dumps(directories)}))
