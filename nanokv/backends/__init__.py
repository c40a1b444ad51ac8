"""The functions that models and caches compute with. Only these modules import kernels."""

from nanokv.backends.torch_cpu import SDPA
from nanokv.backends.torch_ops import EAGER

BACKENDS = {"eager": EAGER, "sdpa": SDPA}  # `choose` in choose.py also knows triton, and what a GPU gets
