"""Which flags must be the same: on all ranks of a job, and in a run that continues another.

Every flag of the parser is in one of the tables here, so a new one has to say where it belongs.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import quantize_fp8
from fp8lib import Fp8Error
from fp8lib.calibration.second_moments_file import pack
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.job import output_dir, quantizing
from fp8lib.job.forward_passes import check_agreement
from fp8lib.job.ranks import Ranks
from fp8lib.terminal import Printer, Talk

NAME = "model.layers.0.mlp.down_proj.weight"
OTHER = "model.layers.1.mlp.down_proj.weight"
SECOND_ORDER = ("--rounding", "second_order", "--second_moments", "{moments}")
BYTES = {
    "calib_mode": ((), ("--calib_mode", "max")),
    "rms_factor": ((), ("--rms_factor", "3.0000001")),
    "rms_saturate": ((), ("--rms_saturate",)),
    "calib_percentile": (("--calib_mode", "percentile"), ("--calib_percentile", "99.90000001")),
    "mse_grid_size": (("--calib_mode", "mse", "--scale_format", "bf16"), ("--mse_grid_size", "127")),
    "scale_format": ((), ("--scale_format", "bf16")),
    "eligibility": ((), ("--eligibility", "official")),
    "keep_bf16": ((), ("--keep_bf16", "model.layers.1.*")),
    "keep_failing": ((), ("--keep_failing",)),
    "band of a trial": (("--keep_failing",), ("--band", "mae=0.1,0.2")),
    "quantize": (("--keep_bf16", "model.layers.1.*"), ("--quantize", "model.layers.0.*")),
    "rounding": ((), SECOND_ORDER),
    "second_moments": (SECOND_ORDER, ("--second_moments", "{other moments}")),
    "damping": (SECOND_ORDER, ("--damping", "0.02")),
    "activation_stats": (("--activation_stats", "{stats}"), ("--activation_stats", "{other stats}")),
    "kept_dtype": ((), ("--kept_dtype", "bfloat16")),
    "input_dir": ((), ("--input_dir", "{other input}")),
    "lora_dir": (("--lora_dir", "{adapter}"), ("--lora_dir", "{other adapter}")),
}
"""Flags that decide the bytes of weights: (flags of the one run, what the other has in addition)."""
RESULTS = {
    "verify_samples": ((), ("--verify_samples", "4")),
    "verify_samples of all": ((), ("--verify_samples", "all")),
    "skip_verify": ((), ("--skip_verify",)),
    "seed": ((), ("--seed", "1")),
    "checksums": ((), ("--checksums",)),
}
"""Flags that decide what the manifest holds beside, which a rank reports and a later run can redo."""
OF_A_PROCESS = {"device", "workers", "debug", "quiet", "help", "version"}
OF_RANK_0 = {"overwrite", "output_dir", "report", "band", "strict"}
"""Only rank 0 looks into the output directory, judges and reports; the lock tells that it is the same one."""
OTHER_WORK = {"dry_run", "verify_only"}
COMPARING = {
    "compare_outputs", "against", "activations", "served", "logits_out",
    "prompts_file", "no_chat_template", "max_prompt_tokens", "batch_size",
}  # fmt: skip
"""Flags of what comes after the verdict; ranks compare them there (`forward_passes.check_agreement`)."""
BACK = {"dequantize", "expert_layout"}
"""Flags for another kind of input (test_dequantize.py)."""


def test_every_flag_is_in_one_of_the_tables() -> None:
    known = {name.split(" of ")[0] for name in (*BYTES, *RESULTS)}
    known |= OF_A_PROCESS | OF_RANK_0 | OTHER_WORK | COMPARING | BACK
    assert {action.dest for action in quantize_fp8.make_parser()._actions} == known


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two inputs that differ in a header, statistics, second moments and adapters that differ in a number."""
    folder = tmp_path_factory.mktemp("agreement")
    found = {}
    for name, rows in (("input", 128), ("other input", 256)):
        found[name] = folder / name.replace(" ", "-")
        found[name].mkdir()
        weight = torch.full((rows, 128), 2.0**-8).bfloat16()
        save_file({NAME: weight, OTHER: weight.clone()}, found[name] / "model.safetensors")
        (found[name] / "config.json").write_text('{"model_type": "qwen3_5"}')
    for name, value in (("stats", 1.0), ("other stats", 2.0)):
        found[name] = folder / f"{name.replace(' ', '-')}.json"
        found[name].write_text(json.dumps({NAME: {"input_channel_mean_square": [value] * 128}}))
    for name, value in (("adapter", 2.0**-8), ("other adapter", 2.0**-7)):
        found[name] = folder / name.replace(" ", "-")
        found[name].mkdir()
        module = f"base_model.model.{NAME.removesuffix('.weight')}"
        low, high = torch.full((4, 128), value), torch.full((128, 4), 1.0)
        state = {f"{module}.lora_A.weight": low, f"{module}.lora_B.weight": high}
        save_file(state, found[name] / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["down_proj"]}
        (found[name] / "adapter_config.json").write_text(json.dumps(settings))
    for name, value in (("moments", 1.0), ("other moments", 2.0)):
        found[name] = folder / f"{name.replace(' ', '-')}.safetensors"
        packed, tokens = torch.from_numpy(pack(np.eye(128, dtype=np.float32) * value)), torch.tensor([256])
        module = NAME.removesuffix(".weight")
        save_file({f"{module}.second_moments": packed, f"{module}.tokens": tokens}, found[name])
    return found


