"""Comparing what two models say: a BF16 checkpoint and FP8 directories made from it.

layers      one decoder layer as an engine computes it with a directory's weights, in float32
head        the last norm and the output head, a slice of the vocabulary at a time: what each model predicts
comparison  prompts through all models, and what came out
figures     KL divergence, top token, token probabilities, perplexity, with their standard errors
report      prints them

May import model, verification, streaming, checkpoint and numerics. Knows no statistics of activations.
"""
