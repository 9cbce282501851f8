"""Refuses experts that do not fit together: incomplete, unlike each other, or in two layouts at once."""

from collections import defaultdict

from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.rules import expert_weight, fused_experts_part, fusion_group
from fp8lib.checkpoint.untrusted import printable

_MAX_EXPERTS = 100_000
"""In a checkpoint; 397B-A17B has 31,232. An empty tensor can claim any number of them."""


def check_experts(tensors: list[Tensor]) -> None:
    """Experts of a layer must be complete, alike, and in one layout."""
    fused: dict[str, dict[str, Tensor]] = defaultdict(dict)
    single: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for tensor in tensors:
        if part := fused_experts_part(tensor.name):
            fused[part[0]][part[1]] = tensor
        elif (group := fusion_group(tensor.name)) and group.endswith(".experts"):
            single[group][tensor.name] = tensor
    count = sum(part.shape[0] for parts in fused.values() for part in parts.values() if part.shape)
    if count > 2 * _MAX_EXPERTS:
        raise Fp8Error(
            f"{printable(next(iter(fused)))}: {count // 2:,} experts in all, more than any model has"
        )
    for experts, parts in fused.items():
        if experts in single:
            raise Fp8Error(f"{printable(experts)}: holds fused and single experts; keep one of the two")
        _check_fused(experts, parts)
    for experts, members in single.items():
        _check_single(experts, members)


def _check_fused(experts: str, parts: dict[str, Tensor]) -> None:
    for projection in ("gate_up_proj", "down_proj"):
        if projection not in parts:
            raise Fp8Error(f"{printable(experts)}.{projection}: missing; complete the checkpoint")
        if len(parts[projection].shape) != 3:
            raise Fp8Error(f"{printable(experts)}.{projection}: {parts[projection].shape} is not 3-D")
    up, down = parts["gate_up_proj"], parts["down_proj"]
    if up.shape[1] % 2:
        raise Fp8Error(
            f"{printable(up.name)}: {up.shape[1]} rows cannot be halved into gate_proj and up_proj; "
            "repair the model"
        )
    if (up.shape[0], up.shape[2], up.shape[1] // 2) != down.shape:
        raise Fp8Error(
            f"{printable(experts)}: gate_up_proj {list(up.shape)} and down_proj {list(down.shape)} "
            "do not fit together; repair the model"
        )


def _check_single(experts: str, members: dict[str, Tensor]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    count = 1 + max(int(name[len(experts) + 1 :].split(".")[0]) for name in members)
    for e in range(min(count, len(members))):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = expert_weight(experts, e, projection)
            if name not in members:
                raise Fp8Error(f"{printable(name)}: missing; complete the checkpoint")
            expected = shapes.setdefault(projection, members[name].shape)
            if members[name].shape != expected:
                raise Fp8Error(
                    f"{printable(name)}: {list(members[name].shape)}, "
                    f"but {list(expected)} in the layer's first expert"
                )
    if shapes["gate_proj"] != shapes["up_proj"] or shapes["gate_proj"][::-1] != shapes["down_proj"]:
        raise Fp8Error(
            f"{printable(experts)}: shapes of gate, up and down do not fit: {list(shapes.values())}; "
            "repair the model"
        )
