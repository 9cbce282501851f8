"""Merging adapters into rows gives PEFT's own bits, however the rows are cut."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import peft_adapters
from fp8lib.numerics.lora import merge_embedding_rows, merge_rows, unstack_experts

# Rows that end in a block of one row or of two, a single row, fewer than 128; columns that are no multiple of
# what vector units take; ranks from 1 to more than a BLAS adds up in one go.
SHAPES = {"a": (257, 300), "b": (130, 256), "c": (8, 256), "d": (512, 1024), "e": (1, 256), "f": (1024, 96)}
RANKS = {"a": 64, "b": 1, "c": 16, "d": 8, "e": 8, "f": 500}
SCALING = {key: 3 / rank for key, rank in RANKS.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """As the pipeline's workers compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cut(rows: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_linear_layers_of_any_shape_get_pefts_bits(dtype: torch.dtype, folder: Path) -> None:
    def base() -> torch.nn.Module:
        torch.manual_seed(1)
        layers = {key: torch.nn.Linear(c, r, bias=False, dtype=dtype) for key, (r, c) in SHAPES.items()}
        return torch.nn.ModuleDict(layers)

    adapter = peft_adapters.make(
        base(), folder / str(dtype), target_modules=list(SHAPES), rank_pattern=RANKS, lora_alpha=3
    )
    merged = peft.PeftModel.from_pretrained(base(), adapter).merge_and_unload()
    factors = load_file(adapter / "adapter_model.safetensors")
    for key, (rows, _) in SHAPES.items():
        a, b = (factors[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
        for step in (128, 256, rows + 127 - (rows - 1) % 128):
            weight = base()[key].weight.detach().clone()
            with one_thread():
                for part in cut(rows, step):
                    merge_rows(weight[part], part.start, a, b, SCALING[key], rounded=False)
            assert torch.equal(weight, merged[key].weight), (key, step)
            assert not torch.equal(weight, base()[key].weight)


class Experts(torch.nn.Module):
    """Three experts, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.down_proj = torch.nn.Parameter(torch.randn(3, 257, 192).bfloat16())


def test_a_stack_of_experts_gets_pefts_bits_expert_by_expert(folder: Path) -> None:
    def base() -> torch.nn.Module:
        return torch.nn.ModuleDict({"experts": Experts()})

    settings = {"target_parameters": ["experts.down_proj"], "target_modules": [], "r": 6, "lora_alpha": 4}
    adapter = peft_adapters.make(base(), folder / "experts", **settings)
    merged = peft.PeftModel.from_pretrained(base(), adapter).merge_and_unload()["experts"].down_proj
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.experts.lora_{side}.weight"] for side in "AB")
    a, b = unstack_experts(a, b, 3)
    weight = base()["experts"].down_proj.detach().clone()
    with one_thread():
        for expert in range(3):
            for part in cut(257, 128):
                rows = weight[expert, part]
                merge_rows(rows, part.start, a[expert], b[expert], 4 / 6, rounded=True)
    assert torch.equal(weight, merged)


def test_an_embedding_gets_pefts_bits(folder: Path) -> None:
    def base() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.ModuleDict({"embed": torch.nn.Embedding(385, 96, dtype=torch.bfloat16)})

    adapter = peft_adapters.make(base(), folder / "embedding", target_modules=["embed"], r=8, lora_alpha=5)
    merged = peft.PeftModel.from_pretrained(base(), adapter).merge_and_unload()["embed"].weight
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.embed.lora_embedding_{side}"] for side in "AB")
    weight = base()["embed"].weight.detach().clone()
    with one_thread():
        for part in cut(385, 128):
            merge_embedding_rows(weight[part], part.start, a, b, 5 / 8)
    assert torch.equal(weight, merged)
