#!/usr/bin/env python3
"""Turn a BF16 Qwen3.5/3.6 checkpoint into a block-wise FP8 one that vLLM and SGLang serve."""

import argparse
from collections.abc import Iterator

from fp8lib.checkpoint.dequantize_plan import EXPERT_LAYOUTS
from fp8lib.checkpoint.rules import ELIGIBILITIES, KEPT_DTYPES, Selection
from fp8lib.command_line import Command, Parser, path, positive
from fp8lib.numerics.modes import MODES, PHASES, SCALE_FORMATS, Calibration
from fp8lib.verification.bands import Bands

MODE_FLAGS = (
    ("rms", "--rms_factor"),
    ("rms", "--rms_saturate"),
    ("percentile", "--calib_percentile"),
    ("mse", "--mse_grid_size"),
)
"""Flags that only one mode looks at."""
COMPARISON_FLAGS = (
    "against", "activations", "served", "logits_out",
    "prompts_file", "no_chat_template", "max_prompt_tokens", "batch_size",
)  # fmt: skip
"""Flags that only --compare_outputs looks at."""
QUANTIZING_FLAGS = (
    "calib_mode", "scale_format", *(flag[2:] for _, flag in MODE_FLAGS), "activation_stats",
    "eligibility", "keep_failing", "keep_bf16", "quantize", "kept_dtype", "rounding", "second_moments",
    "damping", "lora_dir", "verify_samples", "seed", "band", "compare_outputs", "report",
)  # fmt: skip
"""Flags that mean nothing to --dequantize, which chooses no scales and verifies all that it writes."""
WRITING_FLAGS = ("overwrite", "eligibility", "keep_failing", "keep_bf16", "quantize", "kept_dtype")
"""Flags that --verify_only does not look at."""
CHECKING_FLAGS = ("verify_samples", "seed", "band", "strict")
"""Flags that --skip_verify and --dry_run make idle."""


