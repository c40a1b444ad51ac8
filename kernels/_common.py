"""What the attention kernels share: the split of the keys over programs, the online softmax over a range of keys, and
the merge of splits.

This is flash decoding (Dao et al. 2023, no arXiv id). Each program attends over one range of the keys and writes a
normalised output and its logsumexp; `_merge_splits` joins the outputs of all programs. A program keeps three running
values per query head: m_i, the largest logit so far; l_i, the sum of exp2(logit − m_i); acc, the sum of exp2(logit −
m_i)·v. Logits are base 2: log2(e)/√D is folded into the queries, because exp2 is one instruction and exp is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# decode_quant adds one more for the exact tokens, and 64 is the widest tile that _merge_splits has to load
MAX_SPLITS = 63


def softmax_scale(head_dim: int) -> float:
    """Return what a query is multiplied by, so that q·k is a base-2 logit."""
    return head_dim**-0.5 * LOG2E.value


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name for a torch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def n_splits(n_heads: int, n_slots: int, device: torch.device, per_processor: int, tile: int) -> int:
    """Return in how many ranges each head's slots are read: enough programs to fill the device, but none for less than
    one tile. So a short cache, which is what compression leaves, still fills a large device.

    n_heads counts the KV heads of all rows of the batch. per_processor is how many programs a multiprocessor should
    get. tile is the number of slots that a program reads at a time.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(round(per_processor * processors / n_heads), MAX_SPLITS, triton.cdiv(n_slots, tile)))


