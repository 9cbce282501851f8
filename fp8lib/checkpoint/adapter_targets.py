"""Finds the weights that the tensors of a PEFT adapter belong to.

PEFT names its tensors after the modules of the transformers class that was trained:

    base_model.model.<module>.lora_A.weight            [r, in]          and lora_B.weight [out, r]
    base_model.model.<module>.lora_embedding_A         [r, tokens]      and lora_embedding_B [width, r]
    base_model.model.<…>.mlp.experts.lora_A.weight     [experts * r, in], of one of the two fused parameters
    base_model.model.<…>.mlp.experts.base_layer.lora_A.weight           of the other, where both are trained
    base_model.model.<tensor>                          what replaces a tensor: modules_to_save, trained biases

The `model.layers.0` of a text model may be the checkpoint's `model.language_model.layers.0`, or the other way
round: transformers loads either with either class. Experts may be fused in one of adapter and checkpoint and
single in the other. Which of the two fused parameters is meant, the shapes tell: [2 I, H] is gate_up_proj,
[H, I] is down_proj.
"""

import math
import re
from collections import defaultdict

from fp8lib import Fp8Error
from fp8lib.checkpoint.adapters import AdapterFile, Change, LowRank, Replacement
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.headers import ITEM_SIZE, Tensor
from fp8lib.checkpoint.layout import parts_of
from fp8lib.checkpoint.matching import has_tied_head
from fp8lib.checkpoint.rules import expert_weight, fused_experts_part
from fp8lib.checkpoint.untrusted import printable

_PEFT = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?$")
_PREFIX = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?")


