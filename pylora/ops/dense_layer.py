"""A dense LoRA layer's forward as one call: csrc/binding/dense_layer.cpp reads the layer's modules and calls the ops.

In Python the walk over a layer's modules takes 15 us where a weight of some MB has passed through the caches since the
last one, a seventh of a decode step's product at width 1024; in C++ 3. torch.compile cannot trace the call:
`pylora/layers/fused.py` says the same in Python for it.
"""

from pylora._native import C

dense_forward = C.dense_forward
dense_mixed_forward = C.dense_mixed_forward
register_dora = C.register_dora
