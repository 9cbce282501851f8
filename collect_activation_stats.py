#!/usr/bin/env python3
"""Collect activation statistics of a BF16 Qwen3.5/3.6 checkpoint, for quantize_fp8.py --activation_stats.

Runs calibration prompts through the real transformers model and records, for every weight that
quantize_fp8.py quantizes, the largest magnitude and the mean square of each input channel.
"""

import argparse
import math

from fp8lib.command_line import Command, Parser, natural, path


def make_parser() -> Parser:
    """The parser of this script's flags."""
    parser = Parser(
        prog="collect_activation_stats.py",
        description=__doc__,
        epilog="Exit codes: 0 written, 2 refused or failed, 130 or 143 interrupted. "
        "No partial file is ever left.",
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--model_dir", type=path, required=True, help="BF16 checkpoint, with its tokenizer")
    group.add_argument(
        "--output", type=path, required=True, metavar="FILE",
        help="statistics file: *.json, or *.safetensors for large models; replaced if it exists",
    )  # fmt: skip

    group.add_argument(
        "--second_moments", action="store_true",
        help="also record the second moments of the inputs, for quantize_fp8.py --rounding second_order, in "
        "FILE's name with .second_moments.safetensors",
    )  # fmt: skip
    group.add_argument(
        "--second_moments_limit", type=gigabytes, default=64_000_000_000, metavar="GB",
        help="size of that file; single experts get matrices of their own within it (64)",
    )  # fmt: skip
    group.add_argument(
        "--dry_run", action="store_true", help="with --second_moments: show its sizes, write nothing"
    )

    parser.add_prompts()

    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max_tokens", type=natural, metavar="N",
        help="tokens the model generates per prompt, greedily (256; none with --layerwise)",
    )  # fmt: skip

    group = parser.add_argument_group("memory")
    group.add_argument(
        "--layerwise", action="store_true",
        help="one decoder layer in memory at a time, so that any model fits; prompts only, no generation",
    )  # fmt: skip
    group.add_argument(
        "--device_map", default="auto", metavar="MAP",
        help="for from_pretrained: auto, cpu, cuda:0, ... (%(default)s: all GPUs, then the host); with "
        "--layerwise the one device to run on (%(default)s: the first GPU, or the CPU)",
    )  # fmt: skip

    parser.add_others()
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    flags = parser.parse_args(arguments)
    if flags.dry_run and not flags.second_moments:
        parser.error("argument --dry_run: shows the sizes of second moments; add --second_moments")
    flags.notes = ()
    if flags.layerwise and flags.max_tokens:
        flags.notes = (f"--layerwise runs prompts only: --max_tokens {flags.max_tokens} has no effect",)
    if flags.max_tokens is None:
        flags.max_tokens = 256
    return flags


def gigabytes(text: str) -> int:
    """A flag's value in GB as bytes."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of gigabytes above 0")
    return round(number * 1e9)


def _run(flags: argparse.Namespace) -> int:
    from fp8lib.job import collecting
    from fp8lib.terminal import Talk

    collecting.run(flags, Talk.to_terminal(flags.quiet))
    return 0


COMMAND = Command(
    parse,
    _run,
    interrupted="interrupted: no statistics were written",
    out_of_memory="add --layerwise, or give a smaller --batch_size or --max_prompt_tokens, "
    "or --device_map cpu",
)
main = COMMAND.main

if __name__ == "__main__":
    COMMAND.end()
