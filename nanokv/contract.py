"""The one page to read: what a model sees of a cache, what a policy sees of a prompt, what a store must do.

A compressed cache is keep × store × share: which tokens stay (`Policy`), how they lie in memory and are read (`StoreSpec`,
`Store`), which layers own storage (a map in `plan.py`). Between prefill and decode passes a plain value, `Kept`.
This module knows no method by name and imports nothing of nanokv's when it runs. Shapes follow the legend at the top of `model.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nanokv.slots import Slots

# ---- what the model sees -------------------------------------------------------------------------------------------


class Layer(Protocol):
    """One layer's side of a cache."""

    owns: bool  # False: the layer reads another one's keys and values; the model then skips k_proj, v_proj, their RoPE

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, pos: Tensor) -> Tensor:
        """q (B,H,T,D), k and v (B,Hkv,T,D) rotated to pos (B,T) → (B,H,T,D). k and v are None where `owns` is False."""


class Cache(Protocol):
    layers: Sequence[Layer]  # zipped with the model's layers; no layer index enters the model


# ---- what a policy asks for, sees and returns ----------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """Attention statistics a policy wants, as data; `ops.mass` serves them all.

    rows: how many of the last prompt queries vote; 0 nobody, None all. group: how the G query heads of a KV head vote
    together: mean | max. stat: what a key gets from them: sum, the attention received; low, by how many queries it was given less
    than an even share; hit, one more than the position of the last query that gave it at least an even share.
    noise: votes of the logits plus Gumbel noise under this seed, divided by tau. moments: also mean and covariance of the queries
    before rotation, the first so many of the text left out.
    """

    rows: int | None = 0
    group: str = "mean"
    stat: str = "sum"
    noise: int | None = None
    tau: float = 1.0
    moments: int | None = None

    def noises(self, head: int) -> tuple[int, float, int] | None:
        """As `ops` take it, where the first query head is this one."""
        return None if self.noise is None else (self.noise, self.tau, head)

    @property
    def tail(self) -> int:
        """How many of the last queries must be at hand to answer once more while decoding."""
        return self.rows or (0 if self.moments is None else 128)


@dataclass
class Prompt:
    """One layer of one prompt after its prefill attention, or what a cache still holds of it later. A policy never sees a batch."""

    layer: int
    rank: int  # this layer is the rank-th …
    owners: int  # … of so many with storage of their own
    seen: int  # tokens of text so far …
    visible: int  # … and how many of them the model's own window still shows the next one
    k: Tensor  # (1,Hkv,N,D) rotated
    v: Tensor  # (1,Hkv,N,D)
    pos: Tensor  # (1,Hkv,N) int32 absolute, ascending; −1 behind a head that holds fewer
    votes: Tensor | None  # (readers,Hkv,N) fp32, one plane per layer that reads these keys; or as `watch` left them
    n_votes: int  # from how many queries
    ops: Any  # the backend, to move what is kept
    q_mean: Tensor | None = None  # (readers,H,D) fp32, of queries before rotation
    q_cov: Tensor | None = None  # (readers,H,D,D)
    inv_freq: Tensor | None = None  # (D/2,) the rotation's angle per position
    codes: Mapping[str, Tensor] | None = None  # of what a store has rounded: see `Kept`

    def __len__(self) -> int:
        return self.k.shape[2]

    @property
    def real(self) -> Tensor:
        """bool (1,Hkv,N): a token, not padding."""
        return self.pos >= 0

    def first(self, n: int) -> Tensor:
        """bool (1,Hkv,N): the n first tokens of the text (the sinks), as far as they are still here."""
        return self.real & (self.pos < n)

    def last(self, n: int) -> Tensor:
        """bool (1,Hkv,N): the n most recent tokens of the text, as far as they are still here."""
        return self.pos >= max(0, self.seen - n)


@dataclass(frozen=True)
class Kept:
    """What survives of one row in one layer: a value that can be saved, packed twice or trimmed again.

    `rest` is demoted instead of dropped: a second set of tokens, to be held more coarsely. `codes` is how a store that rounds has written
    the same tokens down, for it alone to read, so that nothing is rounded twice: (1,Hkv,N,·) each, or, of a store whose tokens
    can only leave together, whatever it likes.
    """

    k: Tensor  # (1,Hkv,N,D)
    v: Tensor  # (1,Hkv,N,D)
    pos: Tensor  # (1,Hkv,N) int32, ascending, padded with −1 behind `length`
    length: Tensor  # (1,Hkv) int32: how many are real (heads may differ)
    limit: Tensor  # (1,Hkv) int32: slots a head may ever use; −1: grows with decode
    sink: Tensor  # (1,Hkv) int32: first slots that the default rule never overwrites
    votes: Tensor | None = None  # (1,Hkv,N) fp32, for policies that go on counting while decoding
    score: float = 0.0  # of the whole layer, for rules across layers
    rest: Kept | None = None
    codes: Mapping[str, Tensor] | None = None

    @classmethod
    def all(
        cls, p: Prompt, limit: int | Tensor = -1, sink: int = 0, votes: Tensor | None = None, score: float = 0.0
    ) -> Kept:
        """Every token of the prompt; votes (1,Hkv,N) go with them."""
        length = p.real.sum(-1, dtype=torch.int32)
        heads = torch.ones_like(length)
        return cls(_own(p.k), _own(p.v), _own(p.pos), length, heads * limit, heads * sink, votes, score, codes=p.codes)

    @classmethod
    def top(
        cls,
        p: Prompt,
        score: Tensor,
        n: int | Tensor,
        limit: int | Tensor = -1,
        sink: int | Tensor = 0,
        votes: Tensor | None = None,
    ) -> Kept:
        """The n best tokens of each head in temporal order; equal scores: the earlier token wins.

        score (1,Hkv,N), +inf for what must stay; n, limit, sink: one number, or (1,Hkv) where heads differ.
        """
        n = torch.as_tensor(n, dtype=torch.int32, device=score.device).expand(score.shape[:2])
        n = n.minimum(p.real.sum(-1, dtype=torch.int32))
        score = score.masked_fill(~p.real, -torch.inf)
        rank = score.argsort(dim=-1, descending=True, stable=True)[..., : int(n.max())]
        real = torch.arange(rank.shape[-1], device=n.device) < n[..., None]
        at = rank.masked_fill(~real, len(p)).sort(dim=-1).values
        real, at = at < len(p), at.clamp(max=len(p) - 1)
        k, v, pos = p.ops.compact(p.k, p.v, p.pos, at.masked_fill(~real, -1))
        heads, votes = torch.ones_like(n), None if votes is None else votes.gather(2, at)
        return cls(k, v, pos, n.clone(), heads * limit, heads * sink, votes, codes=_pick(p.codes, at))

    def within(self, seen: int, sliding_window: int | None) -> Kept:
        """Without what a model with this window will not see again after `seen` tokens."""
        if sliding_window is None:
            return self
        gone = ((self.pos >= 0) & (self.pos <= seen - sliding_window)).sum(-1)  # of each head the first so many
        at = torch.arange(self.pos.shape[2], device=self.pos.device) + gone[..., None]
        real = at < self.length[..., None]
        at = at.masked_fill(~real, 0)
        row = at[..., None].expand_as(self.k)
        votes = None if self.votes is None else self.votes.gather(2, at)
        pos, length = self.pos.gather(2, at).masked_fill(~real, -1), self.length - gone.to(torch.int32)
        k, v, codes = self.k.gather(2, row), self.v.gather(2, row), _pick(self.codes, at)
        return replace(self, k=k, v=v, pos=pos, length=length, votes=votes, codes=codes)

    def demote(self, p: Prompt) -> Kept:
        """The same, with all other tokens of the prompt as `rest`."""
        mine = torch.nn.functional.pad(self.pos, (0, 1), value=-1)  # one more, as there may be none
        mine = torch.where(mine < 0, torch.iinfo(torch.int32).max, mine)
        at = torch.searchsorted(mine, p.pos.contiguous()).clamp(max=mine.shape[2] - 1)
        kept = mine.gather(2, at) == p.pos
        score = torch.zeros_like(p.pos, dtype=torch.float32).masked_fill(kept, -torch.inf)
        return replace(self, rest=Kept.top(p, score, p.real.sum(-1, dtype=torch.int32) - self.length))

    @property
    def parts(self) -> list[Kept]:
        """The sets it consists of."""
        return [self] if self.rest is None else [self, *self.rest.parts]

    def edges(self, sink: int, recent: int, roll: bool, score: float = 0.0) -> Kept:
        """The text's first `sink` and last `recent` tokens, of a row whose heads hold the same ones.

        roll: new tokens overwrite the oldest recent one, so the head stays at sink + recent; else it grows.
        Sinks that the model's sliding window has passed are not there to be kept.
        """
        sink = max(0, sink - int(self.pos[0, 0, 0]))
        k, v, pos, n = self.k, self.v, self.pos, self.k.shape[2]
        if n > sink + recent:
            k, v, pos = (torch.cat((x[:, :, :sink], x[:, :, n - recent :]), 2) for x in (k, v, pos))
        heads = torch.ones_like(self.length)
        limit, protected = (sink + recent, sink) if roll else (-1, 0)
        return Kept(k, v, pos, heads * k.shape[2], heads * limit, heads * protected, score=score)


def _pick(codes: Mapping[str, Tensor] | None, at: Tensor) -> Mapping[str, Tensor] | None:
    """The codes of the tokens at (1,Hkv,N)."""
    if codes is None:
        return None
    return {name: x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[3])) for name, x in codes.items()}


def _own(x: Tensor) -> Tensor:
    """x in storage of its own: a view would keep the whole layer's projections alive behind a few kept tokens."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


