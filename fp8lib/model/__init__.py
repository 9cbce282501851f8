"""Forward passes through the real transformers model: prompts, the whole model, or one layer at a time.

prompts         the built-in set (prompts.jsonl) or a user's file, as batches of tokens
whole_model     the model in memory, generating
layerwise       one decoder layer in memory at a time, of one model or of several that are compared
stored_weights  where a checkpoint has the text model's tensors, and reading them into a layer
internals       the few places where transformers has no public way in
memory          how much there is
progress        prompts and tokens per second

May import streaming, checkpoint and numerics. Knows no statistics: an observer is given to it.
"""
