"""Asking a policy again about what a cache holds."""

from __future__ import annotations

from torch import Tensor

from nanokv.cache.protocol import Context


class Tail:
    """The last w queries of one reading layer, for a policy that looks again; none if it asks for none."""

    def __init__(self, w: int, rows: int, ctx: Context):
        self.w = w
        self.q = ctx.empty(rows, ctx.config.num_attention_heads, w, ctx.config.head_dim).zero_()

    def hear(self, q: Tensor, pos: Tensor) -> None:
        """q (B,H,T,D) at pos (B,T). All rows advance together, so the first one's positions name the places."""
        if self.w:
            self.q.index_copy_(2, pos[0, -self.w :] % self.w, q[:, :, -self.w :])

    def ordered(self, row: int, seen: list[int]) -> Tensor:
        """(1,H,w,D): of one row, the oldest first."""
        return self.q[row : row + 1].roll(-(seen[0] % self.w), 2)
