"""Which fusion groups of a checkpoint stay as they are, and why.

Four things decide, each over the one before: the eligible set, `--quantize`, what engines cannot serve, and
what is to be kept, by name or for a reason found elsewhere. Groups are decided whole.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import translate

from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.layout import matrices_of
from fp8lib.checkpoint.rules import (
    Selection,
    fused_experts_part,
    fusion_group,
    is_eligible,
    module_of,
    reason_kept,
    unservable_shape,
)
from fp8lib.checkpoint.untrusted import printable

_QUANTIZABLE = ("BF16", "F16", "F32")
_TEXT_ONLY_LAYER = re.compile(r"(?:model\.)?(?=layers\.)")


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of the fusion groups.

    Attributes:
        kept: group -> why it keeps its bytes. All others are quantized.
        notes: what a user should know of it, one line each.
    """

    kept: dict[str, str]
    notes: tuple[str, ...]


def group_of(tensor: Tensor) -> str | None:
    """The fusion group of a tensor; None for one that can never be quantized."""
    part = fused_experts_part(tensor.name)
    return part[0] if part else fusion_group(tensor.name)


def decide(tensors: Iterable[Tensor], selection: Selection) -> Decision:
    """Decide about every fusion group.

    Args:
        tensors: of the whole checkpoint.
        selection: what is asked for.

    Raises:
        Fp8Error: a dtype that cannot be quantized, or a pattern that does nothing.
    """
    groups: dict[str, list[Tensor]] = defaultdict(list)
    others: dict[str, str] = {}
    for tensor in tensors:
        if group := group_of(tensor):
            groups[group].append(tensor)
        elif module := module_of(tensor.name):
            others[module] = tensor.name
    unservable = {
        group: why for group, members in groups.items() if (why := _unservable(group, members)) is not None
    }
    names = _Names(groups, others) if selection.keep or selection.quantize else None
    kept, notes = {}, []
    for group, members in groups.items():
        if not is_eligible(group, selection.eligibility):
            kept[group] = reason_kept(members[0].name)
    for pattern in selection.quantize:
        found = names.find("--quantize", pattern, notes)
        _require_servable(pattern, found, others, names, unservable)
        for group in found:
            kept.pop(group, None)
    kept |= unservable
    kept |= {group: reason for group, reason in selection.kept_groups if group in groups}
    before = set(kept)
    for pattern in selection.keep:
        found = names.find("--keep_bf16", pattern, notes)
        if found <= before:
            notes.append(f"--keep_bf16 {pattern!r} names only what is kept anyway")
        for group in found:
            kept.setdefault(group, f"named by --keep_bf16 {printable(pattern)}")
    _keep_draft_alike(groups, kept, notes)
    return Decision(kept, tuple(notes))


def _unservable(group: str, members: list[Tensor]) -> str | None:
    """Why engines could not serve a group in FP8, because of any of its members; None if they can."""
    reason = None
    for tensor in members:
        if tensor.dtype not in _QUANTIZABLE:
            raise Fp8Error(
                f"{printable(tensor.name)}: {printable(tensor.dtype)} cannot be quantized; "
                "BF16, F16 and F32 can"
            )
        matrices = matrices_of(tensor)
        why = f"{len(tensor.shape)}-D, not a matrix"
        if matrices:
            why = unservable_shape(group, *matrices[0][1:])
        reason = reason or why
    return reason


def _require_servable(
    pattern: str, found: set[str], others: dict[str, str], names: "_Names", unservable: dict[str, str]
) -> None:
    """Refuse a --quantize pattern of which nothing can be quantized."""
    if not found:
        module = names.other(pattern)
        raise Fp8Error(
            f"--quantize {pattern!r}: {printable(module)} can never be quantized "
            f"({reason_kept(others[module])}); name another module"
        )
    if found <= unservable.keys():
        group = min(found)
        raise Fp8Error(
            f"--quantize {pattern!r}: {printable(group)} cannot be served in FP8 ({unservable[group]}); "
            "leave the pattern out"
        )


def _keep_draft_alike(groups: dict[str, list[Tensor]], kept: dict[str, str], notes: list[str]) -> None:
    """Keep groups of the draft layer that SGLang would take for kept ones of the decoder.

    It matches whole components anywhere in a name, without a leading `model.`: in a text-only checkpoint
    `model.layers.0.mlp.down_proj` in `modules_to_not_convert` is `mtp.layers.0.mlp.down_proj` too.
    """
    for group in list(kept):
        twin = _TEXT_ONLY_LAYER.sub("mtp.", group, count=1) if _TEXT_ONLY_LAYER.match(group) else group
        if twin in groups and twin not in kept:
            kept[twin] = "kept like its namesake in layer 0: SGLang cannot tell the two apart"
            notes.append(
                f"{printable(twin)} is kept too: SGLang takes {printable(group)} in modules_to_not_convert "
                "for both in a text-only checkpoint"
            )


class _Names:
    """Module names that patterns can match.

    Args:
        groups: fusion group -> its tensors.
        others: name of a module that is in no group -> its tensor's.
    """

    def __init__(self, groups: dict[str, list[Tensor]], others: dict[str, str]) -> None:
        self._groups, self._others = groups, others

    def find(self, flag: str, pattern: str, notes: list[str]) -> set[str]:
        """Groups of which a pattern matches a member, or the group's own name.

        Raises:
            Fp8Error: it matches no module at all.
        """
        matches = re.compile(translate(pattern)).match
        found, widened = set(), []
        for group, tensors in self._groups.items():
            if matches(group):
                found.add(group)
                continue
            hits = [bool(matches(module)) for module in _modules(tensors)]
            if any(hits):
                found.add(group)
                if not all(hits):
                    widened.append(group)
        if not found and self.other(pattern) is None:
            example = next(iter(self._groups or self._others), "")
            raise Fp8Error(f"{flag} {pattern!r}: matches no module; names look like {printable(example)}")
        if widened:
            notes.append(
                f"{flag} {pattern!r} takes {len(widened)} fusion groups whole, such as "
                f"{printable(widened[0])}: engines load each as one"
            )
        return found

    def other(self, pattern: str) -> str | None:
        """The first module outside all groups that a pattern matches."""
        matches = re.compile(translate(pattern)).match
        return next((module for module in self._others if matches(module)), None)


def _modules(tensors: list[Tensor]) -> Iterator[str]:
    """Names of the modules that some tensors of one group hold, as they are in the output."""
    for tensor in tensors:
        matrices = matrices_of(tensor)
        for name, *_ in matrices or [(tensor.name,)]:
            yield module_of(name) or name
