"""Activation statistics: calibration prompts through the real transformers model, what it feeds its weights.

run               one collection, from flags to the file; all refusals that need no model
prompts           the built-in set (prompts.jsonl) or a user's file, as batches of tokens
whole_model       the model in memory, generating
layerwise         one decoder layer in memory at a time; the one that torchrun's ranks share
recording         hooks: what the weights are multiplied with
input_statistics  its sums
coverage          from sums to entries of the file; experts that saw too little
report            progress and the closing summary
memory            how much there is
"""
