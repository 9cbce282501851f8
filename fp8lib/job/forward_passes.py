"""What a run that passes prompts through a model needs first: transformers, the tokenizer, tokens, memory.

Collecting statistics and comparing outputs share it. Everything that flags, headers and the prompts file can
refuse is refused before transformers is imported.
"""

import hashlib
import math
import os
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import CONFIG, Checkpoint
from fp8lib.checkpoint.rules import without_prefix
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job.ranks import Ranks
from fp8lib.model.prompts import Batch, Prompt, divide, tokenize

if TYPE_CHECKING:
    import torch


def load_transformers(flags: Namespace, ranks: Ranks):
    """The library: off the network, the model is a local directory, and quiet, unless it is debugged."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not flags.debug:
        warnings.simplefilter("ignore")
    import transformers

    if not flags.debug:
        transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    if flags.quiet or not ranks.is_main or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers


def load(kind, root: Path, what: str):
    """A config or tokenizer from the directory, without running any code that lies in it.

    Raises:
        Fp8Error: transformers cannot read it.
    """
    try:
        return kind.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever any of the libraries below may raise
        raise Fp8Error(
            f"{printable(root)}: transformers cannot read {what} "
            f"({type(error).__name__}: {printable(' '.join(str(error).split()))})"
        ) from error


def load_config(root: Path):
    """transformers' config of the directory's text model; nothing in it is missing here.

    Raises:
        Fp8Error: transformers cannot read it, or would not build a model by it.
    """
    from transformers import AutoConfig

    from fp8lib.model.internals import require_buildable

    config = load(AutoConfig, root, CONFIG).get_text_config()
    require_buildable(config, printable(root / CONFIG))
    return config


def tokens_of(
    flags: Namespace, root: Path, prompts: list[Prompt], tokenizer, vocabulary: int
) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        Fp8Error: the model does not have them all, or the chat template refuses a prompt.
    """
    ids = tokenize(prompts, tokenizer, not flags.no_chat_template, flags.max_prompt_tokens)
    largest = max(max(row) for row in ids)
    if largest >= vocabulary:
        raise Fp8Error(
            f"{printable(root)}: its tokenizer gives token {largest}, but the model has "
            f"{vocabulary}; copy the tokenizer files of the model it was made from"
        )
    return ids


def check_agreement(
    checkpoints: Sequence[Checkpoint], ids: list[list[int]], chosen: list, ranks: Ranks
) -> None:
    """Refuse, on a rank other than 0, other models or other prompts: every machine has its own disk.

    Args:
        checkpoints: that this rank reads.
        ids: token ids of the prompts.
        chosen: values of flags that must be the same, such as the size of batches.
        ranks: all of them.

    Raises:
        Fp8Error: they differ.
    """
    models = [[[s.name, s.size, s.header_sha256] for s in c.shards] for c in checkpoints]
    mine = {
        "flags": chosen,
        "model": models,
        "prompts": hashlib.sha256(repr(ids).encode()).hexdigest(),
    }
    if ranks.is_main:
        ranks.publish("terms", mine)
        return
    theirs = ranks.wait_for("terms")
    for key in mine:
        if mine[key] != theirs[key]:
            raise Fp8Error(
                f"{printable(checkpoints[0].root)}: rank {ranks.rank} has another {key} than rank 0; "
                "give all machines the same files and flags"
            )


def share_of(batches: Sequence[Batch], ranks: Ranks, device: "torch.device") -> list[list[Batch]]:
    """The batches of every rank; this one takes the cores it has for them."""
    import torch

    from fp8lib.streaming.devices import cores_of_rank

    if ranks.world > 1 and device.type == "cpu":  # torchrun leaves every rank one thread
        torch.set_num_threads(cores_of_rank(ranks.local_world))
    return divide(batches, ranks.world)


def weights_by_part(checkpoint: Checkpoint) -> dict[str, int]:
    """Number of weights of the text model, by layer and by tensor that is in none."""
    parts: Counter[str] = Counter()
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            name = without_prefix(tensor.name)
            if not name.startswith("mtp.") and ".visual." not in f".{name}":
                part = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
                parts[part] += math.prod(tensor.shape)
    return parts
