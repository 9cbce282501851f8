"""One run of a script, from its flags to its result. The only package that knows flags.

run         what every run of quantize_fp8.py has in common: the plan, the ranks' shares, the summary
quantizing  quantize a checkpoint, or continue
dequantizing  what --dequantize has of its own
verifying   --verify_only
trying      passes over the input in memory: what would FAIL, what would help
recorded    a finished directory against its own manifest
checksums   SHA256SUMS
ending      the last lines of a run
dry_run     --dry_run
rounding    --rounding: second moments to round with
comparing   --compare_outputs
collecting  one run of collect_activation_stats.py
moments     its second moments: sizes, limits, what ranks join
forward_passes  what collecting and comparing need first: transformers, tokens, memory
progress    the bar
manifest    what a run did, so that the next can continue it
output_dir  whose the output directory is, what may be removed, the lock
ranks       the processes that torchrun started

May import every other package.
"""
