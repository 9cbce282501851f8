"""Prompts through the whole model in memory: prompts, and the text the model generates after them.

transformers loads the model, spreads it over devices and offloads what does not fit on them; the
decoding loop is this module's own. `generate` would do as much arithmetic, but a statistic must know for
every row of every forward pass whether it is a token or padding, which includes the rows of prompts that
are finished while others of their batch go on. A prompt is finished when it says so: the end token, like
any last token, is never fed back, so it is never seen. What is recorded does not depend on which prompts
share a batch, up to the rounding of larger matrix products.

The text-only class is used for vision-language checkpoints too: transformers loads the same decoder
without the vision tower, which text prompts do not reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import transformers

from fp8lib import Fp8Error
from fp8lib.checkpoint.untrusted import printable
from fp8lib.model.progress import Progress
from fp8lib.model.prompts import Batch


class Observer(Protocol):
    """Watches a model run; `calibration.recording.Recorder` is one."""

    def attach(self, model: torch.nn.Module) -> None:
        """Watch all of the model."""

    def look_at(self, mask: torch.Tensor) -> None:
        """Say which tokens of the next forward pass count: bool [prompts, tokens]."""

    def check_finite(self) -> None:
        """Refuse a model that computes NaN or infinity."""


def load(root: Path, device_map: str) -> transformers.PreTrainedModel:
    """The model in BF16, ready to run.

    Args:
        root: a checkpoint directory.
        device_map: for from_pretrained: "auto", "cpu", "cuda:0", ...

    Raises:
        Fp8Error: transformers cannot load it, or tensors are missing (they would be random).
    """
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            root,
            dtype=torch.bfloat16,
            device_map=device_map,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever any of the libraries below may raise
        raise Fp8Error(
            f"{printable(root)}: transformers {transformers.__version__} cannot load it "
            f"({type(error).__name__}: {printable(' '.join(str(error).split()))})"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise Fp8Error(
            f"{printable(root)}: {printable(missing[0])} is missing ({len(missing)} tensors are); "
            "complete the checkpoint"
        )
    return model.eval()


def end_tokens(model: transformers.PreTrainedModel, tokenizer) -> list[int]:
    """Ids that end the model's turn."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def run(
    model: transformers.PreTrainedModel,
    batches: Sequence[Batch],
    observer: Observer,
    progress: Progress,
    max_tokens: int,
    stop: Sequence[int],
) -> int:
    """Pass every batch through the model and let it go on, greedily.

    Args:
        model: from `load`.
        batches: prompts.
        observer: sees every token once.
        progress: told about each batch.
        max_tokens: new tokens per prompt at most; 0 for the prompts alone.
        stop: ids that end a prompt.

    Returns:
        Generated tokens that were seen.

    Raises:
        Fp8Error: NaN or infinite activations, or not enough memory.
    """
    observer.attach(model)
    total = 0
    for batch in batches:
        try:
            generated = _run_batch(model, batch, observer, max_tokens, stop)
        except torch.OutOfMemoryError:
            raise Fp8Error(
                f"out of device memory with {len(batch.ids)} prompts of {batch.ids.shape[1]} tokens; give a "
                "smaller --batch_size or --max_prompt_tokens, or --layerwise"
            ) from None
        observer.check_finite()
        progress.advance(len(batch.ids), batch.tokens + generated)
        total += generated
    return total


@torch.no_grad()
def _run_batch(
    model: transformers.PreTrainedModel,
    batch: Batch,
    observer: Observer,
    max_tokens: int,
    stop: Sequence[int],
) -> int:
    device = _input_device(model)
    inputs = batch.to_model(device)
    decodes = max_tokens > 1  # the last token is never fed back
    observer.look_at(batch.mask)
    output = model(batch.ids.to(device), **inputs, use_cache=decodes, logits_to_keep=1)
    running = torch.ones(len(batch.ids), dtype=torch.bool)
    stop = torch.tensor(stop, dtype=torch.long)
    generated = 0
    for _ in range(max_tokens - 1):
        chosen = output.logits[:, -1].argmax(-1).cpu()  # the one wait for the device in a step
        running &= ~torch.isin(chosen, stop)
        if not running.any():
            break
        if inputs["attention_mask"] is not None:
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
        observer.look_at(running[:, None])
        output = model(
            chosen[:, None].to(device),
            **inputs,
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        generated += int(running.sum())
    return generated


def _input_device(model: transformers.PreTrainedModel) -> torch.device:
    """Where token ids go: beside the embedding, or where accelerate brings an offloaded one."""
    device = model.get_input_embeddings().weight.device
    if device.type != "meta":
        return device
    return torch.device(getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu")
