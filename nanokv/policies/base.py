"""What every policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from nanokv.cache.budget import Case
from nanokv.cache.kept import Kept, Prompt
from nanokv.cache.scores import Ask
from nanokv.cache.slots import Slots


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Which tokens of a layer stay. Holds hyper-parameters only, never tensors; one instance serves every layer.

    Class attributes (not fields): `ask`, the prompt statistics wanted; `watches`, the statistics wanted of each decode
    step; `sink`, how many first tokens never leave; `demotes`, whether what it drops goes on as `Kept.rest`, and `once`,
    whether it judges a token once and never again; `wait`, how many tokens after the prompt still belong to the dense prompt
    before `keep` is asked; `every`, after how many tokens `keep` is asked again about what is held then (0: never); `positions`,
    absolute | cache: whether slots behind the sinks push them away or not (see `Store.read`); `store`, the one that suits it
    where a plan names none.
    """

    ask = Ask()
    watches = None  # un-annotated on purpose: annotated, it would become a field of every policy
    wait = 0
    every = 0
    positions = "absolute"
    store = "dense"
    demotes = False
    once = False
    whole = False  # whether a layer keeps all of a prompt or only its edges
    sink = 0

    @property
    def again(self) -> Ask:
        """What is asked when it looks again after `every` tokens."""
        return self.ask

    @property
    def singly(self) -> bool:
        """Whether single tokens leave while decoding, others than the oldest behind the sinks."""
        return bool(self.every or self.watches) or type(self).slot is not Policy.slot

    def fit(self, case: Case) -> Policy:
        """This policy with percents, bytes and family thresholds turned into numbers. ValueError if it cannot."""
        return self

    def with_budget(self, budget: int | str) -> Policy:
        """This policy under a kept budget (`--kv-budget`)."""
        raise ValueError("this policy takes no budget; use one with budget= (see --list-policies)")

    def holds(self, n: int) -> int:
        """At most how many tokens of a prompt of n a KV head keeps, once fitted: for size estimates before the run."""
        return n

    @abstractmethod
    def keep(self, p: Prompt) -> Kept:
        """What stays of one layer of one prompt."""

    def settle(self, kept: dict[int, Kept]) -> dict[int, Kept]:
        """Called after each owner with what all owners so far kept; identity but for rules across layers."""
        return kept

    def slot(self, s: Slots, pos: Tensor) -> Tensor:
        """(B,Hkv,T): where the tokens at pos (B,T) go."""
        return s.ring(pos.shape[1])

    def watch(self, s: Slots, votes: Tensor, pos: Tensor) -> Tensor:
        """What each reader's query at pos (B,1) paid to the first n slots, votes (readers,B,Hkv,n) → what `s.votes` shall be there.

        Only called if the policy `watches`.
        """
        return votes.sum(0)
