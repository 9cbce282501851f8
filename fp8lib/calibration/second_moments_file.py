"""The second-moments file: for every input of quantized weights, H = mean of x x^T over the tokens seen.

A `.safetensors` file beside the statistics file (`stats.json` or `stats.safetensors` ->
`stats.second_moments.safetensors`), and not in it: it is a hundred times as large, JSON could not hold it,
and who only wants channel statistics should not have to move it.

    <input>.second_moments   F32 [n (n + 1) / 2], H's upper triangle by rows: H_11, H_12, ... H_1n, H_22, ...
    <input>.tokens           I64 [1]

Inputs are named like the groups of weights that share them: `model.layers.3.self_attn.qkv_proj`,
`….mlp.gate_up_proj`, `….mlp.down_proj`. The experts of a layer share `….mlp.experts`, over all tokens, for
their gate and up projections, and `….mlp.experts.down_proj`, pooled over all experts, for their down
projections. `….mlp.experts.7.down_proj` is one expert's own, where it saw enough tokens. Prefixes may differ
from the checkpoint's, as in the statistics file."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fp8lib import Fp8Error
from fp8lib.calibration.statistics_file import TOKENS
from fp8lib.checkpoint.headers import Tensor, read_shard
from fp8lib.checkpoint.rules import canonical, fusion_group, one_expert_part
from fp8lib.checkpoint.untrusted import open_regular, printable, why

MOMENTS = "second_moments"
_CHUNK = 1 << 24


def path_beside(statistics: Path) -> Path:
    """Where the second moments go that are collected together with a statistics file."""
    return statistics.with_name(f"{statistics.stem}.{MOMENTS}.safetensors")


def triangle(channels: int) -> int:
    """Numbers on and above the diagonal."""
    return channels * (channels + 1) // 2


def pack(square: np.ndarray) -> np.ndarray:
    """[n, n] -> its upper triangle, [n (n + 1) / 2]."""
    n = len(square)
    packed = np.empty(triangle(n), square.dtype)
    for i in range(n):
        packed[triangle(n) - triangle(n - i) :][: n - i] = square[i, i:]
    return packed


def unpack(packed: np.ndarray) -> np.ndarray:
    """The symmetric matrix [n, n] of an upper triangle."""
    n = _channels(len(packed))
    square = np.empty((n, n), packed.dtype)
    for i in range(n):
        row = packed[triangle(n) - triangle(n - i) :][: n - i]
        square[i, i:] = square[i:, i] = row
    return square


def _channels(numbers: int) -> int:
    """n for n (n + 1) / 2 numbers; what is no triangle gives another count back."""
    return (math.isqrt(8 * numbers + 1) - 1) // 2


@dataclass(frozen=True, slots=True)
class Input:
    """What some weights multiply.

    Attributes:
        name: of the group of weights, see above.
        channels: input features.
        experts: experts whose down projections have inputs of their own, pooled here; else 0.
    """

    name: str
    channels: int
    experts: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file, of the pooled matrix or of one expert's."""
        return 4 * triangle(self.channels) + 8


def inputs_of(weights: Iterable[tuple[str, int]]) -> list[Input]:
    """The inputs of quantized weights, (full tensor name, channels) each, that transformers computes."""
    found: dict[str, int] = {}
    experts: dict[str, int] = {}
    for weight, channels in weights:
        if canonical(weight).startswith("mtp."):
            continue
        *_, shared = _names(weight)
        found[shared] = channels
        part = one_expert_part(weight)
        if part and part[2] == "down_proj":
            experts[shared] = max(experts.get(shared, 0), part[1] + 1)
    return [Input(name, channels, experts.get(name, 0)) for name, channels in found.items()]


def _names(weight: str) -> Iterator[str]:
    """Inputs that can speak for a weight, the closest first, the one that is shared last."""
    if part := one_expert_part(weight):
        experts, expert, projection = part
        if projection == "down_proj":
            yield f"{experts}.{expert}.down_proj"
            yield f"{experts}.down_proj"
        else:
            yield experts
    else:
        yield fusion_group(weight)


