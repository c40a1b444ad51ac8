"""nanokv's kernels: attention over compressed caches in Triton. Imports torch, triton and the standard library,
nothing else.

Every public name here has a plain-torch twin of the same signature in `kernels/reference.py`, which is its oracle. Of
nanokv only `nanokv/backends/` imports this package. Triton is imported when the first kernel is asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.0.0"  # transformers probes a PyPI package of this name by its version; without one it fails to import
HOMES = {
    "add_rms_norm": "norm",
    "append": "kv_write",
    "attention_scores": "scores",
    "compact": "kv_write",
    "decode": "decode",
    "decode_quant": "decode_quant",
    "decode_ragged": "decode",
    "fetch_chunks": "shadowkv",
    "landmark_scores": "shadowkv",
    "linear": "gemv",
    "quantize": "kv_write",
    "rebuild_keys": "shadowkv",
    "rms_norm": "norm",
    "rotate": "rope",
    "swiglu": "norm",
    "take_lowest": "kv_write",
    "take_slots": "kv_write",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    """Import the module of a kernel, and bind the kernels of that module here: `decode` the function replaces
    `decode` the module.
    """
    if name not in HOMES:
        raise AttributeError(name)
    module = import_module(f"kernels.{HOMES[name]}")
    globals().update({kernel: getattr(module, kernel) for kernel, home in HOMES.items() if home == HOMES[name]})
    return globals()[name]
