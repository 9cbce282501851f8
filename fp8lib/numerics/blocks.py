"""The block: 128x128 weights that share a scale."""

BLOCK = 128
"""Rows and columns of a block: one scale for each 128x128 of a weight."""


def blocks(extent: int) -> int:
    """Number of 128-wide blocks that cover `extent` elements; the last may be partial."""
    return -(-extent // BLOCK)