class Targets:
    """What adapters can change in a checkpoint: its matrices, and its tensors of other shapes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._exact: dict[str, tuple[str, tuple[int, ...], str]] = {}
        for tensor in (t for shard in checkpoint.shards for t in shard.tensors):
            parts = parts_of(tensor)
            for name, rows, columns in parts:
                shape = tensor.shape if name == tensor.name else (rows, columns)
                self._exact[name] = name, shape, tensor.dtype
        loose: dict[str, list] = defaultdict(list)
        for target in self._exact.values():
            loose[_without_prefix(target[0])].append(target)
        self._loose = {key: found[0] for key, found in loose.items() if len(found) == 1}
        self._tied = has_tied_head(checkpoint.config)

    def changes_of(self, adapter: AdapterFile) -> dict[str, tuple[Change, ...]]:
        """What an adapter changes, by the name of the matrix or tensor.

        Raises:
            Fp8Error: a tensor that meets no weight or one of another shape, a factor without the other, or
                a kind of tensor that is not merged here.
        """
        factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        replaced: dict[str, tuple[Replacement]] = {}
        added: dict[str, tuple[LowRank]] = {}
        for tensor in adapter.shard.tensors:
            name = self._model_name(adapter, tensor)
            if match := _FACTOR.match(name):
                factors[match["module"]][match["side"]] = tensor
            else:
                self._add(adapter, replaced, self._replacements(adapter, tensor, name))
        for module, sides in factors.items():
            if len(sides) < 2:
                only = next(iter(sides.values()))
                raise _bad(adapter, only, "the other of lora_A and lora_B is missing; save the adapter again")
            self._add(adapter, added, self._additions(adapter, module, sides["A"], sides["B"]))
        if not replaced and not added:
            raise Fp8Error(f"{printable(adapter.shard.path)}: changes nothing; give another adapter")
        return {
            name: (*replaced.get(name, ()), *added.get(name, ()))
            for name in dict.fromkeys((*replaced, *added))
        }

    def _add(self, adapter: AdapterFile, changes: dict, found: list[tuple[str, Change]]) -> None:
        for name, change in found:
            if name in changes:
                tensor = change.tensor if isinstance(change, Replacement) else change.a
                raise _bad(
                    adapter, tensor, f"changes {printable(name)} a second time; save the adapter again"
                )
            changes[name] = (change,)

    def _model_name(self, adapter: AdapterFile, tensor: Tensor) -> str:
        """A tensor's name without what PEFT adds at its beginning.

        Raises:
            Fp8Error: not PEFT's, or of a kind that is not merged here.
        """
        if not tensor.name.startswith(_PEFT):
            raise _bad(adapter, tensor, f"does not begin with {_PEFT}, so PEFT did not write it")
        name = tensor.name[len(_PEFT) :]
        if re.search(r"\.lora_[AB]\.bias$", name):
            raise _bad(adapter, tensor, "lora_bias is not merged here; merge the adapter with PEFT first")
        if ".lora_magnitude_vector" in name:
            raise _bad(adapter, tensor, "DoRA is not merged here; merge the adapter with PEFT first")
        if "trainable_tokens" in name or (".lora_" in name and not _FACTOR.match(name)):
            raise _bad(adapter, tensor, "a kind of tensor that is not merged here; merge with PEFT first")
        return name

    def _find(
        self, adapter: AdapterFile, tensor: Tensor, name: str
    ) -> tuple[str, tuple[int, ...], str] | None:
        """(name, shape, dtype) of what an adapter calls `name`."""
        key = _without_prefix(name)
        if self._tied and key in ("embed_tokens.weight", "lm_head.weight"):
            raise _bad(
                adapter, tensor, "changes the embedding or the output head, which this model ties together; "
                "untie them first"
            )  # fmt: skip
        return self._exact.get(name) or self._loose.get(key)

    def _replacements(self, adapter: AdapterFile, tensor: Tensor, name: str) -> list[tuple[str, Replacement]]:
        """What a tensor that is no factor takes the place of."""
        name = name.replace(".base_layer.", ".")
        found, start = [], tensor.start
        own = Tensor(name, tensor.dtype, tensor.shape, tensor.start, tensor.nbytes)
        if (fused := fused_experts_part(name)) and len(tensor.shape) == 3:
            ends = [expert_weight(fused[0], tensor.shape[0] + k, "down_proj") for k in (-1, 0)]
            if [self._find(adapter, tensor, end) is None for end in ends] != [False, True]:
                raise _bad(adapter, tensor, f"{tensor.shape[0]} experts, not as many as the checkpoint has")
        for part, rows, columns in parts_of(own):
            shape = tensor.shape if part == name else (rows, columns)
            target = self._find(adapter, tensor, part)
            if target is None:
                raise _bad(adapter, tensor, "meets no weight of the checkpoint; give its base model")
            if target[1] != shape:
                raise _bad(adapter, tensor, f"{list(shape)}, but {printable(target[0])} is {list(target[1])}")
            self._require_float(adapter, tensor, target)
            found.append((target[0], Replacement(adapter.shard, tensor, start)))
            start += rows * columns * ITEM_SIZE[tensor.dtype]
        return found

    def _additions(
        self, adapter: AdapterFile, module: str, a: Tensor, b: Tensor
    ) -> list[tuple[str, LowRank]]:
        """What a pair of factors is added to."""
        module = module.replace(".base_layer", "")
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.nbytes or not b.nbytes:
            raise _bad(adapter, a, f"factors of {list(a.shape)} and {list(b.shape)} are not two matrices")
        weight = f"{module}.weight"
        target = self._find(adapter, a, weight)
        if target is None and module.endswith(".mlp.experts"):
            return self._stacked(adapter, module, a, b)
        if target is None:
            raise _bad(adapter, a, "meets no weight of the checkpoint; give its base model")
        self._require_float(adapter, a, target)
        embedding = a.name.endswith(".lora_embedding_A")
        shape = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
        if a.shape[0] != b.shape[1] or target[1] != shape:
            raise _bad(
                adapter, a, f"with lora_B makes {list(shape)} of rank {a.shape[0]}, "
                f"but {printable(target[0])} is {list(target[1])}"
            )  # fmt: skip
        parameter = adapter.is_parameter(weight)
        kind = "embedding" if embedding else "parameter" if parameter else "linear"
        scaling = adapter.scaling(weight if parameter else module, a.shape[0])
        return [(target[0], LowRank(adapter.shard, a, b, scaling, kind))]

    def _stacked(self, adapter: AdapterFile, module: str, a: Tensor, b: Tensor) -> list[tuple[str, LowRank]]:
        """What the factors of all experts of a layer are added to."""
        experts = []
        while target := self._find(adapter, a, expert_weight(module, len(experts), "down_proj")):
            self._require_float(adapter, a, target)
            experts.append(target)
        if not experts:
            raise _bad(adapter, a, "meets no weight of the checkpoint; give its base model")
        count, (hidden, inner) = len(experts), experts[0][1]
        made = b.shape[0], a.shape[1]
        part = {(2 * inner, hidden): "gate_up_proj", (hidden, inner): "down_proj"}.get(made)
        if part is None or a.shape[0] != b.shape[1] or a.shape[0] % count:
            raise _bad(
                adapter, a, f"with lora_B makes {list(made)} of rank {a.shape[0]}, but there are "
                f"{count} experts of [{2 * inner}, {hidden}] and [{hidden}, {inner}]"
            )  # fmt: skip
        scaling = adapter.scaling(f"{module}.{part}", a.shape[0] // count)
        names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        return [
            (
                self._find(adapter, a, expert_weight(module, e, name))[0],
                LowRank(adapter.shard, a, b, scaling, "parameter", count, e, inner * half),
            )
            for e in range(count)
            for half, name in enumerate(names)
        ]

    def _require_float(self, adapter: AdapterFile, tensor: Tensor, target: tuple) -> None:
        if target[2] not in ("BF16", "F16", "F32") or not math.prod(target[1]):
            raise _bad(
                adapter, tensor, f"changes {printable(target[0])}, which is {target[2]} {list(target[1])}"
            )


def _without_prefix(name: str) -> str:
    """A name without what a text model and a vision-language model put before it."""
    return _PREFIX.sub("", name)


def _bad(adapter: AdapterFile, tensor: Tensor, reason: str) -> Fp8Error:
    return Fp8Error(f"{printable(adapter.shard.path)}: {printable(tensor.name)}: {reason}")