class SecondMoments:
    """A second-moments file, opened and checked.

    Attributes:
        path: the file.

    Args:
        path: the file.

    Raises:
        Fp8Error: unreadable, or not of this form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        shown = printable(path)
        if not os.path.lexists(path):
            raise Fp8Error(f"{shown}: no such file")
        try:
            self._shard = read_shard(path)
        except Fp8Error as error:
            reason = str(error).removeprefix(f"{shown}: ")
            raise Fp8Error(f"{shown}: not valid safetensors ({reason})") from None
        self._entries: dict[str, Tensor] = {}
        for tensor in self._shard.tensors:
            name, _, kind = tensor.name.rpartition(".")
            if kind == TOKENS:
                continue
            numbers = tensor.shape[0] if len(tensor.shape) == 1 else 0
            if (
                kind != MOMENTS
                or tensor.dtype != "F32"
                or triangle(_channels(numbers)) != numbers
                or not numbers
            ):
                shape = f"{tensor.dtype} {list(tensor.shape)}"
                raise Fp8Error(
                    f"{shown}: {printable(tensor.name)}: {shape} is no F32 triangle of second moments"
                )
            if canonical(name) in self._entries:
                raise Fp8Error(f"{shown}: {printable(name)} is there twice; remove one")
            self._entries[canonical(name)] = tensor
        if not self._entries:
            raise Fp8Error(f"{shown}: holds no second moments; collect them with --second_moments")

    def entry(self, weight: str, columns: int) -> str | None:
        """Which entry speaks for a weight; None if the file has none.

        Raises:
            Fp8Error: it has another number of channels.
        """
        for name in map(canonical, _names(weight)):
            if name in self._entries:
                channels = _channels(self._entries[name].shape[0])
                if channels != columns:
                    raise Fp8Error(
                        f"{self._shown(name)}: {channels} channels, but {printable(weight)} has {columns}; "
                        "collect second moments from this model"
                    )
                return name
        return None

    def check(self, weights: Iterable[tuple[str, int]]) -> int:
        """How many of some (weight, columns) have second moments.

        Raises:
            Fp8Error: as `entry`; or none of them has.
        """
        covered = sum(self.entry(name, columns) is not None for name, columns in weights)
        if not covered:
            raise Fp8Error(
                f"{printable(self.path)}: no entry matches a quantized tensor; "
                "collect second moments from this model"
            )
        return covered

    def channels(self, entry: str) -> int:
        """n of an entry."""
        return _channels(self._entries[entry].shape[0])

    def read(self, entry: str) -> np.ndarray:
        """An entry's matrix, float32 [n, n].

        Raises:
            Fp8Error: the file cannot be read any more.
        """
        tensor = self._entries[entry]
        raw = bytearray(tensor.nbytes)
        try:
            with open_regular(self.path) as file:
                file.seek(tensor.start)
                count = file.readinto(raw)
        except OSError as error:
            raise Fp8Error(f"{printable(self.path)}: cannot be read ({why(error)})") from None
        if count != tensor.nbytes:
            raise Fp8Error(
                f"{printable(self.path)}: became shorter while it was read; restore it and run again"
            )
        return unpack(np.frombuffer(raw, "<f4"))

    def refuse(self, entry: str, reason: str) -> Fp8Error:
        """What to raise about an entry that is no matrix of second moments."""
        return Fp8Error(f"{self._shown(entry)}: {reason}; collect it again")

    def _shown(self, entry: str) -> str:
        return f"{printable(self.path)}: {printable(self._entries[entry].name)}"

    @cached_property
    def sha256(self) -> str:
        """Of the file, all of which is read for it (36 GB, a 397B's, at the speed of the disk) and looked at.

        Raises:
            Fp8Error: it holds values that are not finite, or cannot be read.
        """
        digest = hashlib.sha256()
        start = self._shard.tensors[0].start
        try:
            with open_regular(self.path) as file:
                digest.update(file.read(start))
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    # Counts of tokens, two words each, pass as tiny numbers.
                    values = np.frombuffer(chunk, "<f4", len(chunk) // 4)
                    if not np.isfinite(values).all():
                        offset = start + 4 * int(np.argmin(np.isfinite(values)))
                        broken = next(t for t in self._shard.tensors if offset < t.start + t.nbytes)
                        raise Fp8Error(
                            f"{printable(self.path)}: {printable(broken.name)}: holds values that are not "
                            "finite; collect it again"
                        )
                    start += len(chunk)
        except OSError as error:
            raise Fp8Error(f"{printable(self.path)}: cannot be read ({why(error)})") from None
        return digest.hexdigest()
