"""Attention of one new token over quantised tokens and the exact ones beside them, in one pass; K and V are never
dequantised to memory.

K has a scale and a zero point per channel and group of tokens, so they are folded into the query. V has them per
token and run of channels, so they are folded into the weights:

    logit_t = Σ_c (q_c·s_c)·code_tc + Σ_c q_c·z_c, and out_c = Σ_t (p_t·s_t)·code_tc + Σ_t p_t·z_t

The scheme is that of KIVI (arXiv:2402.02750, Algorithm 1). The kernel reads D·(bits of K + bits of V)/8 bytes per
token and KV head, and the scales and zero points.

Codes are planar (`reference.pack`): field j of a word belongs to the j-th quarter of the channels, so each product
over D channels is four products over D/4, and nothing is interleaved. On a GPU two instructions turn two 4-bit codes
into two 16-bit floats: the code's bits become the low mantissa bits of 128 (bf16) or 1,024 (fp16), so each float is
the code plus that bias. The bias times the sum of the rounded factors is subtracted afterwards, which is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import (
    _attend_range,
    _finite,
    _normaliser,
    _scale_queries,
    _split_range,
    counts_or_mask,
    merge_splits,
    n_splits,
    softmax_scale,
    triton_dtype,
)
from kernels.tuning import launch, query_rows

BLOCK_EXACT = 32  # exact tokens per tile


@triton.jit
def _code_quarter(
    words,
    words_ptr,
    mask,
    QUARTER: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    PTX: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Return one quarter of the channels' codes as floats (tokens, D/4). With PTX each float is too large by the bias.

    words holds all four quarters of codes of 2 and 4 bits. Codes of 8 bits have a quarter of the row to themselves
    and are loaded here.
    """
    if BITS == 8:
        words = tl.load(words_ptr + QUARTER * WORDS, mask=mask, other=0)
    if PTX is None:
        return (words if BITS == 8 else (words >> (BITS * QUARTER)) & (2**BITS - 1)).to(COMPUTE_DTYPE)
    PACK: tl.constexpr = 2 if BITS == 4 else 4  # words in a register
    OUT: tl.constexpr = "=r,r" if BITS == 4 else "=&r,=r,r"
    bits = tl.inline_asm_elementwise(PTX[QUARTER], OUT, [words], dtype=tl.int16, is_pure=True, pack=PACK)
    return bits.to(COMPUTE_DTYPE, bitcast=True)


