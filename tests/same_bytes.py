"""Whether two checkouts of this project write the same bytes, on all layouts and modes. Run by hand.

    git worktree add ../before main~1
    python tests/same_bytes.py ../before . --after_flags="--calib_mode max"

Only shards, index and config.json are compared: the manifest may gain fields.
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import tiny_checkpoints

LAYOUTS = {
    "fused experts": {"kind": "moe", "experts": "fused", "shards": 2, "mtp": True},
    "one by one": {"kind": "moe", "experts": "per_expert", "shards": 3, "index": False},
    "dense": {"kind": "dense", "f32_extras": True, "shards": 2, "mtp": True},
    "text only": {"kind": "text", "tied": True},
    "moe, text only": {"kind": "moe_text", "experts": "fused", "index": "misnamed"},
    "odd sizes": {"kind": "text", "hidden_size": 384, "intermediate_size": 704},
    "F16": {"kind": "text", "dtype": torch.float16},
    "F32": {"kind": "moe_text", "experts": "fused", "dtype": torch.float32},
}
MODES = (
    "--calib_mode max",
    "--calib_mode rms",
    "--calib_mode rms --rms_saturate",
    "--calib_mode percentile --calib_percentile 99",
    "--calib_mode mse",
    "--calib_mode mse --mse_grid_size 16 --checksums",
)
RUN_ALL = """
import json, sys
import quantize_fp8
for arguments in json.load(sys.stdin):
    code = quantize_fp8.main(arguments)
    assert code in (0, 1), arguments
"""


def outputs(checkout: Path, sources: dict[str, Path], folder: Path, flags: str) -> dict[str, str]:
    """SHA-256 of every model file that a checkout writes: `layout, mode, file` -> digest."""
    runs = {
        (name, mode): folder / f"{i}" for i, (name, mode) in enumerate((n, m) for n in sources for m in MODES)
    }
    arguments = [
        [
            "--input_dir",
            str(sources[name]),
            "--output_dir",
            str(out),
            *shlex.split(f"{mode} {flags}"),
            "--quiet",
        ]
        for (name, mode), out in runs.items()
    ]
    subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(arguments), text=True, cwd=checkout, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return {
        f"{name}, {mode}, {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for (name, mode), out in runs.items()
        for path in sorted([*out.glob("*.safetensors"), out / "config.json", *out.glob("*.index.json")])
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--before_flags", default="", help="flags for the first only")
    parser.add_argument("--after_flags", default="", help="flags for the second only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sources = {}
        for number, (name, how) in enumerate(LAYOUTS.items()):
            sources[name] = tiny_checkpoints.build(folder / f"in{number}", **how)
        before = outputs(options.before, sources, folder / "before", options.before_flags)
        after = outputs(options.after, sources, folder / "after", options.after_flags)
    different = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    print("\n".join(f"differs: {key}" for key in different))
    print(f"{len(before)} files of {len(LAYOUTS)} layouts x {len(MODES)} modes, {len(different)} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
