"""`make demo`: a small real Qwen3.5-MoE checkpoint, quantized, loaded by transformers, compared.

Builds the checkpoint in the layout of the official BF16 releases (fused experts), runs quantize_fp8.py
on it as a user would, and prints how far the FP8 model's predictions are from the BF16 model's.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

QUANTIZE = Path(__file__).resolve().parent.parent / "quantize_fp8.py"


def main(folder: Path) -> int:
    """Run the demo in `folder`, whose `bf16` and `fp8` are replaced. Returns an exit code."""
    # transformers' notes about optional kernels are not what the demo is about.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from transformers.utils import logging

    import tiny_checkpoints

    logging.disable_progress_bar()
    bf16, fp8 = folder / "bf16", folder / "fp8"
    for path in (bf16, fp8):
        shutil.rmtree(path, ignore_errors=True)
    print(f"Building a small Qwen3.5-MoE checkpoint in {bf16}", flush=True)
    # Every expert sees every token: with top-k routing a rounding error can send a token elsewhere, and
    # the comparison would measure the tiny router instead of the quantization.
    tiny_checkpoints.build(
        bf16, "moe", shards=2, f32_extras=True, tokenizer=True, num_experts=8, num_experts_per_tok=8
    )
    command = [sys.executable, str(QUANTIZE), "--input_dir", str(bf16), "--output_dir", str(fp8)]
    print("$ python quantize_fp8.py", *command[2:], flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        return code
    print("Loading both with transformers", flush=True)
    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    before, after = tiny_checkpoints.logits(bf16, tokens), tiny_checkpoints.logits(fp8, tokens)
    divergence = tiny_checkpoints.mean_kl(before, after)
    print(f"Mean KL divergence, FP8 from BF16 : {divergence:.2e}  (a good result is below 2e-3)")
    return 0 if divergence < 2e-3 else 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    sys.exit(main(Path(sys.argv[1])))
