"""Each head keeps what it attends to: special tokens, punctuation, frequent tokens, recent ones, or everything."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nanokv.cache.budget import Workload, check_budget
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import ScoreRequest, rounded
from nanokv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class FastGen(Policy):
    """FastGen (Ge et al. 2023, arXiv:2310.01801, §3): every head is profiled on the prompt once. Of five sets of tokens,
    each of which contains the one before, it keeps the first one that recovers `recovery` of its attention:

    special tokens and sinks; these and punctuation; these and the `frequent` tokens of highest attention scores; these and
    the last `local` tokens; everything.

    What a set recovers is the mean, over the prompt's queries, of the attention that they give to it. A local token counts
    for the queries to which it is local: those that stand at most as many tokens behind it.
    Deviations: a KV head is profiled by the mean of its query heads; the set is fixed at the prompt's end, and generated
    tokens all stay, where the authors go on evicting; the first `sink` tokens stay in any case.

    recovery  what share of a head's attention must be kept; 1: all tokens
    frequent  how many tokens of highest scores: a number, or a percentage of the prompt
    local     how many last tokens: a number, or a percentage of the prompt
    sink      first tokens that always stay
    """

    recovery: float = 0.95
    frequent: int | str = "30%"
    local: int | str = "30%"
    sink: int = 4
    request = ScoreRequest(last_queries=None)
    default_store = "ragged"
    wants_token_kinds = True

    def __post_init__(self):
        if not 0 <= self.recovery <= 1 or self.sink < 0:
            raise ValueError(
                f"fastgen:recovery={self.recovery},sink={self.sink} is out of range; recovery 0 … 1, sink ≥ 0"
            )
        check_budget(self.frequent, 1, "frequent counts tokens")
        check_budget(self.local, 1, "the last token is local to itself")

    @property
    def second_request(self) -> ScoreRequest:
        return ScoreRequest(last_queries=None, near=self.local if isinstance(self.local, int) else 1)

    def fit(self, work: Workload) -> FastGen:
        return replace(self, frequent=work.tokens(self.frequent, 1), local=work.tokens(self.local, 1))

    def keep(self, p: Prompt) -> Kept:
        paid, near = (x.mean(0, keepdim=True) / p.n_queries for x in (p.attention, p.second_attention))  # (1,Hkv,N)
        kinds = torch.zeros_like(p.pos) if p.token_kinds is None else p.token_kinds[p.pos.long()]
        special = p.sinks(self.sink) | (kinds == 1)
        punctuation = special | (kinds == 2)
        rank = (
            rounded(paid)
            .masked_fill(punctuation, -torch.inf)
            .argsort(dim=-1, descending=True, stable=True)
            .argsort(dim=-1)
        )
        frequent = punctuation | (rank < self.frequent)
        sets = [special, punctuation, frequent, frequent | p.recent(self.local), torch.ones_like(special)]
        recovered = [(paid * tokens).sum(-1) for tokens in sets]
        recovered[3] = recovered[2] + (near * ~frequent).sum(-1)
        enough = torch.stack(recovered) >= self.recovery  # (5,1,Hkv)
        enough[:4] &= self.recovery < 1
        enough[4] = True
        stays = torch.stack(sets).gather(0, enough.int().argmax(0)[None, ..., None].expand(1, *special.shape))[0]
        return Kept.top(p, stays.float(), stays.sum(-1))
