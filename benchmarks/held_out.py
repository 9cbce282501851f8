#!/usr/bin/env python3
"""What rounding costs and second-order rounding gains, on text that neither training nor calibration saw.

Trains a small real Qwen3.5 (transformers' class, bytes as tokens) on the reference texts and sources that
come with Python, with a fixed seed; collects second moments on other pieces of them; quantizes with each
rounding; and measures KL(original || quantized) of the next byte on a third set of pieces, with transformers'
own dequantizing load: weights only, activations in BF16. Error bars are of the mean over pieces (bootstrap),
and of the difference between two roundings piece by piece.

    python benchmarks/held_out.py --folder SCRATCH
    python benchmarks/held_out.py --folder SCRATCH --kind moe --steps 400
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data import topics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import transformers

import machine
import tiny_checkpoints
from trained import learning, store

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 768}
MOE_SIZES = {"num_hidden_layers": 4, "hidden_size": 256}
MODULES = ("argparse", "asyncio.base_events", "datetime", "doctest", "email.message", "inspect", "pathlib",
           "subprocess", "tarfile", "threading", "typing", "unittest.mock")  # fmt: skip
RATE = 4e-3
RESAMPLES = 2000
RUNS = {
    "max, nearest": ("--calib_mode", "max"),
    "mse, BF16 scales, nearest": ("--calib_mode", "mse", "--scale_format", "bf16"),
    "max, second order": ("--calib_mode", "max", "--rounding", "second_order"),
}
"""What is compared: label -> flags of quantize_fp8.py. The last against the first."""


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where everything goes")
    parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--length", type=int, default=128, help="bytes of a piece")
    parser.add_argument("--calibration", type=int, default=96, help="pieces for the second moments")
    parser.add_argument("--held_out", type=int, default=128, help="pieces that KL is measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results here")
    flags = parser.parse_args()
    sizes = MOE_SIZES if flags.kind == "moe" else SIZES
    learning, calibrating, judging = pieces_of_text(flags.length, flags.seed)
    model = flags.folder / f"{flags.kind}-{flags.steps}-{flags.seed}"
    if not (model / "config.json").exists():
        train(model, flags.kind, sizes, learning, flags.steps, flags.seed)
    compared = compare(model, flags.folder, calibrating[: flags.calibration], judging[: flags.held_out])
    rows = [{"weights": label, **values} for label, values in table_of(compared).items()]
    where = machine.describe()
    print(machine.heading(where))
    print(
        f"{flags.kind}, {flags.steps} steps; {flags.calibration} pieces of {flags.length} bytes for second ",
        end="",
    )
    print(f"moments, {flags.held_out} held out\n")
    print(machine.table(rows))
    print(gain(compared["max, nearest"]["kl"], compared["max, second order"]["kl"]))
    print("\nThe same by --compare_outputs --against, second order against nearest:")
    for activations in ("bf16", "fp8"):
        found = paired(model, flags.folder, judging[: flags.held_out], activations)
        print(f"{activations} activations: {found}")
    machine.save(flags.json, where, rows)


# --- text and model ----------------------------------------------------------------------------


def pieces_of_text(length: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Pieces to learn from, to calibrate on and to judge by: 80, 10 and 10 %, cut at random."""
    sources = [Path(__import__(name, fromlist=["x"]).__file__).read_text() for name in MODULES]
    text = "\n".join([*(value for _, value in sorted(topics.topics.items())), *sources])
    text = text.encode("ascii", "ignore").decode()
    found = [text[i : i + length] for i in range(0, len(text) - length, length)]
    random.Random(seed).shuffle(found)
    tenth = len(found) // 10
    return found[2 * tenth :], found[:tenth], found[tenth : 2 * tenth]