# ---- axis 1: keep (policies/*) -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What a plan meets: enough to turn percents, bytes and family thresholds into plain numbers."""

    family: str  # llama2 | llama3 | mistral | qwen2 | smollm2 | "" (not known)
    owners: int  # layers that own storage
    prompt_len: int
    room: int  # tokens that will be generated or fed later
    rows: int  # rows that share a budget in bytes
    token_bytes: float  # one token in one owning layer, all KV heads, as the store lays it out
    fixed_bytes: int  # per row and owning layer, whatever its length
    pads: bool = False  # whether all heads take the slots of the longest

    def tokens(self, budget: int | str, least: int, most_new: int | None = None) -> int:
        """A budget as a number of kept prompt tokens per KV head.

        "25%" is of this prompt, never under `least`; "64MiB" is of the whole cache, with the slots of at most `most_new` generated
        tokens (none: all of them).
        """
        room = self.room if most_new is None else min(self.room, most_new)
        if isinstance(budget, int):
            return budget
        if budget.endswith("%"):
            return max(least, int(self.prompt_len * float(budget[:-1]) / 100))
        share = size(budget) / self.rows / self.owners - self.fixed_bytes
        n = int(share / self.token_bytes) - room
        if n < least:
            need = (least + room) * self.token_bytes + self.fixed_bytes
            raise ValueError(
                f"a budget of {budget} leaves {max(n, 0)} prompt tokens per head beside {room} new ones; this policy "
                f"keeps at least {least}: give {int(need * self.owners * self.rows / 2**20) + 1}MiB or more, or generate less"
            )
        return n


UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """'256MiB' → bytes."""
    for unit, scale in UNITS.items():
        if text.endswith(unit):
            return int(float(text[: -len(unit)]) * scale)
    raise ValueError(f"{text!r} is no size; a number with one of {', '.join(UNITS)}, such as 256MiB")


def check_budget(budget: int | str, least: int, why: str) -> None:
    """Raise ValueError unless budget is tokens ≥ least, a percent in (0, 100], or a size."""
    try:
        ok = budget >= least if isinstance(budget, int) else _positive(budget)
    except (ValueError, OverflowError):
        raise ValueError(f"budget={budget} is no budget; give tokens (512), percent (25%) or bytes (256MiB)") from None
    if not ok:
        raise ValueError(
            f"budget={budget} is too small or out of range: {why}; give at least {least} tokens, 1% … 100%, or a size"
        )


def _positive(budget: str) -> bool:
    if budget.endswith("%"):
        return 0 < float(budget[:-1]) <= 100
    return size(budget) > 0


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


# ---- axis 2: store (stores/*) --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """What a store is built with: the model's shape, the backend, where and in which type its tensors live."""

    config: Any  # ModelConfig; a store reads head counts, head_dim and sliding_window of it
    ops: Any  # nanokv.ops.Ops
    device: torch.device
    dtype: torch.dtype
    inv_freq: Tensor  # (D/2,) fp32, the model's: for queries and keys that must be turned once more
    made: dict[str, Tensor] = field(default_factory=dict)  # constants that all layers share

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A constant, made when it is first asked for."""
        if name not in self.made:
            self.made[name] = make().to(self.device)
        return self.made[name]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def host(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In the host's memory; pinned where the device is another one."""
        return torch.empty(shape, dtype=dtype or self.dtype, pin_memory=self.device.type == "cuda")

    def raw(self, k: Tensor, pos: Tensor) -> Tensor:
        """Keys (1,Hkv,N,D) at pos (1,Hkv,N), the same for all heads, as they were before their rotation: fp32."""
        angle = pos[0, 0, :, None].float() * -self.inv_freq
        cos, sin, (low, high) = angle.cos(), angle.sin(), k.float().chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class Store(Protocol):
    """One layer's kept tokens and every one that follows, for B rows."""

    slots: Slots
    waits: bool  # whether a step over it waits for the host, so that none can be captured

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """k, v (B,Hkv,1,D), pos (B,1): in place, static shapes, no host sync. The captured path."""

    def extend(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """k, v (B,Hkv,T,D), pos (B,T), T > 1: host-level, after these tokens have attended."""

    def read(self, q: Tensor, pos: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """q (B,H,T,D) → out, lse (B,H,T) and the step's votes if the policy watches, over all that is stored.

        near (B,H,T,D): the same queries turned as if no gap lay between sinks and the rest; the sinks are read with these.
        """

    def maintain(self, written: int) -> bool | None:
        """Host-scheduled upkeep between steps; `written` counts tokens. → whether it now lies in other memory."""

    def freeze(self) -> None:
        """From now on every step has the same shapes."""

    exact: int | None  # of how many tokens, the first ones, `unpack` gives K and V as they came; none: of all

    def unpack(self) -> list[Kept]:
        """What is held, a value per row, in temporal order."""

    def reserve(self, room: int) -> bool:
        """Make slots for `room` tokens from here on, what is held staying; False if only packing it anew does."""

    def refill(self, rows: list[Kept], room: int) -> bool:
        """Hold these instead, in the same memory; False if they do not fit. `room` as for `pack`."""

    def tensors(self) -> list[Tensor]:
        """Everything it holds on the device, for the receipt."""

    def hosted(self) -> list[Tensor]:
        """… and what it holds in the host's memory."""

    def live(self) -> tuple[int, int, int]:
        """Bytes in use of K, of V (scales and what is still exact included) and of the bookkeeping."""

    @property
    def length(self) -> Tensor:
        """(B,Hkv) int32: tokens held."""


@dataclass(frozen=True, kw_only=True)
class StoreSpec(ABC):
    """A store's options as they stand in a plan; `pack` builds the store of one layer."""

    granule = 1  # tokens that can only leave together
    pads = True  # whether all heads take the slots of the longest
    coarse = False  # whether it has a place for `Kept.rest`

    @property
    def most(self) -> int:
        """How many tokens may come between two calls of `maintain`; 0: any number."""
        return 0

    def refuses(self, keep: Policy) -> str:
        """Why it cannot hold what this policy keeps; empty if it can."""
        if keep.demotes and not self.coarse:
            return "hands back a second set to be held more coarsely, for which there is no place"
        if self.granule > 1 and keep.singly:
            return f"lets single tokens go while decoding, and here {self.granule} of them share a scale and leave together"
        if self.coarse and not keep.demotes:
            return "demotes nothing, so nothing would be coarse: add demote=true if it ranks tokens"
        return ""

    def note(self, n: int) -> str:
        """What to tell of a prompt of n tokens, where it is not held as one would think."""
        return ""

    def misfit(self, config: Any) -> str:
        """Why a model of this shape cannot be laid out so; empty if it can."""
        return ""

    @abstractmethod
    def cost(self, config: Any, dtype: torch.dtype, sink: int) -> tuple[float, int]:
        """Bytes per token and fixed bytes, of one row in one layer, of whose tokens the policy never lets the first `sink` go."""

    def held(self, config: Any, dtype: torch.dtype, cost: tuple[float, int], kept: int, ahead: int) -> float:
        """Bytes on the device of one row in one layer: `kept` tokens of a prompt, slots for `ahead` more, `cost` as the plan has it."""
        return (kept + ahead) * cost[0] + cost[1]

    def host_bytes(self, config: Any, dtype: torch.dtype, kept: int, ahead: int) -> int:
        """… and in the host's memory."""
        return 0

    def coarse_bytes(self, config: Any) -> float:
        """Bytes per token of `Kept.rest`."""
        return 0

    def shared(self, config: Any) -> int:
        """Bytes of the constants that all layers share."""
        return 0

    def early(self, kept: Kept, ctx: Context) -> Kept:
        """What `pack` needs of one row's layer, once that is complete: a store that can lets the dense prompt go before the next one."""
        return kept

    @abstractmethod
    def pack(self, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> Store:
        """The store of one layer, with slots for `room` more tokens in every head that grows."""


# ---- axis 4: place (places/*) --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layer's cache lies: here, on the device, as its store lays it out (no paper)."""

    def refuses(self, keep: Policy, store: StoreSpec) -> str:
        """Why a cache kept and laid out so cannot lie here, said of it; empty if it can."""
        return ""

    def pack(self, store: StoreSpec, rows: list[Kept], policy: Policy, room: int, ctx: Context) -> Store:
        """As `StoreSpec.pack`."""
        return store.pack(rows, policy, room, ctx)

    def host_bytes(self, config: Any, dtype: torch.dtype, slots: int) -> int:
        """Of so many slots of one layer, what lies on the host."""
        return 0

    def link(self, stores: Sequence[Store]) -> None:
        """Called with all layers' stores, in their order, whenever one has been packed."""
