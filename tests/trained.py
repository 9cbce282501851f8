"""A tiny model that learned something: what outputs and their changes can be judged on.

A random model is nearly certain of nothing and its logits are noise; how much quantization changes them
says little. This one is a real Qwen3.5 of `tiny_checkpoints`, trained for some seconds on the reference
texts that come with Python (`pydoc_data.topics`), byte by byte, with fixed seeds.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics

import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_checkpoints

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 1,
    "head_dim": 128,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
STEPS, BATCH, LENGTH, RATE = 50, 8, 64, 8e-3  # 64 is the chunk of the gated delta rule
TEXT, HELD_OUT = 120_000, 20_000
"""Bytes of the text, and those at its end that training never sees."""


def text() -> str:
    """The reference texts, the same with every Python as far as they go."""
    return "\n".join(value for _, value in sorted(topics.topics.items()))[:TEXT]


def held_out_prompts(count: int, length: int, seed: int = 0) -> list[str]:
    """Pieces of the text that no training saw."""
    rest, generator = text()[-HELD_OUT:], random.Random(seed)
    starts = [generator.randrange(len(rest) - length) for _ in range(count)]
    return [rest[start : start + length] for start in starts]


def train(folder: Path, kind: str = "text", seed: int = 0) -> Path:
    """Write a trained checkpoint with a byte-level tokenizer; returns its directory.

    Args:
        folder: where; made if missing.
        kind: "text" or "moe", a text-only dense model or one with eight experts.
        seed: of the weights training starts from and of the order of the text.
    """
    name = {"text": "text", "moe": "moe_text"}[kind]
    tiny_checkpoints.build(folder, name, mtp=False, tokenizer=True, seed=seed, **SIZES)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokenizer(text()[:-HELD_OUT], verbose=False)["input_ids"])

    def draw(generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1), generator=generator)
        return tokens[starts + torch.arange(LENGTH)]

    model.train()
    for _ in learning(model, draw, STEPS, RATE, seed):
        pass
    store(model, folder)
    return folder


def learning(
    model: transformers.PreTrainedModel,
    draw: Callable[[torch.Generator], torch.Tensor],
    steps: int,
    rate: float,
    seed: int,
) -> Iterator[torch.Tensor]:
    """Train a model on batches of tokens that `draw` gives; yields the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        batch = draw(generator)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss


def store(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Put the weights where `build` put the first ones, in BF16."""
    file = folder / "model.safetensors"
    names = load_file(file).keys()
    state = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    assert state.keys() == set(names), "build and transformers name the tensors alike"
    file.unlink()
    save_file(state, file, metadata={"format": "pt"})