def train(folder: Path, kind: str, sizes: dict, texts: list[str], steps: int, seed: int) -> None:
    """Write a checkpoint that learned the texts, byte by byte."""
    name = {"dense": "text", "moe": "moe_text"}[kind]
    tiny_checkpoints.build(folder, name, mtp=False, tokenizer=True, seed=seed, **sizes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([list(text.encode()) for text in texts])
    ids = _ids(folder)
    begun = time.monotonic()

    def draw(generator: torch.Generator) -> torch.Tensor:
        return ids[tokens[torch.randint(len(tokens), (8,), generator=generator)]]

    for step, loss in enumerate(learning(model, draw, steps, RATE, seed), 1):
        if step % 20 == 0:
            took = time.monotonic() - begun
            print(f"step {step}/{steps}: loss {loss:.3f}, {took:.0f} s", file=sys.stderr, flush=True)
    store(model, folder)


def _ids(folder: Path) -> torch.Tensor:
    """Token of each ASCII byte."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor([tokenizer(chr(byte))["input_ids"][0] for byte in range(128)])


# --- comparison --------------------------------------------------------------------------------


def compare(
    model: Path, folder: Path, calibrating: list[str], judging: list[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """For each of RUNS: `kl` and `same` (whether the top byte is), float64 [pieces, bytes]."""
    moments = second_moments(model, folder, calibrating)
    ids = _ids(model)[torch.tensor([list(text.encode()) for text in judging])]
    expected = _log_probabilities(model, ids)
    found = {}
    for number, (label, flags) in enumerate(RUNS.items()):
        output = _output(model, folder, number)
        if "second_order" in flags:
            flags = (*flags, "--second_moments", moments)
        _run("quantize_fp8.py", "--input_dir", model, "--output_dir", output, "--overwrite", *flags)
        got = _log_probabilities(output, ids)
        kl = (expected.exp() * (expected - got)).sum(-1)
        found[label] = {"kl": kl, "same": (expected.argmax(-1) == got.argmax(-1)).double()}
    return found


def second_moments(model: Path, folder: Path, texts: list[str]) -> Path:
    """The file of second moments that the collector makes of the texts."""
    prompts = folder / "calibration.jsonl"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _run(
        "collect_activation_stats.py", "--model_dir", model, "--output", folder / "stats.safetensors",
        "--prompts_file", prompts, "--layerwise", "--second_moments", "--device_map", "cpu",
    )  # fmt: skip
    return folder / "stats.second_moments.safetensors"


def paired(model: Path, folder: Path, texts: list[str], activations: str) -> str:
    """What the tool itself says of the last of RUNS against the first, as an engine computes."""
    prompts = folder / "held_out.jsonl"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = _run(
        "quantize_fp8.py", "--input_dir", model, "--verify_only", "--verify_samples", 1,
        "--output_dir", _output(model, folder, len(RUNS) - 1), "--against", _output(model, folder, 0),
        "--compare_outputs", "--prompts_file", prompts, "--no_chat_template", "--activations", activations,
    )  # fmt: skip
    same = [line.partition(":")[2].strip() for line in found if "Same top p" in line]
    [line] = [line.strip() for line in found if "difference" in line]
    return f"{line}; same top p {' vs '.join(same)}"


def _output(model: Path, folder: Path, number: int) -> Path:
    return folder / f"{model.name}-fp8-{number}"


def _run(script: str, *flags: object) -> list[str]:
    """The lines that a script prints."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags), "--quiet"],
        capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    if done.returncode == 2:
        raise SystemExit(done.stderr)
    lines = done.stdout.splitlines()
    for line in lines:
        if "Output error" in line:
            print(line.strip(), file=sys.stderr)
    return lines


def _log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token behind each, float64 [pieces, bytes, vocabulary]."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if quantization := getattr(config, "quantization_config", None):
        quantization["dequantize"] = True
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = [model.eval()(input_ids=batch, use_cache=False).logits for batch in ids.split(16)]
    return torch.cat(logits).double().log_softmax(-1)


def table_of(compared: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, str]]:
    """A row of figures for each rounding."""
    rows = {}
    for label, found in compared.items():
        kl = found["kl"].flatten().sort().values
        low, high = interval(found["kl"].mean(1))
        rows[label] = {
            "mean KL": f"{kl.mean():.5f}",
            "95 %": f"{low:.5f} to {high:.5f}",
            "1 %-trimmed": f"{kl[len(kl) // 100 : len(kl) - len(kl) // 100].mean():.5f}",
            "median": f"{kl.median():.5f}",
            "same top byte": f"{100 * found['same'].mean():.2f} %",
        }
    return rows


def interval(values: torch.Tensor) -> tuple[float, float]:
    """Where 95 % of the means of resampled values lie."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = values[chosen].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return float(low), float(high)


def gain(before: torch.Tensor, after: torch.Tensor) -> str:
    """The paired difference of two roundings' KL [pieces, bytes], in a line."""
    difference = (after - before).mean(1)
    low, high = interval(difference)
    share = float(after.mean() / before.mean())
    return f"second order - nearest: {difference.mean():+.5f} ({low:+.5f} to {high:+.5f}), {share:.2f} x"


if __name__ == "__main__":
    main()
