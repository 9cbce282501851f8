#!/usr/bin/env python3
"""Collect activation statistics of a BF16 Qwen3.5/3.6 checkpoint, for quantize_fp8.py --activation_stats.

Runs calibration prompts through the real transformers model and records, for every weight that
quantize_fp8.py quantizes, the largest magnitude and the mean square of each input channel.
"""

import argparse
import sys

from fp8lib import __version__
from fp8lib.command_line import Command, Parser, path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="collect_activation_stats.py",
        description=__doc__,
        epilog="Exit codes: 0 written, 2 refused or failed, 130 or 143 interrupted. "
        "No partial file is ever left.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--model_dir", type=path, required=True, help="BF16 checkpoint, with its tokenizer")
    group.add_argument(
        "--output", type=path, required=True, metavar="FILE",
        help="statistics file: *.json, or *.safetensors for large models; replaced if it exists",
    )  # fmt: skip

    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts_file", type=path, metavar="FILE",
        help="text with a prompt per line, or .jsonl with messages, prompt or text (built-in set)",
    )  # fmt: skip
    group.add_argument(
        "--no_chat_template", action="store_true", help="do not apply the tokenizer's chat template"
    )
    group.add_argument(
        "--max_tokens", type=_natural, metavar="N",
        help="tokens the model generates per prompt, greedily (256; none with --layerwise)",
    )  # fmt: skip
    group.add_argument(
        "--max_prompt_tokens", type=_positive, default=2048, metavar="N",
        help="longer prompts are cut to their first N tokens (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--batch_size", type=_positive, default=8, metavar="N",
        help="prompts that run together at most; fewer where together, with padding, they would have more "
        "than --max_prompt_tokens tokens (%(default)s)",
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

    group = parser.add_argument_group("other")
    group.add_argument("--debug", action="store_true", help="show a traceback with an error")
    group.add_argument("--quiet", action="store_true", help="no progress, no notes; summary and errors only")
    group.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(arguments)


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if _natural(text) == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def _run(flags: argparse.Namespace) -> int:
    from fp8lib.calibration import run
    from fp8lib.report import Printer

    def warn(text: str) -> None:
        if not flags.quiet:
            print(f"note: {text}", file=sys.stderr)

    if flags.layerwise and flags.max_tokens:
        warn(f"--layerwise runs prompts only: --max_tokens {flags.max_tokens} has no effect")
    options = run.Options(
        model_dir=flags.model_dir,
        output=flags.output,
        prompts_file=flags.prompts_file,
        chat_template=not flags.no_chat_template,
        max_tokens=256 if flags.max_tokens is None else flags.max_tokens,
        max_prompt_tokens=flags.max_prompt_tokens,
        batch_size=flags.batch_size,
        device_map=flags.device_map,
        layerwise=flags.layerwise,
        quiet=flags.quiet,
        debug=flags.debug,
    )
    run.run(options, Printer(sys.stdout), warn)
    return 0


COMMAND = Command(
    parse,
    _run,
    interrupted="interrupted: no statistics were written",
    out_of_memory="add --layerwise, or give a smaller --batch_size or --max_prompt_tokens",
)
main = COMMAND.main

if __name__ == "__main__":
    COMMAND.end()
