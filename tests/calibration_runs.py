"""What the tests of calibration share: prompts, and a run over a checkpoint without the command line."""

from pathlib import Path

import torch
import transformers

from fp8lib.calibration import coverage
from fp8lib.calibration.input_statistics import InputStatistics
from fp8lib.calibration.recording import Recorder
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import Plan, make_plan
from fp8lib.checkpoint.rules import Selection
from fp8lib.model import whole_model
from fp8lib.model.prompts import make_batches

KINDS = [
    ("moe", "fused", "model.language_model."),
    ("moe", "per_expert", "model.language_model."),
    ("moe_text", "fused", "model."),
    ("dense", "fused", "model.language_model."),
    ("text", "fused", "model."),
]
PAD = 0  # a byte that no prompt here contains
NO_LIMIT = 10_000  # tokens in a batch


class NoProgress:
    """Stands for a progress bar."""

    def advance(self, prompts: int, tokens: int) -> None:
        pass

    def label(self, text: str) -> None:
        pass


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 256, (n,), generator=generator).tolist() for n in lengths]


def plan_of(path: Path) -> Plan:
    """What the collector records: the official set."""
    return make_plan(open_checkpoint(path), Selection("official"))


def collect(
    path: Path,
    prompts: list[list[int]],
    *,
    batch_size: int = 1,
    max_tokens: int = 0,
    stop: tuple[int, ...] = (),
    model: transformers.PreTrainedModel | None = None,
) -> tuple[dict[str, InputStatistics], int]:
    """(statistics by input, generated tokens) of a run over a checkpoint."""
    model = model or whole_model.load(path, "cpu")
    batches = make_batches(prompts, batch_size, NO_LIMIT, PAD)
    with Recorder(plan_of(path)) as recorder:
        generated = whole_model.run(model, batches, recorder, NoProgress(), max_tokens, stop)
        return recorder.take(), generated


def entries_of(path: Path, inputs: dict[str, InputStatistics]) -> dict:
    return dict(coverage.Entries(plan_of(path)).make(inputs))
