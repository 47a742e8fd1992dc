"""vLLM on the CPU with pylora's kernels: a plugin that vLLM finds by its entry point.

`plugin` decides whether to step in, `wrapper` is the class that vLLM makes then, `products` computes what it is asked
for, `token_slots` and `slot_ranks` keep what the kernels are told. The last three import no vLLM.
"""