def make_parser() -> Parser:
    """The parser of this script's flags."""
    parser = Parser(
        prog="quantize_fp8.py",
        description=__doc__,
        epilog="Exit codes: 0 GOOD or WARN, 1 verification FAILed, 2 refused or failed, "
        "130 or 143 interrupted.",
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--input_dir", type=path, required=True, help="checkpoint to quantize")
    group.add_argument("--output_dir", type=path, help="where the FP8 checkpoint goes; made if missing")
    group.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run wrote to --output_dir"
    )

    group.add_argument(
        "--checksums", action="store_true",
        help="also write SHA256SUMS of all files, for sha256sum -c; with a finished directory, that alone",
    )  # fmt: skip
    group.add_argument(
        "--lora_dir", type=path, action="append", default=[], metavar="ADAPTER",
        help="merge this PEFT adapter into the weights before they are quantized; several in their order",
    )  # fmt: skip
    group.add_argument(
        "--dequantize", action="store_true",
        help="the other way round: turn a block-FP8 --input_dir back into BF16",
    )  # fmt: skip
    group.add_argument(
        "--expert_layout", choices=EXPERT_LAYOUTS, default="fused",
        help="--dequantize: one tensor for the experts of a layer, or one per expert (%(default)s)",
    )  # fmt: skip

    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib_mode", choices=MODES, default="rms", help="how a block's scale is chosen (%(default)s)"
    )
    group.add_argument(
        "--scale_format", choices=SCALE_FORMATS, default="ue8m0",
        help="ue8m0: powers of two, which engines serve as they are; bf16: any BF16 number (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--rms_factor", type=float, default=3.0, metavar="K",
        help="rms: scale = K * rms / 448, doubled until nothing saturates (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--rms_saturate", action="store_true", help="rms: no doubling, clip what exceeds the scale"
    )
    group.add_argument(
        "--calib_percentile", type=float, default=99.9, metavar="P",
        help="percentile: scale = P-th percentile of |w| / 448 (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--mse_grid_size", type=int, default=PHASES, metavar="N",
        help="mse with bf16 scales: phases tried per octave; %(default)s is every scale (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--activation_stats", type=path, metavar="FILE",
        help="statistics from collect_activation_stats.py; rms and mse weight channels by them",
    )  # fmt: skip

    group = parser.add_argument_group("what is quantized")
    group.add_argument(
        "--eligibility", choices=ELIGIBILITIES, default="toolkit",
        help="official also quantizes linear_attn.out_proj and shared experts, like Qwen's own FP8 releases; "
        "auto is official with --keep_failing (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--keep_failing", action="store_true",
        help="first quantize everything in memory, and keep the fusion groups of which a weight would FAIL",
    )  # fmt: skip
    group.add_argument(
        "--keep_bf16", action="append", default=[], metavar="PATTERN",
        help="keep modules whose name matches, such as '*.layers.0.mlp.*', whole fusion groups at a time; "
        "wins over all else; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--quantize", action="append", default=[], metavar="PATTERN",
        help="quantize modules of the official set whose name matches, whole fusion groups at a time; "
        "repeatable",
    )  # fmt: skip

    group.add_argument(
        "--kept_dtype", choices=KEPT_DTYPES,
        help="store what is kept of an F32 or F16 input like this, but for routers, norms and the state of "
        "linear attention (as in the input)",
    )  # fmt: skip

    group = parser.add_argument_group("rounding")
    group.add_argument(
        "--rounding", choices=("nearest", "second_order"), default="nearest",
        help="how weights are rounded under their scales; second_order lets the errors of input channels "
        "cancel, by the second moments of the inputs (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--second_moments", type=path, metavar="FILE",
        help="second_order: from collect_activation_stats.py --second_moments",
    )  # fmt: skip
    group.add_argument(
        "--damping", type=_damping, default=0.01, metavar="D",
        help="second_order: share of their mean that is added to the second moments' diagonal (%(default)s)",
    )  # fmt: skip

    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: CUDA when there is one)"
    )
    group.add_argument(
        "--workers", type=positive, metavar="N", help="worker threads (one per core, at most 4 on CUDA)"
    )

    group = parser.add_argument_group("verification")
    group.add_argument(
        "--verify_samples", type=_samples, default=5, metavar="N",
        help="tensors measured per shard, or 'all' (%(default)s)",
    )  # fmt: skip
    group.add_argument("--skip_verify", action="store_true", help="write without verifying")
    group.add_argument(
        "--verify_only", action="store_true",
        help="write nothing but what --checksums asks for; measure a finished --output_dir, of this tool or "
        "another, against --input_dir",
    )  # fmt: skip
    group.add_argument(
        "--report", type=path, action="append", default=[], metavar="FILE",
        help="write what was found to *.json, or as a page to *.html (needs matplotlib, jinja2); twice at "
        "most",
    )  # fmt: skip
    group.add_argument(
        "--band", action="append", default=[], metavar="NAME=GOOD,HARD",
        help="limits of cosine, mae or maxae, such as cosine=0.9995,0.995; repeatable",
    )  # fmt: skip
    group.add_argument("--strict", action="store_true", help="exit code 1 for WARN, too")
    group.add_argument("--seed", type=int, default=0, help="of the random sample (%(default)s)")

    group = parser.add_argument_group("comparing outputs")
    group.add_argument(
        "--compare_outputs", action="store_true",
        help="run prompts through the original and the FP8 model, one layer at a time, and print KL "
        "divergence, top token and perplexity",
    )  # fmt: skip
    group.add_argument(
        "--against", type=path, metavar="DIR",
        help="compare another FP8 directory, too, and say which is closer to the original",
    )  # fmt: skip
    group.add_argument(
        "--activations", choices=("fp8", "bf16"), default="fp8",
        help="fp8: inputs of FP8 modules are quantized, as engines do; bf16: they are not, as in "
        "weight-only kernels (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--served", choices=("written", "ue8m0", "vllm-hopper"), default="written",
        help="weights as in the files, or requantized to power-of-two scales with such activation scales, "
        "or that for Linears alone (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--logits_out", type=path, metavar="FILE",
        help="*.safetensors: KL divergence, token and ranks of every position",
    )  # fmt: skip
    parser.add_prompts()

    group = parser.add_argument_group("other")
    group.add_argument(
        "--dry_run", action="store_true", help="print the plan from headers alone, write nothing"
    )
    parser.add_others(group)
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    flags = parser.parse_args(arguments)
    if flags.output_dir is None and not flags.dry_run:
        parser.error("the following arguments are required: --output_dir")
    if flags.skip_verify and flags.verify_only:
        parser.error("argument --verify_only: not allowed with argument --skip_verify")
    if flags.dry_run and flags.verify_only:
        parser.error("argument --verify_only: not allowed with argument --dry_run")
    _refuse_combinations(flags, parser)
    flags.selection = Selection(
        eligibility=flags.eligibility,
        keep=tuple(flags.keep_bf16),
        quantize=tuple(flags.quantize),
        keep_failing=flags.keep_failing,
        kept_dtype=KEPT_DTYPES.get(flags.kept_dtype),
    )
    flags.bands = Bands.parse(flags.band)
    flags.calibration = Calibration(
        mode=flags.calib_mode,
        rms_factor=flags.rms_factor,
        rms_saturate=flags.rms_saturate,
        percentile=flags.calib_percentile,
        mse_grid_size=flags.mse_grid_size,
        scale_format=flags.scale_format,
    )
    flags.notes = tuple(f"{flag} has no effect {where}" for flag, where in _idle(parser, flags))
    return flags


