"""nanokv's kernels: attention over compressed caches. Imports torch, triton and the standard library, nothing else.

Every public name here has a plain-torch twin of the same signature in `kernels/reference.py`; `nanokv/ops.py` is the only
module of nanokv that imports this package.
"""

__version__ = "0.0.0"  # transformers probes a PyPI package of this name by its version; without one it fails to import
__all__: list[str] = []