@triton.jit
def _fold_scales(x, scale_ptr, zero_ptr, mask, BITS: tl.constexpr, BIAS: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """Fold scales and zero points into x, and return the factors of the codes and what the zero points add.

    x is a quarter of the queries (rows, D/4), with K's scales per channel, or the weights (rows, tokens), with V's
    scales per token. The products are Σ factor·(code + BIAS) + Σ correction. The correction also replaces the middle
    code times the rounded factor by the middle code times the exact one, so an error of rounding counts with the
    code's distance from the middle, which has either sign.
    """
    scale = tl.load(scale_ptr, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr, mask=mask, other=0.0).to(tl.float32)
    MIDDLE: tl.constexpr = (2**BITS - 1) / 2
    exact = x * scale[None, :]
    factor = exact.to(COMPUTE_DTYPE)
    return factor, x * zero[None, :] + MIDDLE * exact - (BIAS + MIDDLE) * factor.to(tl.float32)


@triton.jit
def _decode_quant_split(
    q_ptr,
    kq_ptr,
    kscale_ptr,
    kzero_ptr,
    vq_ptr,
    vscale_ptr,
    vzero_ptr,
    length_ptr,
    mask_ptr,
    key_pos_ptr,
    query_pos_ptr,
    exact_k_ptr,
    exact_v_ptr,
    exact_length_ptr,
    exact_mask_ptr,
    exact_pos_ptr,
    out_part_ptr,
    lse_part_ptr,
    stride_qb,
    stride_qh,
    stride_kqb,
    stride_kqh,
    stride_kscaleb,
    stride_kscaleh,
    stride_vqb,
    stride_vqh,
    stride_vscaleb,
    stride_vscaleh,
    stride_mb,
    stride_mh,
    stride_pb,
    stride_ph,
    stride_exact_kb,
    stride_exact_kh,
    stride_exact_vb,
    stride_exact_vh,
    stride_exact_mb,
    stride_exact_mh,
    stride_exact_pb,
    stride_exact_ph,
    n_slots,
    n_exact,
    scale,
    sliding_window,
    HAS_LENGTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_EXACT: tl.constexpr,
    HAS_EXACT_LENGTH: tl.constexpr,
    HAS_EXACT_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    V_RUNS: tl.constexpr,
    K_PTX: tl.constexpr,
    K_BIAS: tl.constexpr,
    V_PTX: tl.constexpr,
    V_BIAS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUARTER_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EXACT: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Attend over one range of quantised slots of one KV head, or, in the last split, over the exact slots.

    The grid is (splits, KV heads, batch). QUARTER_DIM is HEAD_DIM/4: the channels that one field of the words covers.
    """
    b, h, n_heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    splits = tl.num_programs(0)
    offs_m, offs_w = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_W)
    query_head = h * HEADS_PER_KV + offs_m
    mask_m = offs_m < HEADS_PER_KV
    part = (b * n_heads * HEADS_PER_KV + query_head) * splits + tl.program_id(0)
    min_pos = tl.load(query_pos_ptr + b) - sliding_window if HAS_WINDOW else 0
    q_ptr += b * stride_qb + query_head[:, None] * stride_qh
    if HAS_EXACT and tl.program_id(0) == splits - 1:
        offs_d = tl.arange(0, BLOCK_D)
        mask_md = mask_m[:, None] & (offs_d[None, :] < HEAD_DIM)
        q = _scale_queries(tl.load(q_ptr + offs_d[None, :], mask=mask_md, other=0.0), scale).to(COMPUTE_DTYPE)
        end_exact = tl.load(exact_length_ptr + b * n_heads + h) if HAS_EXACT_LENGTH else n_exact
        m_i, l_i, acc = _attend_range(
            q,
            exact_k_ptr + b * stride_exact_kb + h * stride_exact_kh + offs_d[None, :],
            exact_v_ptr + b * stride_exact_vb + h * stride_exact_vh + offs_d[None, :],
            HEAD_DIM,
            HEAD_DIM,
            0,
            end_exact,
            exact_mask_ptr + b * stride_exact_mb + h * stride_exact_mh,
            exact_pos_ptr + b * stride_exact_pb + h * stride_exact_ph,
            min_pos,
            out_part_ptr,  # stands in for the logits, which are not written
            HAS_MASK=HAS_EXACT_MASK,
            HAS_WINDOW=HAS_WINDOW,
            WRITE_SCORES=False,
            HEADS_PER_KV=HEADS_PER_KV,
            BLOCK_M=BLOCK_M,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_EXACT,
            COMPUTE_DTYPE=COMPUTE_DTYPE,
        )
        denominator, lse = _normaliser(m_i, l_i)
        out_exact = out_part_ptr + part[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(out_exact, acc / denominator[:, None], mask=mask_md)
        tl.store(lse_part_ptr + part, lse, mask=mask_m)
    else:
        n = tl.load(length_ptr + b * n_heads + h) if HAS_LENGTH else n_slots
        start_n, end_n = _split_range(n, splits - 1 if HAS_EXACT else splits, BLOCK_N)
        mask_w = offs_w < QUARTER_DIM if QUARTER_DIM < BLOCK_W else tl.full([BLOCK_W], True, tl.int1)
        mask_n = tl.full([BLOCK_N], True, tl.int1)  # groups are whole tiles
        mask_mw, mask_nw = mask_m[:, None] & mask_w[None, :], mask_n[:, None] & mask_w[None, :]
        # l_i and V's corrections stay one number per token of a tile, and are summed over tokens after the loop
        m_i, l_tokens = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        q_parts, acc_parts, corrections = (), (), ()  # an entry for each quarter of the channels
        for j in tl.static_range(4):
            q_quarter = tl.load(q_ptr + offs_w[None, :] + j * QUARTER_DIM, mask=mask_mw, other=0.0)
            q_parts += (_scale_queries(q_quarter, scale),)
            acc_parts += (tl.zeros([BLOCK_M, BLOCK_W], tl.float32),)
            corrections += (l_tokens,)
        K_WORDS: tl.constexpr = HEAD_DIM if K_BITS == 8 else QUARTER_DIM
        V_WORDS: tl.constexpr = HEAD_DIM if V_BITS == 8 else QUARTER_DIM
        for tile_n in range(start_n, end_n, BLOCK_N):
            offs_n = tile_n + tl.arange(0, BLOCK_N)
            scales = kscale_ptr + b * stride_kscaleb + h * stride_kscaleh + (tile_n // GROUP_TOKENS) * HEAD_DIM + offs_w
            zeros = kzero_ptr + b * stride_kscaleb + h * stride_kscaleh + (tile_n // GROUP_TOKENS) * HEAD_DIM + offs_w
            k_words = kq_ptr + b * stride_kqb + h * stride_kqh + offs_n[:, None] * K_WORDS + offs_w[None, :]
            k_bits = tl.load(k_words, mask=mask_nw, other=0) if K_BITS != 8 else k_words

            logits, k_correction = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
            for j in tl.static_range(4):
                at = j * QUARTER_DIM
                factor, more = _fold_scales(q_parts[j], scales + at, zeros + at, mask_w, K_BITS, K_BIAS, COMPUTE_DTYPE)
                k_correction += more
                k = _code_quarter(k_bits, k_words, mask_nw, j, K_BITS, QUARTER_DIM, K_PTX, COMPUTE_DTYPE)
                logits = tl.dot(factor, tl.trans(k), logits, input_precision="ieee")
            logits += tl.sum(k_correction, 1)[:, None]

            visible = mask_n
            if HAS_MASK:
                mask = tl.load(mask_ptr + b * stride_mb + h * stride_mh + offs_n, mask=mask_n, other=0)
                visible = visible & (mask != 0)
            if HAS_WINDOW:
                key_pos = tl.load(key_pos_ptr + b * stride_pb + h * stride_ph + offs_n, mask=mask_n, other=0)
                visible = visible & (key_pos > min_pos)
            logits = tl.where(visible[None, :], logits, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(logits, 1))
            m_safe = _finite(m_new) if HAS_MASK or HAS_WINDOW else m_new
            p, alpha = tl.exp2(logits - m_safe[:, None]), tl.exp2(m_i - m_safe)[:, None]
            l_tokens = l_tokens * alpha + p
            m_i = m_new

            scales = vscale_ptr + b * stride_vscaleb + h * stride_vscaleh + offs_n * V_RUNS
            zeros = vzero_ptr + b * stride_vscaleb + h * stride_vscaleh + offs_n * V_RUNS
            v_words = vq_ptr + b * stride_vqb + h * stride_vqh + offs_n[:, None] * V_WORDS + offs_w[None, :]
            v_bits = tl.load(v_words, mask=mask_nw, other=0) if V_BITS != 8 else v_words

            new_acc, new_corrections = (), ()  # Triton assigns to no entry of a tuple
            for j in tl.static_range(4):
                if (j * V_RUNS) % 4 == 0:  # this quarter begins a run
                    at = j * V_RUNS // 4
                    factor, more = _fold_scales(p, scales + at, zeros + at, mask_n, V_BITS, V_BIAS, COMPUTE_DTYPE)
                new_corrections += (corrections[j] * alpha + more,)
                v = _code_quarter(v_bits, v_words, mask_nw, j, V_BITS, QUARTER_DIM, V_PTX, COMPUTE_DTYPE)
                new_acc += (tl.dot(factor, v, acc_parts[j] * alpha, input_precision="ieee"),)
            acc_parts, corrections = new_acc, new_corrections
        denominator, lse = _normaliser(m_i, tl.sum(l_tokens, 1))
        inverse = 1 / denominator[:, None]
        out_quarter = out_part_ptr + part[:, None] * HEAD_DIM + offs_w[None, :]
        for j in tl.static_range(4):
            out = (acc_parts[j] + tl.sum(corrections[j], 1)[:, None]) * inverse
            tl.store(out_quarter + j * QUARTER_DIM, out, mask=mask_mw)
        tl.store(lse_part_ptr + part, lse, mask=mask_m)


def decode_quant(
    q: Tensor,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    length: Tensor | None,
    key_pos: Tensor,
    query_pos: Tensor,
    sliding_window: int | None,
    bits: tuple[int, int],
    exact: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from one new token per row to quantised tokens and exact ones; the twin is `reference.decode_quant`.

    q (B,H,1,D) fp16, bf16 or fp32; k and v: (words, scale, zero) as `quantize` makes them, K with blocks of several
    tokens × 1 channel, V with blocks of 1 token × D/runs channels; length (B,Hkv) int: the number of valid slots per
    head, in whole groups, or (B,Hkv,S) bool: which slots are valid, or None: all; key_pos (B,Hkv,S) and query_pos (B,1)
    int, read only if sliding_window is set; bits: of K and of V, each 2, 4 or 8; exact: (k, v (B,Hkv,N,D), length, which
    need not be in whole groups, key_pos (B,Hkv,N)) of the tokens held in 16 or 32 bits. Returns
    out (B,H,1,D) in q's dtype and lse (B,H,1) fp32 (natural logsumexp; −inf where no key is visible, with out 0).
    Refuses (AssertionError) several tokens, D not divisible by 4, 3 bits, a number of runs that is not 1, 2 or 4, and
    tensors whose last two dimensions are not contiguous. On a GPU a group of K must be divisible by 16.
    """
    B, H, T, D = q.shape
    (kq, kscale, kzero), (vq, vscale, vzero) = k, v
    heads, S, groups, runs = kq.shape[1], kq.shape[2], kscale.shape[2], vscale.shape[3]
    assert T == 1 and D % 4 == 0 and 4 % runs == 0 and 3 not in bits, (q.shape, runs, bits)
    G, group, fast = H // heads, S // groups, q.device.type == "cuda" and q.itemsize == 2
    compute, ptx = unpack_ptx(bits, q.dtype, fast)
    kind = (" of 8 bits" if 8 in bits else "") + (" with runs" if runs > 1 and D > 64 else "")
    how = launch(f"decode_quant{kind}", q.device)
    block_n = min(how.block, group & -group)  # groups are whole tiles
    splits = n_splits(B * heads, S, q.device, how.per_processor, block_n) + int(exact is not None)
    out_part, lse_part = (q.new_empty(B, H, splits, n, dtype=torch.float32) for n in (D, 1))
    out, lse = q.new_empty(B, H, T, D), q.new_empty(B, H, T, dtype=torch.float32)
    exact_k, exact_v, exact_length, exact_pos = exact or (q, q, None, key_pos)
    (counts, mask), (exact_counts, exact_mask) = counts_or_mask(length), counts_or_mask(exact_length)
    planes = kq, kscale, kzero, vq, vscale, vzero
    assert all(x.stride()[2:] == (x.shape[3], 1) for x in planes), [x.stride() for x in planes]
    assert exact_k.stride(2) == exact_v.stride(2) == D or exact is None, (exact_k.stride(), exact_v.stride())
    stride_mb, stride_mh = (0, 0) if mask is None else mask.stride()[:2]
    stride_exact_mb, stride_exact_mh = (0, 0) if exact_mask is None else exact_mask.stride()[:2]
    _decode_quant_split[splits, heads, B](
        q_ptr=q,
        kq_ptr=kq,
        kscale_ptr=kscale,
        kzero_ptr=kzero,
        vq_ptr=vq,
        vscale_ptr=vscale,
        vzero_ptr=vzero,
        length_ptr=lse if counts is None else counts,  # lse stands in for a tensor that a flag switches off
        mask_ptr=lse if mask is None else mask,
        key_pos_ptr=key_pos,
        query_pos_ptr=query_pos,
        exact_k_ptr=exact_k,
        exact_v_ptr=exact_v,
        exact_length_ptr=lse if exact_counts is None else exact_counts,
        exact_mask_ptr=lse if exact_mask is None else exact_mask,
        exact_pos_ptr=exact_pos,
        out_part_ptr=out_part,
        lse_part_ptr=lse_part,
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_kqb=kq.stride(0),
        stride_kqh=kq.stride(1),
        stride_kscaleb=kscale.stride(0),
        stride_kscaleh=kscale.stride(1),
        stride_vqb=vq.stride(0),
        stride_vqh=vq.stride(1),
        stride_vscaleb=vscale.stride(0),
        stride_vscaleh=vscale.stride(1),
        stride_mb=stride_mb,
        stride_mh=stride_mh,
        stride_pb=key_pos.stride(0),
        stride_ph=key_pos.stride(1),
        stride_exact_kb=exact_k.stride(0),
        stride_exact_kh=exact_k.stride(1),
        stride_exact_vb=exact_v.stride(0),
        stride_exact_vh=exact_v.stride(1),
        stride_exact_mb=stride_exact_mb,
        stride_exact_mh=stride_exact_mh,
        stride_exact_pb=exact_pos.stride(0),
        stride_exact_ph=exact_pos.stride(1),
        n_slots=S,
        n_exact=exact_k.shape[2],
        scale=softmax_scale(D),
        sliding_window=sliding_window or 0,
        HAS_LENGTH=counts is not None,
        HAS_MASK=mask is not None,
        HAS_EXACT=exact is not None,
        HAS_EXACT_LENGTH=exact_counts is not None,
        HAS_EXACT_MASK=exact_mask is not None,
        HAS_WINDOW=sliding_window is not None,
        GROUP_TOKENS=group,
        K_BITS=bits[0],
        V_BITS=bits[1],
        V_RUNS=runs,
        **ptx,
        HEADS_PER_KV=G,
        BLOCK_M=query_rows(G, is_packed=True),
        HEAD_DIM=D,
        BLOCK_D=triton.next_power_of_2(D),
        QUARTER_DIM=D // 4,
        BLOCK_W=triton.next_power_of_2(D // 4),
        BLOCK_N=block_n,
        BLOCK_EXACT=BLOCK_EXACT,
        COMPUTE_DTYPE=triton_dtype(compute),
        num_warps=how.warps,
        num_stages=how.stages,
    )
    merge_splits(out_part, lse_part, out, lse)
    return out, lse


def unpack_ptx(bits: tuple[int, int], dtype: torch.dtype, fast: bool) -> tuple[torch.dtype, dict]:
    """Return the dtype in which codes are multiplied, and the K_PTX, V_PTX and *_BIAS arguments of the kernel.

    K_PTX and V_PTX hold an instruction for each quarter of the channels. A mask and an addition in one instruction
    (lop3) put the codes of two numbers into the low mantissa bits of 128 (bf16) or 1,024 (fp16), which is the bias.
    bf16 has only 7 such bits, so 8-bit codes are multiplied as fp16. Without `fast` (in the interpreter, or fp32)
    there is no PTX and no bias.
    """
    compute = torch.float16 if fast and 8 in bits else dtype
    magic, bias = ("0x43004300", 128) if compute == torch.bfloat16 else ("0x64006400", 1024)
    four = "{{ .reg .b32 t; shr.u32 t, $1, {}; lop3.b32 $0, t, 0x000F000F, {}, 0xEA; }}"
    two = "{{ .reg .b32 t, u; shr.u32 t, $2, {}; prmt.b32 u, t, 0, 0x4140; prmt.b32 t, t, 0, 0x4342; lop3.b32 $0, u, 0x00030003, {}, 0xEA; "
    two += "lop3.b32 $1, t, 0x00030003, {}, 0xEA; }}"
    eight = "{{ prmt.b32 $0, $2, 0x64646464, 0x4140; prmt.b32 $1, $2, 0x64646464, 0x4342; }}"
    ptx = {}
    for name, n in zip("KV", bits, strict=True):
        text = {4: four, 2: two, 8: eight}[n]
        ptx[f"{name}_PTX"] = tuple(text.format(n * j, magic, magic) for j in range(4)) if fast else None
        ptx[f"{name}_BIAS"] = bias if fast else 0
    return compute, ptx