def _idle(parser: Parser, flags: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(flag, where it has no effect) of those that were given for nothing."""
    for mode, flag in MODE_FLAGS:
        if mode != flags.calib_mode and parser.given(flags, [flag[2:]]):
            yield flag, f"with --calib_mode {flags.calib_mode}"
    if flags.calib_mode == "mse" and flags.scale_format == "ue8m0" and flags.mse_grid_size != PHASES:
        yield "--mse_grid_size", "with --scale_format ue8m0"
    by_trial = flags.selection.by_trial  # the bands say what FAILs then
    for applies, names, where in (
        (not flags.dequantize, ("expert_layout",), "without --dequantize"),
        (not flags.compare_outputs, COMPARISON_FLAGS, "without --compare_outputs"),
        (flags.verify_only, WRITING_FLAGS, "with --verify_only"),
        (flags.skip_verify, [f for f in CHECKING_FLAGS if f != "band" or not by_trial], "with --skip_verify"),
        (flags.dry_run, (*CHECKING_FLAGS, "skip_verify", "checksums"), "with --dry_run"),
    ):
        if applies:
            yield from ((flag, where) for flag in parser.given(flags, names))


def _damping(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1e-6 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0.000001 to 10")
    return value


def _refuse_combinations(flags: argparse.Namespace, parser: Parser) -> None:
    """Refuse flags of which one could not be followed."""
    if flags.dequantize:
        for flag in parser.given(flags, QUANTIZING_FLAGS):
            parser.error(
                f"argument {flag}: not allowed with argument --dequantize, which turns weights back and "
                "verifies all of them; leave it out, or give it to a run of its own"
            )
    if (flags.rounding == "second_order") != (flags.second_moments is not None):
        parser.error("--rounding second_order and --second_moments: give both or neither")
    if flags.dry_run and flags.report:
        parser.error("argument --report: not allowed with argument --dry_run")
    if flags.dry_run and flags.compare_outputs:
        parser.error("argument --compare_outputs: not allowed with argument --dry_run")
    if flags.lora_dir and flags.kept_dtype:
        parser.error(
            "argument --kept_dtype: not allowed with argument --lora_dir, which merges into the input's "
            "dtype; leave one of them out"
        )
    if flags.lora_dir and flags.compare_outputs:
        parser.error(
            "argument --compare_outputs: not allowed with argument --lora_dir, because --input_dir is not "
            "the merged model; merge first to compare"
        )


def _samples(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 on nor 'all'")
    return int(text)


def _run(flags: argparse.Namespace) -> int:
    from fp8lib.job.run import exit_code, run
    from fp8lib.terminal import Talk

    return exit_code(flags, run(flags, Talk.to_terminal(flags.quiet)))


COMMAND = Command(
    parse,
    _run,
    interrupted="interrupted; run the same command again (without --overwrite) to continue",
    out_of_memory="use fewer --workers, a smaller --batch_size to compare outputs, "
    "or --device cpu if it is the device's",
)
main = COMMAND.main

if __name__ == "__main__":
    COMMAND.end()
