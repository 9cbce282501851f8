"""Rounding with the inputs in mind: errors of later input channels take back those of earlier ones.

A layer computes y = W x. With H = mean of x x^T over calibration tokens, a rounding error E = W - W' changes
its outputs by tr(E H E^T) in the mean square. Rounding to nearest makes every E_ij small by itself. Here
columns are rounded one after the other, and a weight is moved first by what the errors made so far predict:

    H + damping = M M^T, M upper triangular;  A_ij = M_ij / M_jj
    adjusted_j = w_j + sum over i < j of e_i A_ij,   code_j = nearest(adjusted_j / scale),   e_j = w_j - w'_j

Then column j of e M is (adjusted_j - w'_j) M_jj: all that is left is the rounding of adjusted weights, in
units of what no later channel tells. This is the rounding of OBQ and GPTQ (arXiv:2208.11580, 2210.17323) in
the form of LDLQ (arXiv:2307.13304, which shows them to be the same): one Cholesky factor of H and no inverse.
Channels come in the order of decreasing H_jj, because those that come late have few left to correct them.
Scales belong to original columns: a column carries its block's scale to its new place.

Rows know nothing of each other, and sums are exact, so that no size of pieces, device or library changes a
code. A is rounded to 2^-21 of its column's largest value, e to 2^-24 of the largest that it can be (|w| + 448
scale, in 128 columns). A product has 45 bits, the sum of 128 of them 52, and float64 holds 53: a matrix
product is right in whichever order it adds. In float32 the order, and so a code now and then, would depend on
the number of rows. The factorization is the one step that owes its last bits to a library; rounding A drops
nearly all of them. With rows as short as a model's, matrix products are a third of the time on a CPU."""

from dataclasses import dataclass

import torch

from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import DTYPE, MAX, dequantize, quantize
from fp8lib.numerics.exact import leading_power, pairwise_sum

_ERROR_BITS, _FEEDBACK_BITS = 24, 21
_LEAF = 16
"""Columns that are corrected by outer products; beyond, matrix products do it."""
_GAIN = 1 - 2.0**-10
"""A row is rounded to nearest unless its output error falls below this share of nearest's: sums of another
order, such as a verifier's, must not see a loss where there is a gain."""
_MINOR = 1 + 1e-4
"""How far |H_ij| may exceed sqrt(H_ii H_jj): H is stored in float32."""
_NEVER = 2.0**100
"""Scale under which no weight becomes anything but 0: for blocks of zeros, which stay so."""


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """What rounding needs of H: M M^T = H + damping, channels in the order of decreasing H_jj.

    Attributes:
        order: int64 [n], original number of the channel at each place.
        feedback: float32 [n, n], A above the diagonal, else 0; every value has 21 bits at most.
        innovation: float64 [n], M_jj^2: variance of channel j that the later ones do not tell.
        damping: what was added to the diagonal.
    """

    order: torch.Tensor
    feedback: torch.Tensor
    innovation: torch.Tensor
    damping: float

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.order, self.feedback, self.innovation))


def factorize(second_moments: torch.Tensor, damping: float) -> Factor:
    """The factor of a matrix of second moments.

    Args:
        second_moments: [n, n], float32 or float64, symmetric; above the diagonal is what counts.
        damping: what is added to the diagonal, as a share of its mean.

    Raises:
        ValueError: says what is wrong with the matrix: not finite, zero, or not positive semidefinite.
    """
    h = second_moments.double()
    diagonal = h.diagonal()
    if not bool(h.isfinite().all()):
        raise ValueError("holds values that are not finite")
    if not bool((diagonal >= 0).all()):
        raise ValueError("not positive semidefinite: it has a negative diagonal element")
    if not bool((diagonal > 0).any()):
        raise ValueError("is zero: no token was seen")
    limit = diagonal.sqrt() * _MINOR
    if not all(bool((row.abs() <= limit * bound).all()) for row, bound in zip(h, limit, strict=True)):
        raise ValueError("not positive semidefinite: two channels correlate by more than 1")
    added = damping * float(diagonal.mean())
    order = diagonal.sort(descending=True, stable=True).indices
    # Cholesky's L is lower triangular; M is L of the reversed order, read backwards.
    backwards = order.flip(0)
    permuted = h.index_select(0, backwards).index_select(1, backwards)
    permuted.diagonal().add_(added)
    lower, info = torch.linalg.cholesky_ex(permuted)
    if int(info):
        raise ValueError("not positive semidefinite, by more than damping makes up for")
    del permuted, h
    pivots = lower.diagonal().clone()
    lower.div_(pivots)
    lower.diagonal().zero_()
    unit = leading_power(lower.abs().amax(dim=0)).mul_(2.0 ** (1 - _FEEDBACK_BITS))
    feedback = _to_multiples(lower, _magic(unit)).flip(0, 1).float()
    return Factor(order, feedback, pivots.square_().flip(0), added)


