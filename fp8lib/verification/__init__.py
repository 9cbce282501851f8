"""What is on disk, measured and judged.

pairing          FP8 weights and the originals they came from
measure          error sums, and what they add up to
measure_outputs  the same of what weights change in outputs
output_error     judging weights by that
kept             tensors that are kept, compared with the input
shard_check      reads one shard back: measures a sample, compares what is kept
directory_check  what is not in the tensors: quantization_config, the index, copied files
reading          rows read back from the disk
restored         weights that were turned back or merged, compared with where they came from
restored_pairing, restored_report   their pairs by name, their summary
sums             the sums over a piece that it adds up
measurement      the record of one weight's figures
bands            zones of a weight
claim            what is known of how codes and scales came about
health           verdict and statement
trial            weights quantized in memory, measured as files are
advice           what was tried: what would FAIL, what helps, in words
findings         all of this about one directory: what summary, reports and advice read
loading          what engines need to load it
report           the summary

May import streaming (to read files), checkpoint and numerics. Does not know how bytes were written.
"""
