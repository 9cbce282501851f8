"""Files to kernels to files in bounded pieces, overlapped.

pipeline      `process`: shards in, shards out
scheduler     hands pieces to threads, sees shards through their stages
shard_job     one shard under way
convert       what becomes of the rows of a weight
second_order  the same with the second moments of its input
rewrite       rows that are written in the input's precision: turned back from FP8, merged, moved
merging       what adapters make of rows
factors       made of second moments once, and kept
units         how the work is cut up
lanes         what a worker thread works with: buffers, a stream, threads that read ahead and write behind
checksum      SHA-256 of a shard's bytes as they are written
sums          where a shard's own checksums begin, and what they add up to
writer        one output file: temporary name, fsync, rename
direct        direct I/O
devices       which device, how many threads

May import checkpoint and numerics. Knows no verdict: what looks at a finished shard is given as a `Check`.
"""
