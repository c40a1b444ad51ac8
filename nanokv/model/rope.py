"""Rotary positions (Su et al. 2021, arXiv:2104.09864), rotate-half layout, with linear and Llama-3 scaling.

Angles and the rotation itself are fp32 whatever the model computes in; the result is cast once. Knows positions, no
cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanokv.backends.base import rotate as reference_rotate
from nanokv.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """(D/2,) fp32: how far each pair of channels is rotated per position, in radians."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    inv = 1.0 / config.rope_theta ** (half / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inv
    if scaling.rope_type == "linear":
        return inv / scaling.factor
    # llama3: long wavelengths are stretched by `factor`, short ones stay, and a ramp joins the two
    wavelength = 2 * math.pi / inv
    rotations = scaling.original_max_position_embeddings / wavelength
    ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(inv / scaling.factor, inv, ramp.clamp(0, 1))


def angles(inv: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """pos (B,T) → cos and signed sin (B,T,1,D) fp32, as `rotate` takes them."""
    angle = (pos[..., None].float() * inv)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, angle: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B,T,·,D) by `angles(inv, pos)`; the result has x's dtype. Rotating by −pos undoes it, up to rounding."""
    return reference_rotate(x, *angle)


def rotate_more(q: Tensor, shift: Tensor, inv_freq: Tensor) -> Tensor:
    """Return q (B,H,T,D), already rotated to some positions, as it is `shift` (B,T) positions later."""
    return rotate(q.transpose(1, 2), angles(inv_freq, shift)).transpose(1, 2)


def unrotated(q: Tensor, pos: Tensor, inv_freq: Tensor) -> Tensor:
    """Return q (B,H,T,D), which was rotated to pos (B,T), as it was before its rotation: fp32."""
    return rotate_more(q.float(), -pos, inv_freq)
