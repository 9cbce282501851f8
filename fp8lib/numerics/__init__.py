"""The number format, scales and rounding: pure functions of tensors. No files, no names, no flags.

blocks        the block's size
e4m3          codes and scales: quantize, dequantize
modes         the calibration modes and their parameters, without torch
scales        blocks of weights in, one scale per block out
mse           the search for the least squared error among all BF16 scales
powers        the same among powers of two
second_order  rounding with the second moments of the inputs in mind
best          what the best scales lose, and which codes are not the nearest
magnitudes    counts of equal weights, which sums of errors are taken over
served        what engines make of codes and scales that they requantize
lora          adapters added to rows of a weight
sums          checksums of codes and scales that add up
exact         operations that give the same bits everywhere
tables        constants that all threads and streams share

Imports nothing of this project but `Fp8Error`.
"""
