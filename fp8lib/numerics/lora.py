"""Merging a low-rank adapter into rows of a weight: W' = W + scaling * B @ A.

LoRA (https://arxiv.org/abs/2106.09685) trains A [r, in] and B [out, r] beside a frozen W [out, in];
scaling is alpha / r, or alpha / sqrt(r) in its rank-stabilized form (https://arxiv.org/abs/2312.03732).

The result is meant to equal, bit for bit, what PEFT's `merge_and_unload` gives on a CPU, and must not
depend on how W is cut into rows. So the product is made as PEFT makes it, by the BLAS that torch calls, in
float32, and the sum is rounded once to W's dtype. A BLAS promises no order of additions. Those that torch
is built with add along r from first to last, whatever the number of rows, but take another way for a
single row. So the product is always of the same 128 rows of B, and a last tile of one row is made as one
of two. That gave PEFT's own bits for all shapes and ranks tried (`tests/test_lora_numerics.py`), save that
for a weight of one row (`shared_expert_gate`) and ranks from 256 on PEFT's result itself changes with the
number of threads.

What PEFT wraps as a parameter (`target_parameters`: experts, router) and embeddings it treats otherwise:
there the product is rounded to W's dtype before the sum is.
"""

import torch

from fp8lib.numerics.blocks import BLOCK


def merge_rows(
    rows: torch.Tensor, first: int, a: torch.Tensor, b: torch.Tensor, scaling: float, *, rounded: bool
) -> None:
    """Add an adapter to rows of a matrix, in place.

    Args:
        rows: [n, in], BF16, F16 or F32, on the CPU.
        first: number of the first of them, a multiple of 128.
        a: float32 [r, in].
        b: float32 [out, r], for all rows of the matrix.
        scaling: of the product.
        rounded: round the product to the dtype of the rows first, too.
    """
    for start in range(0, len(rows), BLOCK):
        tile = rows[start : start + BLOCK]
        begin = first + start
        product = _at_least_two_rows(b, begin, begin + len(tile)) @ a
        delta = product[: len(tile)] * scaling
        tile += delta.to(tile.dtype) if rounded else delta


def merge_embedding_rows(
    rows: torch.Tensor, first: int, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> None:
    """The same for an embedding, whose factors PEFT keeps the other way round; the product is rounded first.

    Args:
        rows: [n, width], rows of tokens, as `merge_rows`.
        first: as `merge_rows`.
        a: float32 [r, tokens].
        b: float32 [width, r].
        scaling: of the product.
    """
    for start in range(0, len(rows), BLOCK):
        tile = rows[start : start + BLOCK]
        begin = first + start
        product = b @ _at_least_two_rows(a.T, begin, begin + len(tile)).T
        tile += (product[:, : len(tile)] * scaling).T.to(tile.dtype)


def _at_least_two_rows(factor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Rows begin..end; a single one twice, unless it is all there is: its product would round otherwise."""
    if end - begin == 1 and len(factor) > 1:
        return factor[begin:end].expand(2, -1).contiguous()
    return factor[begin:end]


def unstack_experts(a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of all experts of a layer, which PEFT keeps as two matrices, expert by expert.

    Args:
        a: [experts * r, in], an expert's rows together.
        b: [out, r * experts], a rank's columns together.
        experts: how many.

    Returns:
        ([experts, r, in], [experts, out, r]), contiguous.
    """
    split = b.reshape(b.shape[0], -1, experts)
    return a.reshape(experts, -1, a.shape[1]).contiguous(), split.permute(2, 0, 1).contiguous()
