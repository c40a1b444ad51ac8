"""Tokens stay that the model needs to repeat the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokv.cache.kept import Prompt
from nanokv.cache.scores import ScoreRequest
from nanokv.policies.scorer import Scorer

FIRST = "\n\nRepeat the previous context exactly.\n"
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
OVERLAP = 8  # how many tokens of the piece before tell where to start


@dataclass(frozen=True, kw_only=True)
class KVzip(Scorer):
    """KVzip (Kim et al. 2025, arXiv:2505.23416): after the prompt, the model is asked to repeat it, and is fed the repetition
    in pieces of `piece` tokens. A token's score is the most attention that one query of its own piece's pass gives it,
    over all query heads of the KV head, in a softmax over the first `sink` tokens, the piece and the pass. No later
    question is needed, so one compressed cache serves many.

    The heads of all layers compete for the budget, as in the released code. The passes feed about as many tokens as the
    prompt has, and the whole prompt's cache is in memory until they end. They stand behind the prompt, so they need room
    in the model's context. Sessions without a tokenizer repeat without instruction. Deviations from the authors' code: the
    instruction stands behind the prompt as it is, without the end of a chat template's turn; each head keeps at least one
    token; scores are fp32, as if the model had no sliding window.

    normed=true weighs a token's score with |W_o v|₂, how far its value can move the layer's output (KVzip+, of kvpress
    0.5.5). Deviations: the norm is the mean over the query heads of the KV head, and the score is not divided by the length
    of the query's hidden state, which a cache does not see.

    sink    first tokens that always stay
    piece   tokens that are repeated in one pass
    normed  whether values count
    """

    sink: int = 4
    piece: int = 2048
    normed: bool = False
    layers: str = "compete"
    heads: str = "ada"
    floor: float = 0.0

    def __post_init__(self):
        if self.sink < 0 or self.piece < 1:
            raise ValueError(f"kvzip:sink={self.sink},piece={self.piece} is out of range; sink ≥ 0, piece ≥ 1")
        if self.every:
            raise ValueError(f"kvzip:every={self.every}: the prompt is scored once; use every=0")
        super().__post_init__()

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(over_group="max", over_queries="max", output_weights=self.normed)

    @property
    def min_budget(self) -> int:
        return max(1, self.sink)

    def passes(self, prompt_len: int) -> int:
        # layers=squeeze may give a layer fewer tokens than the prompt has
        keeps_all = isinstance(self.budget, int) and prompt_len <= self.budget and self.layers != "squeeze"
        return 0 if keeps_all else -(-prompt_len // self.piece)

    def replay(self, tokens: Tensor, i: int, encode: Callable[[str], Tensor]) -> Tensor:
        first = i * self.piece
        instruction = encode(FIRST)
        if i:
            instruction = torch.cat((encode(LATER), tokens[max(0, first - OVERLAP) : first], encode("\n")))
        return torch.cat((instruction, tokens[first : first + self.piece]))

    def scored(self, prompt_len: int, i: int) -> Sequence[tuple[int, int]]:
        first = i * self.piece
        return [(0, min(self.sink, first)), (first, min(first + self.piece, prompt_len))]

    def score(self, p: Prompt) -> Tensor:
        score = p.attention.amax(0, keepdim=True)
        score = score * p.output_norms(2) if self.normed else score
        return score.masked_fill(p.sinks(self.sink), torch.inf)
