"""One token's attention over packed codes and the exact tokens beside them, in one launch; neither K nor V is ever made.

K has a scale and a zero per channel and group of tokens, so they go into the query: x = Σ_c (q_c·s_c)·n_c + Σ_c q_c·z_c. V has them per
token and run of channels, so they go into the weight: o_c = Σ_t (p_t·s_t)·n_tc + Σ_t p_t·z_t (KIVI, arXiv:2402.02750, has the scheme).
Codes are planar (`reference.pack`): field j of a word belongs to the j-th quarter of the channels, so the products are four narrower ones
and nothing is interleaved. Bytes per token and KV head: D·(bits of K + bits of V)/8, and the scales.

4-bit words become numbers by two instructions for two codes: their bits are put into the fraction of 128 (bf16) or 1,024 (fp16),
which adds that number to each; it is taken out again with the sum of the rounded factors, so exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import LOG2E, _merge, _stretch, read, stretches

# Tokens per tile, or a group of K if that is smaller, and programs per multiprocessor. Of blocks 64 and 128, 2, 4 and 8 warps, 2 to 4
# stages, M = 4 and 16 and 2 to 6 programs these were the fastest on an H200 (65,536 tokens, 8 KV heads, G 4: int4 36 us, 53 with 4 warps
# and 3 programs; int8 64 and 80), so were M = G rows instead of 16. With a scale per run of V, 2 warps lack the registers: 4 then
BLOCK, PER_PROCESSOR = 128, 4


@triton.jit
def _quarter(
    words, at, here, J: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr, COMPUTE: tl.constexpr
):
    """Codes of quarter J of the channels as numbers (N,W); with ASM each is too large by the same."""
    if BITS == 8:
        words = tl.load(at + J * W, mask=here, other=0)
    if ASM is None:
        codes = (words if BITS == 8 else (words >> (BITS * J)) & (2**BITS - 1)).to(COMPUTE)
    elif BITS == 4 and COMPUTE == tl.bfloat16:
        codes = tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif BITS == 4:
        codes = tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    elif COMPUTE == tl.bfloat16:
        codes = tl.inline_asm_elementwise(ASM, "=&r,=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        codes = tl.inline_asm_elementwise(ASM, "=&r,=r,r", [words], dtype=tl.float16, is_pure=True, pack=4)
    return codes


@triton.jit
def _scaled(q, ks, kz, here, BITS: tl.constexpr, EXTRA: tl.constexpr, COMPUTE: tl.constexpr):
    """A quarter of the queries (M,WP) with K's scales and zeros → what multiplies codes, and what the zeros add, per channel.

    The zeros count from the middle code on, so that rounding the scaled queries errs with the codes' distance from there, either way.
    """
    scale = tl.load(ks, mask=here, other=0.0).to(tl.float32)
    zero = tl.load(kz, mask=here, other=0.0).to(tl.float32)
    MID: tl.constexpr = (2**BITS - 1) / 2
    state = q * scale[None, :]
    rounded = state.to(COMPUTE)
    return rounded, q * zero[None, :] + MID * state - (EXTRA + MID) * rounded.to(tl.float32)


@triton.jit
def _weighed(p, vs, vz, here, BITS: tl.constexpr, EXTRA: tl.constexpr, COMPUTE: tl.constexpr):
    """Weights (M,N) with a run of V's scales and zeros → what multiplies codes, and what the zeros add, per token; as for K."""
    scale = tl.load(vs, mask=here, other=0.0).to(tl.float32)
    zero = tl.load(vz, mask=here, other=0.0).to(tl.float32)
    MID: tl.constexpr = (2**BITS - 1) / 2
    weight = p * scale[None, :]
    rounded = weight.to(COMPUTE)
    return rounded, p * zero[None, :] + MID * weight - (EXTRA + MID) * rounded.to(tl.float32)