def counts_or_mask(length: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return (counts, None) or (None, mask). `length` is either: (B,Hkv) int or (B,Hkv,S) bool, or None."""
    return (None, length) if length is not None and length.dim() == 3 else (length, None)


@triton.jit
def _split_range(n, splits, BLOCK_N: tl.constexpr):
    """Return the slots [start_n, end_n) of this program. Every program gets the same number of whole tiles, the last
    ones fewer.
    """
    split_size = tl.cdiv(tl.cdiv(n, splits), BLOCK_N) * BLOCK_N
    start_n = tl.program_id(0) * split_size
    return start_n, tl.minimum(start_n + split_size, n)


@triton.jit
def _scale_queries(q, scale):
    """Return q · scale in fp32. Inductor passes a Python float as fp64; tl.full makes it fp32, so that the product is
    not fp64.
    """
    return q.to(tl.float32) * tl.full([1, 1], scale, tl.float32)


@triton.jit
def _finite(m_i):
    """Return m_i with −inf replaced by 0. Where every logit is −inf, logit − m_i would be NaN; exp2(−inf − 0) is 0."""
    return tl.where(m_i == float("-inf"), 0.0, m_i)


@triton.jit
def _normaliser(m_i, l_i):
    """Return what acc is divided by, and the base-2 logsumexp. A query that sees no key gets output 0 and logsumexp
    −inf.
    """
    denominator = tl.where(l_i == 0, 1.0, l_i)
    return denominator, tl.where(l_i == 0, float("-inf"), m_i + tl.log2(denominator))


@triton.jit
def _attend_tile(
    q,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_vs,
    start_n,
    end_n,
    mask_ptr,
    key_pos_ptr,
    min_pos,
    logits_ptr,
    m_i,
    l_i,
    acc,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WRITE_SCORES: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Update m_i, l_i and acc with the BLOCK_N slots from start_n on. IS_PARTIAL: the tile may reach beyond end_n."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    mask_d = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM if HEAD_DIM < BLOCK_D else tl.full([1, BLOCK_D], True, tl.int1)
    mask_n = offs_n < end_n if IS_PARTIAL else tl.full([BLOCK_N], True, tl.int1)
    k = tl.load(k_ptr + offs_n[:, None] * stride_ks, mask=mask_n[:, None] & mask_d, other=0.0).to(COMPUTE_DTYPE)
    # "ieee" is for fp32 inputs, here and in every other kernel: the default would round them to TF32. 16-bit inputs
    # are not affected.
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    visible = mask_n
    if HAS_MASK:
        visible = visible & (tl.load(mask_ptr + offs_n, mask=mask_n, other=0) != 0)
    if HAS_WINDOW:
        visible = visible & (tl.load(key_pos_ptr + offs_n, mask=mask_n, other=0) > min_pos)
    if HAS_MASK or HAS_WINDOW or IS_PARTIAL:
        logits = tl.where(visible[None, :], logits, float("-inf"))
    if WRITE_SCORES:
        tl.store(logits_ptr + offs_n[None, :], logits, mask=(offs_m[:, None] < HEADS_PER_KV) & mask_n[None, :])
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    m_safe = _finite(m_new) if HAS_MASK or HAS_WINDOW else m_new
    p, alpha = tl.exp2(logits - m_safe[:, None]), tl.exp2(m_i - m_safe)
    v = tl.load(v_ptr + offs_n[:, None] * stride_vs, mask=mask_n[:, None] & mask_d, other=0.0).to(COMPUTE_DTYPE)
    acc = tl.dot(p.to(COMPUTE_DTYPE), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l_i * alpha + tl.sum(p, 1), acc


@triton.jit
def _attend_range(
    q,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_vs,
    start_n,
    end_n,
    mask_ptr,
    key_pos_ptr,
    min_pos,
    logits_ptr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WRITE_SCORES: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Attend over the slots [start_n, end_n) of one KV head and return m_i, l_i and acc.

    q (BLOCK_M, BLOCK_D) holds the scaled queries. k_ptr and v_ptr (1, BLOCK_D) point at slot 0. logits_ptr (BLOCK_M,
    1) points at the rows to which WRITE_SCORES writes the base-2 logits.
    """
    m_i, l_i = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full_end = (
        start_n + (end_n - start_n) // BLOCK_N * BLOCK_N if end_n > start_n else start_n
    )  # full tiles need no mask
    for tile_n in range(start_n, full_end, BLOCK_N):
        m_i, l_i, acc = _attend_tile(
            q, k_ptr, v_ptr, stride_ks, stride_vs, tile_n, end_n, mask_ptr, key_pos_ptr, min_pos, logits_ptr, m_i, l_i, acc,
            HAS_MASK=HAS_MASK, HAS_WINDOW=HAS_WINDOW, WRITE_SCORES=WRITE_SCORES, IS_PARTIAL=False, HEADS_PER_KV=HEADS_PER_KV,
            BLOCK_M=BLOCK_M, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, BLOCK_N=BLOCK_N, COMPUTE_DTYPE=COMPUTE_DTYPE,
        )  # fmt: skip
    if full_end < end_n:
        m_i, l_i, acc = _attend_tile(
            q, k_ptr, v_ptr, stride_ks, stride_vs, full_end, end_n, mask_ptr, key_pos_ptr, min_pos, logits_ptr, m_i, l_i, acc,
            HAS_MASK=HAS_MASK, HAS_WINDOW=HAS_WINDOW, WRITE_SCORES=WRITE_SCORES, IS_PARTIAL=True, HEADS_PER_KV=HEADS_PER_KV,
            BLOCK_M=BLOCK_M, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, BLOCK_N=BLOCK_N, COMPUTE_DTYPE=COMPUTE_DTYPE,
        )  # fmt: skip
    return m_i, l_i, acc


@triton.jit
def _merge_splits(
    out_part_ptr,
    lse_part_ptr,
    out_ptr,
    lse_ptr,
    splits,
    BLOCK_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join the splits of one query head into its output and its natural logsumexp."""
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    mask_sd = (offs_s[:, None] < splits) & (offs_d[None, :] < HEAD_DIM)
    lse_part = tl.load(lse_part_ptr + row * splits + offs_s, mask=offs_s < splits, other=float("-inf"))
    m_i = tl.max(lse_part, 0)
    weight = tl.exp2(lse_part - _finite(m_i))
    denominator, lse = _normaliser(m_i, tl.sum(weight, 0))
    out_part_ptr += (row * splits + offs_s[:, None]) * HEAD_DIM + offs_d[None, :]
    out = tl.sum(tl.load(out_part_ptr, mask=mask_sd, other=0.0) * weight[:, None], 0) / denominator
    tl.store(out_ptr + row * HEAD_DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    tl.store(lse_ptr + row, lse * LN2)


def merge_splits(out_part: Tensor, lse_part: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join what the programs of one launch wrote, out_part (B,H,splits,D) and lse_part (B,H,splits,1) fp32, into out
    (B,H,1,D) and the natural lse (B,H,1).
    """
    B, H, splits, D = out_part.shape
    _merge_splits[(B * H,)](
        out_part_ptr=out_part,
        lse_part_ptr=lse_part,
        out_ptr=out,
        lse_ptr=lse,
        splits=splits,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        HEAD_DIM=D,
        BLOCK_D=triton.next_power_of_2(D),
    )