def with_headroom(scales: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Scales under which corrected weights have room: doubled where a block reaches codes above 224.

    Twice the scale rounds nothing differently but subnormal codes, 2^-14 of the block's largest weight.

    Args:
        scales: BF16 [Rb, Cb].
        amax: float32 [Rb, Cb], largest |w| of each block.
    """
    return torch.where(amax > MAX / 2 * scales.float(), 2 * scales, scales)


def round_rows(weights: torch.Tensor, scales: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Codes of rows of a weight matrix; of each row those of nearest rounding if its output error is no less.

    Args:
        weights: [rows, n], BF16, F16 or F32, rows from a multiple of 128 on.
        scales: [ceil(rows/128), ceil(n/128)], BF16 or F32, positive.
        factor: of the input's second moments, on the same device.

    Returns:
        float8_e4m3fn [rows, n]; anything where weights or scales are not finite.
    """
    rows, columns = weights.shape
    nearest = quantize(weights, scales, saturate=True)
    if rows == 0 or columns == 0:
        return nearest
    grid = _Grid.of(weights, scales, factor.order)
    original = _by_channel(weights, factor.order).double()
    codes, error = _round_columns(original, grid, factor)
    original.sub_(_by_channel(dequantize(nearest, scales), factor.order))
    plain = _output_error(original, factor, grid.magic)
    better = (error < plain * _GAIN)[:, None]
    back = factor.order.argsort()
    codes = codes.view(torch.uint8).index_select(0, back).t()
    return torch.where(better, codes, nearest.view(torch.uint8)).view(DTYPE)


def output_error(differences: torch.Tensor, factor: Factor) -> torch.Tensor:
    """d H d^T of every row d: the mean square by which it changes an output; float64 [rows].

    Args:
        differences: [rows, n]; of weights and what became of them, or the weights themselves.
        factor: of H, on the same device.
    """
    return _output_error(_by_channel(differences.double(), factor.order), factor, None)


def _by_channel(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[rows, n] -> a copy [n, rows] in the factor's order."""
    return values.t().index_select(0, order)


# --- multiples: numbers whose products add up exactly --------------------------------------------


def _magic(unit: torch.Tensor) -> torch.Tensor:
    """Added and taken away again, it leaves a float64 below 2^51 units at the nearest multiple of a unit."""
    return unit * (1.5 * 2.0**52)


def _to_multiples(values: torch.Tensor, magic: torch.Tensor) -> torch.Tensor:
    """Round float64 values to multiples of a unit in place; 0 for the unit leaves them as they are."""
    return values.add_(magic).sub_(magic)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Scales and error units of some rows, in the factor's order of channels.

    Attributes:
        scales: float64 [Cb, rows], by original block of columns.
        block: the original block of each channel.
        magic: float64 [ceil(n/128), rows], for the errors of 128 channels at a time.
    """

    scales: torch.Tensor
    block: list[int]
    magic: torch.Tensor

    @classmethod
    def of(cls, weights: torch.Tensor, scales: torch.Tensor, order: torch.Tensor) -> "_Grid":
        rows = len(weights)
        pool = torch.nn.functional.max_pool2d
        amax = pool(weights.abs().float()[None], BLOCK, ceil_mode=True)[0].double()
        scales = scales.double()
        bound = torch.where(amax > 0, amax + MAX * scales, 0.0)  # of |w - w'|
        in_order = bound[:, order // BLOCK]
        most = pool(in_order[None], (1, BLOCK), ceil_mode=True)[0]
        magic = _magic(leading_power(most) * 2.0 ** (1 - _ERROR_BITS))

        def by_row(per_block: torch.Tensor) -> torch.Tensor:
            return per_block.t().repeat_interleave(BLOCK, dim=1)[:, :rows].contiguous()

        scales = torch.where(amax > 0, scales, _NEVER)
        return cls(by_row(scales), (order // BLOCK).tolist(), by_row(magic))


# --- the work ------------------------------------------------------------------------------------


def _round_columns(original: torch.Tensor, grid: _Grid, factor: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round channel after channel.

    Args:
        original: float64 [n, rows], weights in the factor's order.
        grid: of the same rows.
        factor: whose feedback is used.

    Returns:
        (codes, float8_e4m3fn [n, rows]; output error, float64 [rows]).
    """
    n, rows = original.shape
    codes = torch.empty(n, rows, dtype=DTYPE, device=original.device)
    adjusted = original.clone()
    errors = torch.empty(BLOCK, rows, dtype=torch.float64, device=original.device)
    total = torch.zeros(rows, dtype=torch.float64, device=original.device)
    quotient = torch.empty_like(total)
    scales = grid.scales.unbind()
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        feedback, magic = factor.feedback[start:stop].double(), grid.magic[start // BLOCK]
        e = errors[: stop - start]
        for first in range(start, stop, _LEAF):
            last = min(first + _LEAF, stop)
            leaf, done = adjusted[first:last], first - start
            if done:
                leaf += feedback[:done, first:last].t() @ e[:done]
            rows_of = (original[first:last], leaf, codes[first:last], e[done:], feedback[done:, first:last])
            columns = zip(*(t.unbind() for t in rows_of), grid.block[first:last], strict=False)
            for weight, moved, code, error, onward, block in columns:
                # A dozen calls for a column decide the speed where rows are few: nothing is allocated here.
                torch.div(moved, scales[block], out=quotient).clamp_(-MAX, MAX)
                code.copy_(quotient)
                torch.sub(weight, quotient.copy_(code).mul_(scales[block]), out=error)
                _to_multiples(error, magic)
                leaf.addr_(onward, error)  # `onward` is 0 up to this column
        adjusted[stop:] += feedback[:, stop:].t() @ e
        left = adjusted[start:stop].sub_(original[start:stop]).add_(e)
        total += _weighted_squares(left, factor.innovation[start:stop])
        total -= _weighted_squares(e, torch.full_like(factor.innovation[start:stop], factor.damping))
    return codes, total


def _output_error(differences: torch.Tensor, factor: Factor, magic: torch.Tensor | None) -> torch.Tensor:
    """`output_error` of differences float64 [n, rows] in the factor's order, which it overwrites.

    With `magic`, of `_Grid`, the result is the same for every number of rows.
    """
    n, rows = differences.shape
    total = torch.zeros(rows, dtype=torch.float64, device=differences.device)
    left = differences.clone()
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        feedback, d = factor.feedback[start:stop].double(), differences[start:stop]
        if magic is not None:
            _to_multiples(d, magic[start // BLOCK])
        left[start:] += feedback[:, start:].t() @ d
        total += _weighted_squares(left[start:stop], factor.innovation[start:stop])
        total -= _weighted_squares(d, torch.full_like(factor.innovation[start:stop], factor.damping))
    return total


def _weighted_squares(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over up to 128 channels of weight * value^2, in one order; overwrites values."""
    values.square_().mul_(weights[:, None])
    if len(values) < BLOCK:
        values = torch.nn.functional.pad(values, (0, 0, 0, BLOCK - len(values)))
    return pairwise_sum(values, dim=0)