@triton.jit
def _split(
    q,
    kq,
    ks,
    kz,
    vq,
    vs,
    vz,
    length,
    seen,
    kpos,
    now,
    k,
    v,
    held,
    near_pos,
    part,
    part_lse,
    q_b,
    q_h,
    kq_b,
    kq_h,
    ks_b,
    ks_h,
    vq_b,
    vq_h,
    vs_b,
    vs_h,
    seen_b,
    seen_h,
    kpos_b,
    kpos_h,
    k_b,
    k_h,
    v_b,
    v_h,
    held_b,
    held_h,
    near_b,
    near_h,
    S,
    near,
    scale,
    sliding_window,
    GROUP: tl.constexpr,
    LENGTH: tl.constexpr,
    SEEN: tl.constexpr,
    HELD: tl.constexpr,
    WINDOW: tl.constexpr,
    KBITS: tl.constexpr,
    VBITS: tl.constexpr,
    RUNS: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    KX: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    V3: tl.constexpr,
    VX: tl.constexpr,
    NEAR: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    N: tl.constexpr,
    EXACT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    b, h, heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    splits = tl.num_programs(0)
    g, w, j = tl.arange(0, M), tl.arange(0, WP), tl.arange(0, N)
    row = h * G + g
    mine = (b * heads * G + row) * splits + tl.program_id(0)
    since = tl.load(now + b) - sliding_window if WINDOW else 0
    queries = q + b * q_b + row[:, None] * q_h
    if NEAR and tl.program_id(0) == splits - 1:  # the exact tokens
        d = tl.arange(0, DP)
        across = (g[:, None] < G) & (d[None, :] < D)
        state = tl.load(queries + d[None, :], mask=across, other=0.0).to(tl.float32) * tl.full(
            [1, 1], scale, tl.float32
        )
        keys, values = k + b * k_b + h * k_h + d[None, :], v + b * v_b + h * v_h + d[None, :]
        flags, when = held + b * held_b + h * held_h, near_pos + b * near_b + h * near_h
        top, total, out = read(
            state.to(COMPUTE),
            keys,
            values,
            D,
            D,
            0,
            near,
            flags,
            when,
            since,
            part,
            HELD,
            WINDOW,
            False,
            G,
            M,
            D,
            DP,
            EXACT,
            COMPUTE,
        )
        out = out / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(part + mine[:, None] * D + d[None, :], out, mask=across)
        tl.store(
            part_lse + mine,
            tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total))),
            mask=g < G,
        )
    else:
        n = tl.load(length + b * heads + h) if LENGTH else S
        lo, hi = _stretch(n, splits - 1 if NEAR else splits, N)
        own = w < W if W < WP else tl.full([WP], True, tl.int1)
        wide = (g[:, None] < G) & own[None, :]
        f = tl.full([1, 1], scale, tl.float32)
        q0 = tl.load(queries + w[None, :], mask=wide, other=0.0).to(tl.float32) * f
        q1 = tl.load(queries + W + w[None, :], mask=wide, other=0.0).to(tl.float32) * f
        q2 = tl.load(queries + 2 * W + w[None, :], mask=wide, other=0.0).to(tl.float32) * f
        q3 = tl.load(queries + 3 * W + w[None, :], mask=wide, other=0.0).to(tl.float32) * f
        top, each = tl.full([M], float("-inf"), tl.float32), tl.zeros([M, N], tl.float32)  # added up after the loop
        o0, o1 = tl.zeros([M, WP], tl.float32), tl.zeros([M, WP], tl.float32)
        o2, o3 = tl.zeros([M, WP], tl.float32), tl.zeros([M, WP], tl.float32)
        z0, z1, z2, z3 = each, each, each, each
        KW: tl.constexpr = D if KBITS == 8 else W
        VW: tl.constexpr = D if VBITS == 8 else W
        for at in range(lo, hi, N):
            s = at + j
            here = s < hi if LENGTH else tl.full([N], True, tl.int1)  # groups are whole tiles
            both = here[:, None] & own[None, :]
            scales = ks + b * ks_b + h * ks_h + (at // GROUP) * D + w
            zeros = kz + b * ks_b + h * ks_h + (at // GROUP) * D + w
            words = kq + b * kq_b + h * kq_h + s[:, None] * KW + w[None, :]
            bits = tl.load(words, mask=both, other=0) if KBITS != 8 else words
            a, add = _scaled(q0, scales, zeros, own, KBITS, KX, COMPUTE)
            x = tl.dot(a, tl.trans(_quarter(bits, words, both, 0, KBITS, W, K0, COMPUTE)), input_precision="ieee")
            a, more = _scaled(q1, scales + W, zeros + W, own, KBITS, KX, COMPUTE)
            add += more
            x = tl.dot(a, tl.trans(_quarter(bits, words, both, 1, KBITS, W, K1, COMPUTE)), x, input_precision="ieee")
            a, more = _scaled(q2, scales + 2 * W, zeros + 2 * W, own, KBITS, KX, COMPUTE)
            add += more
            x = tl.dot(a, tl.trans(_quarter(bits, words, both, 2, KBITS, W, K2, COMPUTE)), x, input_precision="ieee")
            a, more = _scaled(q3, scales + 3 * W, zeros + 3 * W, own, KBITS, KX, COMPUTE)
            x = tl.dot(a, tl.trans(_quarter(bits, words, both, 3, KBITS, W, K3, COMPUTE)), x, input_precision="ieee")
            x += tl.sum(add + more, 1)[:, None]
            if SEEN:
                here = here & (tl.load(seen + b * seen_b + h * seen_h + s, mask=here, other=0) != 0)
            if WINDOW:
                here = here & (tl.load(kpos + b * kpos_b + h * kpos_h + s, mask=here, other=0) > since)
            x = tl.where(here[None, :], x, float("-inf"))
            above = tl.maximum(top, tl.max(x, 1))
            finite = tl.where(above == float("-inf"), 0.0, above) if SEEN or WINDOW else above
            p, fade = tl.exp2(x - finite[:, None]), tl.exp2(top - finite)
            over = fade[:, None]
            each = each * over + p
            top = above
            scales = vs + b * vs_b + h * vs_h + s * RUNS
            zeros = vz + b * vs_b + h * vs_h + s * RUNS
            words = vq + b * vq_b + h * vq_h + s[:, None] * VW + w[None, :]
            bits = tl.load(words, mask=both, other=0) if VBITS != 8 else words
            ever = s < hi if LENGTH else tl.full([N], True, tl.int1)
            a, add = _weighed(p, scales, zeros, ever, VBITS, VX, COMPUTE)
            z0 = z0 * over + add
            o0 = tl.dot(a, _quarter(bits, words, both, 0, VBITS, W, V0, COMPUTE), o0 * over, input_precision="ieee")
            if RUNS == 4:
                a, add = _weighed(p, scales + 1, zeros + 1, ever, VBITS, VX, COMPUTE)
            z1 = z1 * over + add
            o1 = tl.dot(a, _quarter(bits, words, both, 1, VBITS, W, V1, COMPUTE), o1 * over, input_precision="ieee")
            if RUNS > 1:
                a, add = _weighed(p, scales + RUNS // 2, zeros + RUNS // 2, ever, VBITS, VX, COMPUTE)
            z2 = z2 * over + add
            o2 = tl.dot(a, _quarter(bits, words, both, 2, VBITS, W, V2, COMPUTE), o2 * over, input_precision="ieee")
            if RUNS == 4:
                a, add = _weighed(p, scales + 3, zeros + 3, ever, VBITS, VX, COMPUTE)
            z3 = z3 * over + add
            o3 = tl.dot(a, _quarter(bits, words, both, 3, VBITS, W, V3, COMPUTE), o3 * over, input_precision="ieee")
        total = tl.sum(each, 1)
        over = 1 / tl.where(total == 0, 1.0, total)[:, None]
        here = part + mine[:, None] * D + w[None, :]
        tl.store(here, (o0 + tl.sum(z0, 1)[:, None]) * over, mask=wide)
        tl.store(here + W, (o1 + tl.sum(z1, 1)[:, None]) * over, mask=wide)
        tl.store(here + 2 * W, (o2 + tl.sum(z2, 1)[:, None]) * over, mask=wide)
        tl.store(here + 3 * W, (o3 + tl.sum(z3, 1)[:, None]) * over, mask=wide)
        tl.store(
            part_lse + mine,
            tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total))),
            mask=g < G,
        )


