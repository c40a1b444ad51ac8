"""The functions that models and caches compute with. Only these modules import kernels."""

from nanokv.backends.torch_cpu import SDPA
from nanokv.backends.torch_ops import EAGER

BACKENDS = {"eager": EAGER, "sdpa": SDPA}  # `triton_for` in triton.py makes the third; llm.py calls it
