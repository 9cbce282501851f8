"""Second-order rounding once more: NumPy in float64, one weight at a time, from GPTQ's description.

Tests compare fp8lib with this. It inverts H, updates all later weights after each column, and has no blocks.
"""

from dataclasses import dataclass

import numpy as np

import e4m3_reference as e4m3


@dataclass(frozen=True)
class Rounded:
    """What came out.

    Attributes:
        values: [rows, n], codes as numbers, before the scale.
        doubt: [rows, n], how far each updated weight was from where its code would have changed, in weights.
    """

    values: np.ndarray
    doubt: np.ndarray


def gptq(weights: np.ndarray, scales: np.ndarray, h: np.ndarray, damping: float) -> Rounded:
    """Round a matrix. arXiv:2210.17323, with channels in the order of decreasing H_jj.

    Args:
        weights: [rows, n].
        scales: [rows, n], the scale of each weight's block.
        h: [n, n].
        damping: share of the mean diagonal.
    """
    n = len(h)
    order = np.argsort(-np.diag(h), kind="stable")
    damped = h[np.ix_(order, order)] + damping * np.mean(np.diag(h)) * np.eye(n)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weights[:, order].astype(np.float64)
    steps = scales[:, order].astype(np.float64)
    values, doubt = np.zeros_like(left), np.zeros_like(left)
    for j in range(n):
        quotient = left[:, j] / steps[:, j]
        values[:, j] = e4m3.nearest(quotient)
        gap = np.abs(np.abs(quotient)[:, None] - e4m3.MIDPOINTS).min(axis=1)
        doubt[:, j] = gap * steps[:, j]
        error = (left[:, j] - values[:, j] * steps[:, j]) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    back = np.argsort(order)
    return Rounded(values[:, back], doubt[:, back])


def output_error(differences: np.ndarray, h: np.ndarray) -> np.ndarray:
    """d H d^T of every row."""
    return np.einsum("ri,ij,rj->r", differences, h, differences)
