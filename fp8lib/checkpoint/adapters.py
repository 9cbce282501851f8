"""Opens PEFT adapters and says what they change in a checkpoint, from headers and adapter_config.json alone.

An adapter is a download like any other: its names, shapes and settings are believed only as far as they fit
the checkpoint, and every tensor of it must meet a weight.

The settings are those of peft 0.21 (`LoraConfig`). What changes the merge in a way that is not done here is
refused by name; what concerns training or loading alone is not looked at.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.headers import Shard, Tensor, read_shard
from fp8lib.checkpoint.untrusted import open_regular, printable, read_json, resolve_inside, why

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_MAX_CONFIG = 10_000_000
_MAX_RANK = 65_536
_MAX_PATTERN = 500

_UNSUPPORTED = {
    "use_dora": "DoRA rescales each merged row by a trained magnitude",
    "use_qalora": "QALoRA pools the inputs of A",
    "use_bdlora": "BD-LoRA shares blocks between devices",
    "arrow_config": "Arrow chooses among adapters token by token",
    "kasa_config": "KaSA changes the base weights, too",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA is not known here",
    "alora_invocation_tokens": "an activated LoRA is switched on by tokens",
    "layer_replication": "it repeats layers of the base model",
    "trainable_token_indices": "single rows of the embedding are not replaced",
}
"""Settings whose adapters are not W + scaling * B @ A, and why."""
_INITIAL = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights alone. PiSSA, OLoRA and others change them."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + scaling * B @ A for one matrix.

    Attributes:
        shard: the adapter's file.
        a, b: factors in it, as PEFT shapes them: [r, in] and [out, r]; of a stack of experts
            [experts * r, in] and [out, r * experts]; of an embedding [r, tokens] and [width, r].
        scaling: alpha / r or alpha / sqrt(r).
        kind: how PEFT wraps the weight; unless `linear`, it rounds the product to the weight's dtype.
        experts, expert: number in the stack, and which this is of; 1 and 0 where there is none.
        first_row: of B @ A that is the matrix's first: up_proj is the second half of gate_up_proj.
    """

    shard: Shard
    a: Tensor
    b: Tensor
    scaling: float
    kind: Literal["linear", "parameter", "embedding"]
    experts: int = 1
    expert: int = 0
    first_row: int = 0

    @property
    def rounded(self) -> bool:
        return self.kind != "linear"


@dataclass(frozen=True, slots=True)
class Replacement:
    """A matrix that an adapter replaces (`modules_to_save`, trained biases): its rows from `start` on."""

    shard: Shard
    tensor: Tensor
    start: int


Change = LowRank | Replacement


@dataclass(frozen=True, slots=True)
class Adapters:
    """Adapters to merge into a checkpoint.

    Attributes:
        fingerprints: of each, in the order they are merged: SHA-256 of adapter_config.json followed by
            adapter_model.safetensors, which `cat` and `sha256sum` give, too.
        changes: name of a matrix of the output, or of a kept tensor -> what is done to it, in order.
    """

    fingerprints: tuple[str, ...]
    changes: Mapping[str, tuple[Change, ...]]


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One adapter, opened and not yet compared with a checkpoint.

    Attributes:
        root: its directory.
        shard: its file of weights.
        config: adapter_config.json.
        sha256: its fingerprint.
    """

    root: Path
    shard: Shard
    config: dict
    sha256: str

    def scaling(self, target: str, rank: int) -> float:
        """The factor before B @ A, by the module's or parameter's name in the model.

        Raises:
            Fp8Error: the settings do not fit a rank of `rank`, or are not valid.
        """
        expected = self._setting(target, "rank_pattern", "r", 8)
        alpha = self._setting(target, "alpha_pattern", "lora_alpha", 8)
        if rank != expected:
            raise Fp8Error(
                f"{printable(self.shard.path)}: rank {rank} for {printable(target)}, "
                f"{printable(expected)} by {CONFIG}; the two are not of one adapter"
            )
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise Fp8Error(
                f"{printable(self.root / CONFIG)}: lora_alpha {printable(alpha)!r} is not a number"
            )
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def is_parameter(self, weight: str) -> bool:
        """Whether PEFT wraps this weight as a parameter, by the settings."""
        targets = self.config.get("target_parameters") or []
        return any(weight == t or weight.endswith(f".{t}") for t in targets)

    def _setting(self, target: str, patterns: str, key: str, default: int) -> object:
        """A setting of one target: of the first pattern that fits its name's end, else everybody's."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", target):
                return value
        return self.config.get(key, default)


