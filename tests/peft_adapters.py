"""Real PEFT adapters on tiny checkpoints, and what PEFT itself makes of them.

Every factor is random, as after training: PEFT starts B at zero, which would merge to nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def load(checkpoint: Path, auto: str | None = None) -> torch.nn.Module:
    """A checkpoint's model in its own dtype; `auto` for another class than its own."""
    name = transformers.AutoConfig.from_pretrained(checkpoint).architectures[0]
    loader = getattr(transformers, auto or name)
    return loader.from_pretrained(checkpoint, dtype="auto")


@torch.no_grad()
def make(
    checkpoint: Path | torch.nn.Module,
    folder: Path,
    *,
    auto: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Let PEFT write an adapter of random values.

    Args:
        checkpoint: of the base model, or a module.
        folder: where to.
        auto: class to load the base as, if not its own.
        dtype: of the adapter's tensors.
        seed: of its values.
        settings: of `peft.LoraConfig`.
    """
    base = load(checkpoint, auto) if isinstance(checkpoint, Path) else checkpoint
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, peft.LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                parameter.data = (0.05 * torch.randn(parameter.shape)).to(dtype)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def merge(
    checkpoint: Path, adapters: Sequence[Path], folder: Path, *, auto: str | None = None, fused: bool = True
) -> Path:
    """What `merge_and_unload` makes of a checkpoint and adapters, one after the other."""
    model = load(checkpoint, auto)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder, save_original_format=not fused)
    return folder
