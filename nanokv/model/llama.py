"""The Llama family in one file: Llama 1–3.2, Mistral, Qwen2 and 3, SmolLM2, TinyLlama.

The model computes queries, keys and values and calls `layer.attend(q, k, v, pos)`. It does not know what a cache does
with them.

The residual stream and the norms are fp32, so that rounding errors do not add up from block to block. Matrix products are
in the weights' type.

B rows · H query heads · Hkv key/value heads · G = H/Hkv · T new tokens · N tokens held · S slots · D head dim ·
C hidden size · pos position in the row's own text, from 0 · q (B,H,T,D) · k, v (B,Hkv,T,D).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanokv.backends.base import Ops
from nanokv.cache.protocol import Cache, Layer
from nanokv.model.config import ModelConfig
from nanokv.model.rope import angles

# that an MLP takes on a CPU: what lies between its products is several times as large as its input
TOKENS_AT_ONCE = 1024


class Llama(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, ops) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(torch.ones(config.hidden_size), config, ops)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.linear = ops.linear
        self.inv_freq: Tensor | None = None  # (D/2,); the loader sets it, always in fp32

    def output_weights(self) -> tuple[Tensor, ...]:
        """The output projection (C, H·D) of each layer, for caches whose policy measures what a value contributes."""
        return tuple(block.self_attn.o_proj.weight for block in self.layers)

    def embed(self, tokens: Tensor, pos: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """tokens, pos (B,T) → what the first block is given: x (B,T,C) fp32, and cos and signed sin of the rotation."""
        return self.embed_tokens(tokens).float(), angles(self.inv_freq, pos)  # the residual stream stays fp32

    def hidden(self, tokens: Tensor, pos: Tensor, cache: Cache, run: Callable | None = None) -> Tensor:
        """tokens, pos (B,T) → (B,T,C) after the last norm. `run(block, x, pos, angle, layer)`, if given, replaces the
        call of each block, for a prompt's cache that needs the residual stream before each attention.
        """
        x, angle = self.embed(tokens, pos)
        for block, layer in zip(self.layers, cache.layers, strict=True):
            x = block(x, pos, angle, layer) if run is None else run(block, x, pos, angle, layer)
        return self.norm(x, self.lm_head.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…,C) → (…,vocab)."""
        return self.linear(hidden, self.lm_head.weight, None)

    def last_logits(self, x: Tensor) -> Tensor:
        """x (B,T,C) after the last block → logits of the last token (B,vocab)."""
        return self.logits(self.norm(x[:, -1], self.lm_head.weight.dtype))

    def forward(self, tokens: Tensor, pos: Tensor, cache: Cache) -> Tensor:
        """tokens, pos (B,T) → logits of the last token (B,vocab)."""
        return self.logits(self.hidden(tokens, pos, cache)[:, -1])


class Block(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.input_layernorm = RMSNorm(torch.ones(config.hidden_size), config, ops)
        self.self_attn = Attention(config, ops)
        self.post_attention_layernorm = RMSNorm(torch.ones(config.hidden_size), config, ops)
        self.mlp = MLP(config, ops)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrix products, to which the norms round what they give them."""
        return self.mlp.down_proj.weight.dtype

    def forward(self, x: Tensor, pos: Tensor, angle: tuple[Tensor, Tensor], layer: Layer) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x, self.dtype), pos, angle, layer)
        x, h = self.post_attention_layernorm.add_and_norm(x, attended, self.dtype)
        return x + self.mlp(h)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.dim  # q, k and v in one matrix: one pass over x
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=config.o_bias)
        self.q_norm, self.k_norm = (
            (RMSNorm(torch.ones(self.dim), config, ops) for _ in range(2)) if config.qk_norm else (None, None)
        )
        self.linear, self.rotate = ops.linear, ops.rotate

    def forward(self, x: Tensor, pos: Tensor, angle: tuple[Tensor, Tensor], layer: Layer) -> Tensor:
        B, T, _ = x.shape
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        if layer.owns:
            qkv = self.linear(x, weight, bias).view(B, T, -1, self.dim)
            qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), 2)
            if self.q_norm is not None:
                q, k = qk.split((self.heads, self.kv_heads), 2)
                qk = torch.cat((self.q_norm(q, q.dtype), self.k_norm(k, k.dtype)), 2)
            q, k = self.rotate(qk, *angle).split((self.heads, self.kv_heads), 2)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:  # another layer has the keys and values: only the query part of the weight is used
            n = self.heads * self.dim
            q = self.linear(x, weight[:n], None if bias is None else bias[:n]).view(B, T, -1, self.dim)
            q = self.rotate(q if self.q_norm is None else self.q_norm(q, q.dtype), *angle)
            k = v = None
        out = layer.attend(q.transpose(1, 2), k, v, pos)
        return self.linear(out.transpose(1, 2).reshape(B, T, -1), self.o_proj.weight, self.o_proj.bias)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.linear, self.swiglu = ops.linear, ops.swiglu

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.shape[0] * x.shape[1] <= TOKENS_AT_ONCE:
            return self._products(x)
        parts = x.flatten(0, 1).split(TOKENS_AT_ONCE)
        return torch.cat([self._products(part) for part in parts]).view(x.shape)

    def _products(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        return self.linear(self.swiglu(self.linear(x, up.weight, up.bias)), down.weight, down.bias)


class RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, config: ModelConfig, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.eps = config.rms_norm_eps
        self.rms_norm, self.add_rms_norm = ops.rms_norm, ops.add_rms_norm

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The norm of x, rounded to `dtype`."""
        return self.rms_norm(x, self.weight, self.eps, dtype)

    def add_and_norm(self, x: Tensor, delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x + delta, and the norm of that sum, rounded to `dtype`."""
        return self.add_rms_norm(x, delta, self.weight, self.eps, dtype)
