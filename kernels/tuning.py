"""How kernels are launched, by compute capability. `python -m evals.gpu --stages tune` times candidates on a card and
prints the fastest for this table.

9.0 was measured on an H200 (16,384 and 65,536 tokens, 8 KV heads, G = 4): decode in 23.3 us, 24.7 with 4 warps and 3
programs; decode_quant of int4 in 36 us, 53 with 4 warps and 3 programs; linear of 4,096 x 4,096 at 3.1 TB/s, 2.9 with
8 rows of 512. No other card has been measured: each takes what the nearest older one in the
table has, and cards older than all of them the oldest one's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """block: slots that a program reads at a time; of `linear`, columns of the matrix. per_processor: how many programs
    each multiprocessor should get; of `linear`, how many rows of the matrix a program computes.
    """

    block: int
    warps: int
    stages: int
    per_processor: int


TABLE: dict[tuple[str, int], Launch] = {
    ("decode", 90): Launch(64, 2, 3, 2),
    ("decode of 8 bits", 90): Launch(64, 4, 3, 2),  # they need the registers of 4 warps
    ("decode_quant", 90): Launch(128, 2, 3, 4),
    ("decode_quant of 8 bits", 90): Launch(128, 2, 2, 4),
    ("decode_quant with runs", 90): Launch(128, 4, 3, 4),  # with a scale per run of V, 2 warps lack the registers
    ("decode_quant of 8 bits with runs", 90): Launch(128, 4, 2, 4),
    ("linear", 90): Launch(2048, 4, 3, 4),
}


def launch(kernel: str, device: torch.device) -> Launch:
    """Return how to launch a kernel on this device."""
    known = sorted(capability for name, capability in TABLE if name == kernel)
    older = [capability for capability in known if capability <= capability_of(device)]
    return TABLE[kernel, (older or known)[-1 if older else 0]]


def capability_of(device: torch.device) -> int:
    """Return the compute capability of a CUDA device as in sm_90: 90. Without one, 90."""
    if device.type != "cuda":
        return 90
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


def query_rows(group: int, is_packed: bool) -> int:
    """Return the rows of a product with the queries of one KV head, a power of two.

    An instruction of the tensor cores takes 16 rows, so 16 cost no more than a group of 4 and need fewer instructions:
    13.2 for each cached token instead of 17.1 (sm_90, compiled). Where codes are unpacked, the registers of the other
    12 rows are missing, and the group alone was the fastest on an H200.
    """
    rows = 1 << (group - 1).bit_length()
    return rows if is_packed else max(16, rows)