@pytest.fixture
def arguments(places: dict[str, Path], tmp_path: Path) -> Callable[..., list[str]]:
    def make(*flags: str) -> list[str]:
        given = ["--input_dir", "{input}", *flags, "--output_dir", str(tmp_path / "out")]
        return [str(places[a[1:-1]]) if a.startswith("{") else a for a in given]

    return make


# --- ranks -------------------------------------------------------------------------------------


class First(Ranks):
    """Rank 0, whose words are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.published: dict[str, object] = {}

    def publish(self, key: str, value: object) -> None:
        self.published[key] = json.loads(json.dumps(value))


class Second(Ranks):
    """Rank 1, which hears what rank 0 said."""

    def __init__(self, first: First) -> None:
        super().__init__()
        self.rank, self.world, self.attempt = 1, 2, first.attempt
        said = self.wait_for = first.published.__getitem__
        self.wait_for_first = lambda *keys: next((k, said(k)) for k in keys if k in first.published)


def act(ranks: Ranks, arguments: list[str]) -> None:
    flags = quantize_fp8.parse([*arguments, "--quiet"])
    quantizing.quantize(flags, Talk(Printer(io.StringIO()), lambda text: None), ranks)


@pytest.mark.parametrize("flag", [*BYTES, *RESULTS])
def test_a_rank_with_another_flag_refuses(
    flag: str, arguments: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_dir, "_LATE", 0.0)
    common, other = (BYTES | RESULTS)[flag]
    first = First()
    act(first, arguments(*common))
    with pytest.raises(Fp8Error, match=r"rank 1 has other .* than rank 0"):
        act(Second(first), arguments(*common, *other))
    # The other way round too: what only rank 0 has.
    (output_dir_of(arguments) / "config.json").unlink()
    first = First()
    act(first, [*arguments(*common, *other), "--overwrite"])
    with pytest.raises(Fp8Error, match=r"rank 1 has other .* than rank 0"):
        act(Second(first), arguments(*common))


@pytest.mark.parametrize("other", [("--workers", "3"), ("--device", "cpu"), ("--overwrite",), ("--debug",)])
def test_a_rank_may_have_another_flag_of_its_own(
    other: tuple, arguments: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_dir, "_LATE", 0.0)
    first = First()
    act(first, arguments())
    # It has agreed, and looks for the lock, which is gone as rank 0 has finished already.
    with pytest.raises(Fp8Error, match="not the directory that rank 0 writes to"):
        act(Second(first), arguments(*other))


def output_dir_of(arguments: Callable) -> Path:
    return Path(arguments()[-1])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"ids": [[1, 2], [3, 5]]}, "prompts"),
        ({"ids": [[1, 2, 3, 4]]}, "prompts"),
        ({"ids": [[3, 4], [1, 2]]}, "prompts"),
        ({"batch_size": 4}, "flags"),
        ({"input": "other input"}, "model"),
    ],
    ids=str,
)
def test_a_rank_that_would_run_something_else_refuses(
    changes: dict, word: str, places: dict[str, Path]
) -> None:
    def check(
        ranks: Ranks, ids: object = ((1, 2), (3, 4)), batch_size: int = 8, input: str = "input"
    ) -> None:
        checkpoint = open_checkpoint(places[input])
        check_agreement([checkpoint], [list(row) for row in ids], [batch_size], ranks)

    first = First()
    check(first)
    check(Second(first))
    with pytest.raises(Fp8Error, match=f"rank 1 has another {word} than rank 0"):
        check(Second(first), **changes)


# --- a run that continues another -----------------------------------------------------------------


@pytest.mark.parametrize("flag", BYTES)
def test_a_run_with_other_bytes_does_not_continue(flag: str, arguments: Callable, cli: Callable) -> None:
    common, other = BYTES[flag]
    assert cli(*arguments(*common)).rc != 2
    result = cli(*arguments(*common, *other))
    assert result.rc == 2
    assert "holds an earlier run" in result.err
    assert cli(*arguments(*common)).rc != 2  # the first one does


@pytest.mark.parametrize("flag", ["verify_samples of all", "seed", "skip_verify", "checksums"])
def test_other_results_are_made_as_if_from_the_beginning(
    flag: str, arguments: Callable, cli: Callable
) -> None:
    folder = output_dir_of(arguments)
    common, other = RESULTS[flag]
    assert cli(*arguments(*common)).rc == 0
    assert cli(*arguments(*common, *other)).rc == 0
    continued = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert cli(*arguments(*common, *other), "--overwrite").rc == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == continued