def decode_quant(
    q: Tensor,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    length: Tensor | None,
    kpos: Tensor,
    now: Tensor,
    sliding_window: int | None,
    bits: tuple[int, int],
    near: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.decode_quant` for one token (T = 1). On a GPU groups are of 16 tokens or more; V has one, two or four runs."""
    B, H, T, D = q.shape
    (kq, ks, kz), (vq, vs, vz) = k, v
    heads, S, groups, runs = kq.shape[1], kq.shape[2], ks.shape[2], vs.shape[3]
    assert T == 1 and D % 4 == 0 and 4 % runs == 0 and 3 not in bits, (q.shape, runs, bits)
    G, group, fast = H // heads, S // groups, q.device.type == "cuda" and q.itemsize == 2
    compute, asm = unpacking(bits, q.dtype, fast)
    splits = stretches(B * heads, S, q.device, PER_PROCESSOR) + (near is not None)
    M, DP, WP = triton.next_power_of_2(G), triton.next_power_of_2(D), triton.next_power_of_2(D // 4)
    part, part_lse = (q.new_empty(B, H, splits, n, dtype=torch.float32) for n in (D, 1))
    out, lse = q.new_empty(B, H, T, D), q.new_empty(B, H, T, dtype=torch.float32)
    seen = length if length is not None and length.dim() == 3 else None
    counts = None if seen is not None else length
    kn, vn, held, near_pos = near or (q, q, None, kpos)
    assert all(x.stride()[2:] == (x.shape[3], 1) for x in (kq, ks, kz, vq, vs, vz)), [x.stride() for x in (*k, *v)]
    assert kn.stride(2) == vn.stride(2) == D or near is None, (kn.stride(), vn.stride())
    some = (lse if x is None else x for x in (counts, seen))
    strides = [
        n
        for x in (q, kq, ks, vq, vs, seen, kpos, kn, vn, held, near_pos)
        for n in ((0, 0) if x is None else x.stride()[:2])
    ]
    _split[splits, heads, B](
        q, kq, ks, kz, vq, vs, vz, *some, kpos, now, kn, vn, lse if held is None else held, near_pos, part, part_lse,
        *strides, S, kn.shape[2], D**-0.5 * LOG2E, sliding_window or 0, group,
        LENGTH=counts is not None, SEEN=seen is not None, HELD=held is not None, WINDOW=sliding_window is not None,
        KBITS=bits[0], VBITS=bits[1], RUNS=runs, **asm,
        NEAR=near is not None, G=G, M=M, D=D, DP=DP, W=D // 4, WP=WP, N=min(BLOCK, group & -group), EXACT=32,
        COMPUTE=getattr(tl, str(compute).removeprefix("torch.")),
        num_warps=4 if runs > 1 and D > 64 else 2, num_stages=2 if 8 in bits else 3,
    )  # fmt: skip
    _merge[(B * H,)](part, part_lse, out, lse, splits, SP=triton.next_power_of_2(splits), D=D, DP=DP)
    return out, lse


def unpacking(bits: tuple[int, int], dtype: torch.dtype, fast: bool) -> tuple[torch.dtype, dict]:
    """In which type codes are multiplied, and the PTX that makes them numbers of that type, with what these are too large by.

    A field's bits become the low ones of 128 (bf16) or of 1,024 (fp16), which is a mask and an addition in one for two numbers. bf16 has
    room for 7 bits there, so codes of 8 are multiplied as fp16.
    """
    compute = torch.float16 if fast and 8 in bits else dtype
    magic, extra = ("0x43004300", 128) if compute == torch.bfloat16 else ("0x64006400", 1024)
    four = "{{ .reg .b32 t; shr.u32 t, $1, {}; lop3.b32 $0, t, 0x000F000F, {}, 0xEA; }}"
    two = "{{ .reg .b32 t, u; shr.u32 t, $2, {}; prmt.b32 u, t, 0, 0x4140; prmt.b32 t, t, 0, 0x4342; lop3.b32 $0, u, 0x00030003, {}, 0xEA; "
    two += "lop3.b32 $1, t, 0x00030003, {}, 0xEA; }}"
    eight = "{{ prmt.b32 $0, $2, 0x64646464, 0x4140; prmt.b32 $1, $2, 0x64646464, 0x4342; }}"
    asm = {}
    for x, n in zip("KV", bits, strict=True):
        text = {4: four, 2: two, 8: eight}[n]
        asm |= {f"{x}{j}": text.format(n * j, magic, magic) if fast else None for j in range(4)}
        asm[f"{x}X"] = extra if fast else 0
    return compute, asm