def open_adapter(root: Path) -> AdapterFile:
    """Open a PEFT directory.

    Raises:
        Fp8Error: it is none, is no LoRA, or needs what is not done here; says which.
    """
    if not root.is_dir():
        raise Fp8Error(f"{printable(root)}: no such directory; give the one that holds {CONFIG}")
    for name in (CONFIG, WEIGHTS):
        if not os.path.lexists(root / name):
            if name == WEIGHTS and os.path.lexists(root / "adapter_model.bin"):
                raise Fp8Error(
                    f"{printable(root / 'adapter_model.bin')}: a pickle, which can run code when it is "
                    "loaded; save the adapter as safetensors"
                )
            raise Fp8Error(f"{printable(root / name)}: no such file; give the directory of a PEFT adapter")
    config = read_json(resolve_inside(root, CONFIG), _MAX_CONFIG)
    _check_config(root / CONFIG, config)
    shard = read_shard(resolve_inside(root, WEIGHTS))
    for tensor in shard.tensors:
        if tensor.dtype not in ("BF16", "F16", "F32"):
            raise Fp8Error(
                f"{printable(shard.path)}: {printable(tensor.name)} is {tensor.dtype}; "
                "BF16, F16 and F32 can be merged"
            )
    return AdapterFile(root, shard, config, _sha256(root / CONFIG, shard.path))


def open_adapters(roots: Iterable[Path], checkpoint: Checkpoint) -> Adapters:
    """Open adapters and find what each of them changes.

    Args:
        roots: their directories, in the order in which they are merged.
        checkpoint: to merge them into.

    Raises:
        Fp8Error: as `open_adapter` and `adapter_targets.changes_of`.
    """
    from fp8lib.checkpoint.adapter_targets import Targets

    targets = Targets(checkpoint)
    fingerprints, changes = [], {}
    for root in roots:
        adapter = open_adapter(root)
        fingerprints.append(adapter.sha256)
        for name, found in targets.changes_of(adapter).items():
            changes[name] = changes.get(name, ()) + found
    return Adapters(tuple(fingerprints), changes)


def _check_config(path: Path, config: object) -> None:
    shown = printable(path)
    if not isinstance(config, dict):
        raise Fp8Error(f"{shown}: not a JSON object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Fp8Error(f"{shown}: peft_type {printable(kind)!r}; only LORA adapters are merged here")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise Fp8Error(
                f"{shown}: {key} is set, which is not done here: {reason}; merge the adapter with PEFT first"
            )
    initial = config.get("init_lora_weights", True)
    if not (isinstance(initial, str | bool) or initial is None) or initial not in _INITIAL:
        raise Fp8Error(
            f"{shown}: init_lora_weights {printable(initial)!r} has changed the base weights, too; convert "
            "the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    rank = config.get("r", 8)
    if type(rank) is not int or not 0 < rank <= _MAX_RANK:
        raise Fp8Error(f"{shown}: r {printable(rank)!r} is not a rank")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(shown, key, config.get(key) or {})
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise Fp8Error(f"{shown}: target_parameters is not a list of names")


def _check_patterns(shown: str, key: str, patterns: object) -> None:
    """Refuse regular expressions that do not compile, or that could take for ever on a name."""
    if not isinstance(patterns, dict):
        raise Fp8Error(f"{shown}: {key} is not a map")
    for pattern in patterns:
        slow = len(pattern) > _MAX_PATTERN or len(re.findall(r"[*+{]", pattern)) > 3
        slow = slow or re.search(r"\)[*+{]", pattern)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            slow = True
        if slow:
            raise Fp8Error(f"{shown}: {key} {printable(pattern)!r} is no plain pattern of module names")


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open_regular(path) as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise Fp8Error(f"{printable(path)}: cannot be read ({why(error)})") from None
    return digest.hexdigest()
