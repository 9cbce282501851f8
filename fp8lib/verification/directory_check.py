"""What of a directory is not in its tensors: config.json's quantization_config, the index, the copied files.

All of this holds for any tool's directory. Copied files are for the caller to judge: another tool may have
reasons for another README or other settings of a tokenizer.
"""

import filecmp
from collections.abc import Iterable
from pathlib import Path

from fp8lib.checkpoint.directory import CONFIG, INDEX, Checkpoint
from fp8lib.checkpoint.untrusted import open_regular, printable
from fp8lib.numerics.blocks import BLOCK

_EXPECTED = {
    "quant_method": ("fp8", True),
    "weight_block_size": ([BLOCK, BLOCK], True),
    "fmt": ("e4m3", False),
    "activation_scheme": ("dynamic", False),
}
"""What engines must read for weights with block scales, and whether it must be there."""
_TOKENIZERS = {"tokenizer.json", "vocab.json", "tokenizer.model"}
"""A directory with none of these cannot be served by itself."""


def quantization_problems(config: dict) -> list[str]:
    """What in `quantization_config` contradicts FP8 weights with a scale for each block of 128 x 128."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return [f"{CONFIG}: has no quantization_config, so no engine will read the weights as FP8"]
    return [
        f"{CONFIG}: quantization_config has {key} {printable(quantization.get(key))}, but the weights need "
        f"{expected}"
        for key, (expected, required) in _EXPECTED.items()
        if (required or quantization.get(key) is not None) and quantization.get(key) != expected
    ]


def index_problems(quantized: Checkpoint) -> list[str]:
    """Tensors that the index leaves out; `open_checkpoint` has seen to the reverse."""
    return [
        f"{printable(name)}: in the shards but not in {INDEX}, so engines do not load it"
        for name in quantized.unlisted
    ]


def copied_file_problems(original: Path, folder: Path, names: Iterable[str]) -> list[str]:
    """Files that are not byte for byte the input's, one line each.

    Raises:
        Fp8Error: one cannot be read.
    """
    found = []
    for name in names:
        if not (folder / name).is_file():
            found.append(f"{printable(name)}: missing from the directory")
        elif not _same(original / name, folder / name):
            found.append(f"{printable(name)}: differs from the input's")
    return found


def lacks_tokenizer(original: Checkpoint, quantized: Checkpoint) -> bool:
    """Whether the original has a tokenizer and the other has none."""
    has, has_not = (
        not _TOKENIZERS.isdisjoint(path.as_posix() for path in each.extra_files)
        for each in (original, quantized)
    )
    return has and not has_not


def _same(one: Path, other: Path) -> bool:
    for path in (one, other):
        open_regular(path).close()  # refused if not: nothing waits for a FIFO
    return filecmp.cmp(one, other, shallow=False)
