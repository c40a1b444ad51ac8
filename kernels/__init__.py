"""nanokv's kernels: attention over compressed caches. Imports torch, triton and the standard library, nothing else.

Every public name here has a plain-torch twin of the same signature in `kernels/reference.py`; `nanokv/ops.py` is the only
module of nanokv that imports this package. Triton is imported with the first kernel that is asked for, not before.
"""

from importlib import import_module
from typing import Any

__version__ = "0.0.0"  # transformers probes a PyPI package of this name by its version; without one it fails to import
HOMES = {
    "add_norm": "rows",
    "append": "writes",
    "compact": "writes",
    "decode": "attention",
    "decode_quant": "codes",
    "decode_ragged": "attention",
    "fetch": "chunks",
    "landmarks": "chunks",
    "linear": "rows",
    "mass": "votes",
    "norm": "rows",
    "quantize": "writes",
    "rebuild": "chunks",
    "swiglu": "rows",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(name)
    return getattr(import_module(f"kernels.{HOMES[name]}"), name)
