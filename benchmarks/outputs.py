"""The table of docs/comparing-outputs.md: KL divergence by scale format and by what an engine makes of it.

    python benchmarks/outputs.py [--kind text|moe] [--prompts N]

Trains the tiny model of `tests/trained.py`, quantizes it in both scale formats, and compares outputs on text
that no training saw. The last column is the emulation's own error: how far the mean is from one that whole
models in float64 give, dequantized and rounded by independent code.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.numpy import load_file

sys.path[:0] = [str(Path(__file__).parent.parent / part) for part in (".", "tests")]

import outputs_reference  # noqa: E402
import quantize_fp8  # noqa: E402
from fp8lib.outputs.figures import mean_over_prompts  # noqa: E402
from trained import held_out_prompts, train  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kind", choices=("text", "moe"), default="text")
    parser.add_argument("--prompts", type=int, default=24)
    flags = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        original = train(folder / "original", flags.kind)
        texts = held_out_prompts(flags.prompts, 200)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        print("scale_format  served   mean KLD             own error")
        for scale_format in ("bf16", "ue8m0"):
            out = folder / scale_format
            shared = ["--input_dir", original, "--output_dir", out, "--quiet"]
            _call(*shared, "--scale_format", scale_format, "--skip_verify")
            for served in ("written", "ue8m0"):
                found = folder / "found.safetensors"
                _call(
                    *shared, "--verify_only", "--verify_samples", 1, "--compare_outputs", "--served", served,
                    "--prompts_file", prompts, "--logits_out", found,
                )  # fmt: skip
                results = load_file(found)
                mean = mean_over_prompts(results["kl1"], results["prompt"])
                own = abs(mean.value - _by_hand(original, out, texts, served == "ue8m0"))
                print(
                    f"{scale_format:<14}{served:<9}{mean.value:.3e} ± {mean.error:.1e}   {own:.1e}",
                    flush=True,
                )


def _call(*arguments: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        if quantize_fp8.main(list(map(str, arguments))) == 2:
            raise SystemExit("refused")  # what for, stderr says


def _by_hand(original: Path, out: Path, texts: list[str], power_of_two: bool) -> float:
    tokenizer = transformers.AutoTokenizer.from_pretrained(original)
    rounding = partial(outputs_reference.rounded_activations, power_of_two=power_of_two)
    reference = outputs_reference.model_of(original, original, None)
    other = outputs_reference.model_of(out, original, rounding, power_of_two)
    found = []
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        both = (outputs_reference.logits(model, tokens)[:-1] for model in (reference, other))
        found.append(outputs_reference.kl(*both))
    return float(torch.cat(found).mean())


if __name__ == "__main__":
    main()
