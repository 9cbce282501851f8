"""What is in a checkpoint directory and what will be in the output. Reads no tensor data, imports no torch.

untrusted        names, links and JSON that may lie
headers          one safetensors file's header
directory        one checkpoint directory
rules            which tensor is quantized, which is kept and why, what engines fuse; what a user can select
experts          whether a layer's experts fit together
layout           every byte's place in an output shard
selection        which fusion groups stay as they are
matching         how each engine reads `modules_to_not_convert`
tensor_parallel  which tensor-parallel sizes load, and what each GPU holds
plan             the whole output, decided from headers
adapters         PEFT adapters, and what of them can be merged
adapter_targets  which weights an adapter's tensors belong to
merged_plan      a plan whose weights get adapters merged into them
dequantize_plan  the output of turning an FP8 checkpoint back into BF16

May import `numerics.blocks`, which is free of torch too.
"""
