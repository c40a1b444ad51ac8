"""The oracles that the tests hold nanokv to: a full cache with a boolean mask, and the papers' rules as loops over lists."""

from __future__ import annotations

import cmath
import itertools
import math
import statistics

import torch
from torch import Tensor


class MaskedCache:
    """A cache of everything, in which query token i of head h sees key token j only if `seen(layer, h, i, j)` and j ≤ i and the
    model's sliding window allow it. Plain loops over softmax rows, fp64 inside. A layer in `share` uses another one's keys and values
    instead of those that it is given.
    """

    owns = True

    def __init__(self, config, seen, share=None):
        self.config, self.seen, self.share = config, seen, share or {}
        self.layers = [MaskedLayer(self, i) for i in range(config.num_hidden_layers)]


class MaskedLayer:
    owns = True

    def __init__(self, cache: MaskedCache, index: int):
        self.cache, self.index, self.k, self.v = cache, index, [], []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        cfg, of = self.cache.config, self.cache.layers[self.cache.share.get(self.index, self.index)]
        self.k += list(k[0].transpose(0, 1).double())  # one (Hkv,D) per token
        self.v += list(v[0].transpose(0, 1).double())
        keys, values, out = torch.stack(of.k), torch.stack(of.v), torch.zeros_like(q)
        group, window = cfg.num_attention_heads // cfg.num_key_value_heads, cfg.window(self.index)
        for t, i in enumerate(pos[0].tolist()):
            for h in range(cfg.num_attention_heads):
                kv = h // group
                near = (j for j in range(i + 1) if window is None or j > i - window)
                cols = [j for j in near if j == i or self.cache.seen(of.index, kv, i, j)]
                score = keys[cols, kv] @ q[0, h, t].double() / math.sqrt(cfg.head_dim)
                out[0, h, t] = (score.softmax(0) @ values[cols, kv]).to(q.dtype)
        return out


def attention(q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
    """(H,T,D) queries of the last T tokens, (Hkv,S,D) keys → causal softmax weights (H,T,S), fp64."""
    H, T, D = q.shape
    Hkv, S, _ = k.shape
    weight = torch.zeros(H, T, S, dtype=torch.float64)
    for h in range(H):
        for t in range(T):
            i = S - T + t
            lo = 0 if window is None else max(0, i - window + 1)
            score = k[h // (H // Hkv), lo : i + 1].double() @ q[h, t].double() / math.sqrt(D)
            weight[h, t, lo : i + 1] = score.softmax(0)
    return weight


def snapkv(weight: Tensor, budget: int, window: int, kernel: int, pool: str, group: str = "mean") -> list[list[int]]:
    """SnapKV's steps over lists. weight (G,window,T): one KV head's query heads → positions kept."""
    T = weight.shape[2]
    if budget >= T:
        return list(range(T))
    votes = []
    for j in range(T - window):
        of_head = [sum(weight[g, w, j].item() for w in range(window)) for g in range(weight.shape[0])]
        votes.append(sum(of_head) / len(of_head) if group == "mean" else max(of_head))
    pooled = []
    for j in range(T - window):
        near = [votes[i] for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < T - window]
        pooled.append(max(near) if pool == "max" else sum(near) / kernel)
    best = sorted(range(T - window), key=lambda j: (-pooled[j], j))[: budget - window]
    return sorted(best) + list(range(T - window, T))


def streaming(T: int, sink: int, recent: int, now: int | None = None) -> list[int]:
    """Positions a streaming layer holds after a prompt of T and, if given, all tokens up to `now`."""
    end = T if now is None else now + 1
    return [j for j in range(end) if j < sink or j >= end - recent]


def laziness(weight: Tensor, sink: int, recent: int) -> float:
    """SimLayerKV's score. weight (H,rows,T) of the judging queries."""
    H, rows, T = weight.shape
    edge = [j for j in range(T) if j < sink or j >= T - recent]
    return sum(weight[h, r, j].item() for h in range(H) for r in range(rows) for j in edge) / (H * rows)


# ---- the rules of the scorers, over lists; score[j] is of the token at position j -------------------------------------


def top(score: list[float], n: int, always: list[int] = ()) -> list[int]:
    """The n best positions, earlier ones first among equals; those in `always` whatever their score."""
    order = sorted(range(len(score)), key=lambda j: (j not in always, -score[j], j))
    return sorted(order[:n])


def heavy(weight: Tensor) -> list[float]:
    """H2O's score. weight (G,rows,T) of one KV head's query heads: attention received, mean over heads."""
    G, rows, T = weight.shape
    return [sum(weight[g, i, j].item() for g in range(G) for i in range(rows)) / G for j in range(T)]


def pyramid(budget: int, window: int, T: int, layers: int, beta: float) -> list[int]:
    """PyramidKV's line, before rounding."""
    mean = budget - window
    low, high = mean / beta, 2 * mean - mean / beta
    if high >= T - window:
        low, high = 2 * mean - (T - window), T - window
    return [window + high - i * (high - low) / (layers - 1) for i in range(layers)]


def ada(scores: list[list[float]], n: int, floor: float, always: list[int]) -> list[list[int]]:
    """Ada-KV: each head's own best first, then the best of all heads until heads × n are kept."""
    kept = [set(top(s, max(1, int(floor * n)), always)) | set(always) for s in scores]
    rest = [(-s[j], h, j) for h, s in enumerate(scores) for j in range(len(s)) if j not in kept[h]]
    for _, h, j in sorted(rest)[: n * len(scores) - sum(map(len, kept))]:
        kept[h].add(j)
    return [sorted(k) for k in kept]


def chunkkv(scores: list[list[float]], n: int, size: int, always: list[int]) -> list[int]:
    """ChunkKV: tokens get the mean of their run over tokens and heads; what always stays is outside the runs."""
    T, out = len(scores[0]), []
    for j in range(T):
        run = [i for i in range(j // size * size, min(T, (j // size + 1) * size)) if i not in always]
        out.append(sum(s[i] for s in scores for i in run) / len(run) if run else 0.0)
    return top(out, n, always)


def keydiff(k: Tensor) -> list[float]:
    """k (T,D): minus the cosine to the mean direction."""
    mean = sum(x / x.norm() for x in k.double()) / len(k)
    return [-(x @ mean / x.norm() / mean.norm()).item() for x in k.double()]


def lagkv(k: Tensor, v: Tensor, sink: int, lag: int) -> list[float]:
    """k, v (T,D) of one head: inf for sinks, then each token's rank in its partition, then more and more for those without a next one."""
    T = len(k)
    score = [math.inf] * min(sink, T) + [float(lag + i) for i in range(max(0, T - sink))]
    for a in range(sink, T - 2 * lag + 1, lag):  # the partition a … a+lag−1 and the next one
        totals = [0.0] * lag
        for x in (k.double(), v.double()):
            spread = []
            for i in range(a, a + lag):
                scaled = []
                for c in range(x.shape[1]):
                    follow = [x[j, c].item() for j in range(a + lag, a + 2 * lag)]
                    scaled.append((x[i, c].item() - min(follow)) / (max(follow) - min(follow)))
                mean = sum(scaled) / len(scaled)
                spread.append(math.sqrt(sum((s - mean) ** 2 for s in scaled) / (len(scaled) - 1)))
            total = sum(math.exp(s) for s in spread)
            totals = [t + math.exp(s) / total / 2 for t, s in zip(totals, spread, strict=True)]
        for i in range(lag):
            score[a + i] = float(sum(t < totals[i] for t in totals))
    return score


def pyramidinfer(q: Tensor, k: Tensor, recent: int, sink: int, context: int, ratio: float) -> list[list[int]]:
    """q (L,H,T,D), k (L,Hkv,T,D): which tokens each layer keeps."""
    (L, H, T, D), group, held = q.shape, q.shape[1] // k.shape[1], [list(range(q.shape[2]))]
    for layer in range(L - 1):
        earlier = [j for j in held[-1] if j < T - recent]
        share = ratio + (1 - ratio) * (math.cos(math.pi * layer / L) + 1) / 2
        passed = int(share * len(earlier))
        if passed > context:
            score = dict.fromkeys(earlier, 0.0)
            for h in range(H):
                for row, i in enumerate(range(T - recent, T)):
                    logits = [
                        float(q[layer, h, i].double() @ k[layer, h // group, j].double()) / D**0.5 for j in range(i + 1)
                    ]
                    total = sum(math.exp(x - max(logits)) for x in logits)
                    for j in earlier:
                        p = math.exp(logits[j] - max(logits)) / total
                        score[j] += p * (1 + 0.2 * row / (recent - 1) if recent > 1 else 1)
            ranked = sorted(earlier, key=lambda j: (j >= sink, -score[j] if j >= sink else 0, j))
            earlier = sorted(ranked[:passed])
        held.append(earlier + list(range(T - recent, T)))
    return held


def squeezed(similarity: list[float], budget: int, share: float, least: int, most: int) -> list[int]:
    """SqueezeAttention's budgets: of all ways to put the layers into three classes, the one with the smallest squares."""
    n, best = len(similarity), (math.inf, None)
    for classes in itertools.product(range(3), repeat=n):
        if set(classes) != {0, 1, 2}:
            continue
        means = [statistics.fmean(s for s, c in zip(similarity, classes, strict=True) if c == k) for k in range(3)]
        error = sum((s - means[c]) ** 2 for s, c in zip(similarity, classes, strict=True))
        if error < best[0] - 1e-15:
            best = error, [c == means.index(max(means)) for c in classes]
    given = [max(least, int(share * budget)) if is_few else 0 for is_few in best[1]]
    for takes in (False, True):  # one token at a time, first to those that change much, then to the others
        layers = [i for i in range(n) if best[1][i] == takes]
        while sum(given) < n * budget and (takes or min(given[i] for i in layers) < most):
            i = min(layers, key=lambda i: (given[i], i))
            given[i] += 1
    return given


def expected(
    raw: Tensor, k: Tensor, v: Tensor, inv: Tensor, sink: int, future: int, now: int | None = None
) -> list[float]:
    """Expected Attention for one KV head. raw (G,T,D): queries before rotation; k, v (N,D); the rotation as a matrix, token by token."""
    G, T, D = raw.shape
    turn, now = torch.zeros(D, D, dtype=torch.float64), T if now is None else now
    for p in range(now, now + future):
        for c, angle in enumerate((p * inv.double()).tolist()):
            block = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            turn[[[c], [c + D // 2]], [c, c + D // 2]] += torch.tensor(block, dtype=torch.float64) / future
    score = torch.zeros(len(k) - sink, dtype=torch.float64)
    for q in raw[:, sink:].double():
        mean, cov = turn @ q.mean(0), turn @ torch.cov(q.T, correction=0) @ turn.T
        logit = torch.stack([x @ mean / math.sqrt(D) + x @ cov @ x / (2 * D) for x in k[sink:].double()])
        score += logit.softmax(0) / G
    return [math.inf] * sink + (score * v[sink:].double().norm(dim=-1)).tolist()


def gumbel(seed: int, head: int, i: int, j: int) -> float:
    """Keyformer's noise between query token i and key token j, in whole numbers."""
    x = (seed * 0x9E3779B1 + head * 0x85EBCA77 + i * 0xC2B2AE3D + j * 0x27D4EB2F) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0x2C1B3C6D)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return -math.log(-math.log(((x >> 9) + 0.5) / 2**23))


# ---- eviction while decoding: what one KV head holds when each new token attends, and after it ------------------------


def look(q: Tensor, k: Tensor, held: list[int], noise=lambda g, j: 0.0, tau: float = 1.0) -> list[dict[int, float]]:
    """q (G,D) over the keys k (·,D) at the positions held → per query head the attention of each."""
    rows = []
    for g in range(len(q)):
        logit = [(q[g].double() @ k[j].double()).item() / math.sqrt(k.shape[1]) + noise(g, j) for j in held]
        rows.append(dict(zip(held, (torch.tensor(logit, dtype=torch.float64) / tau).softmax(0).tolist(), strict=True)))
    return rows


def h2o(q, k, T: int, steps: int, budget: int, recent: int, noise=lambda h, i, j: 0.0, tau: float = 1.0):
    """H2O, and with noise Keyformer. q (G,T+steps,D), k (T+steps,D) of one KV head → what is held at each step."""
    score = dict.fromkeys(range(T + steps), 0.0)
    for i in range(T):
        for row in look(q[:, i], k, list(range(i + 1)), lambda g, j, i=i: noise(g, i, j), tau):
            for j, p in row.items():
                score[j] += p / len(q)
    held = top([score[j] for j in range(T)], budget, list(range(T - recent, T)))
    for t in range(T, T + steps):
        if len(held) == budget:
            held.remove(min((j for j in held if j <= t - recent), key=lambda j: (score[j], j)))
        held = [*held, t]
        for row in look(q[:, t], k, held, lambda g, j, t=t: noise(g, t, j), tau):
            for j, p in row.items():
                score[j] += p / len(q)
        yield held


def tova(q, k, T: int, steps: int, budget: int):
    """TOVA. q (H,T+steps,D), k (Hkv,T+steps,D) of a whole layer: one choice for all heads → what is held at each step."""
    G, held = len(q) // len(k), list(range(T))

    def last(t: int) -> dict[int, float]:
        rows = [row for h in range(len(k)) for row in look(q[h * G : (h + 1) * G, t], k[h], held)]
        return {j: sum(row[j] for row in rows) for j in held}

    score = last(T - 1)
    held = top([score[j] for j in range(T)], budget)
    for t in range(T, T + steps):
        if len(held) == budget:
            held.remove(min(held, key=lambda j: (score[j], j)))
        held = [*held, t]
        score = last(t)
        yield held


def scissorhands(q, k, T: int, steps: int, budget: int, every: int, window: int, recent: int):
    """Scissorhands for one KV head → what is held at each step, before tokens go. q: per layer that reads it, its query heads (G,·,D)."""
    low = dict.fromkeys(range(T + steps), 0)

    def count(t: int, held: list[int]) -> None:
        for reader in q:
            rows = look(reader[:, t], k, held)
            for j in held:
                low[j] += sum(row[j] for row in rows) / len(rows) < 1 / len(held)

    for i in range(max(0, T - window), T):
        count(i, list(range(i + 1)))
    held = sorted(range(T), key=lambda j: (j < T - recent, low[j], j))[: budget - every]
    for n, t in enumerate(range(T, T + steps), 1):
        held = [*held, t]
        count(t, held)
        yield sorted(held)
        if n % every == 0:
            held = sorted(held, key=lambda j: (j <= t - recent, low[j], j))[: budget - every]


def corm(q, k, T: int, steps: int, window: int, recent: int, every: int):
    """CORM for one KV head, remembering for each of the last `window` queries what it hit → what is held at each step."""
    hits: list[set[int]] = []

    def hear(t: int, held: list[int]) -> None:
        rows = look(q[:, t], k, held)
        hits.append({j for j in held if max(row[j] for row in rows) >= 1 / len(held)})

    for i in range(T):
        hear(i, list(range(i + 1)))
    held = list(range(T))
    for n, t in enumerate(range(T, T + steps)):
        if n % every == 0:
            held = [j for j in held if j >= t - recent or any(j in h for h in hits[-window:])]
        held = [*held, t]
        hear(t, held)
        yield held


def cascade(q, k, T: int, steps: int, budget: int, sink: int, rings: int):
    """Cascading KV over real rings, each a list with its newest last. q (H,T+steps,D), k (Hkv,T+steps,D) → held at each step."""
    size, G, held = (budget - sink) // rings, len(q) // len(k), []
    chain, score = [[] for _ in range(rings)], dict.fromkeys(range(T + steps), 0.0)

    def insert(t: int) -> None:
        filling = sum(map(len, chain)) < size * rings
        for i, ring in enumerate(chain):
            if not filling and (t0 - sink) % 2**i and ring:
                ring[-1] = t if score[t] >= score[ring[-1]] else ring[-1]
                return
            ring.append(t)
            if len(ring) <= size:
                return
            t = ring.pop(0)

    def pay(t: int) -> dict[int, float]:
        rows = [row for h in range(len(k)) for row in look(q[h * G : (h + 1) * G, t], k[h], held)]
        return {j: sum(row[j] for row in rows) / len(rows) for j in held}

    for i in range(T):
        held = list(range(i + 1))
        for j, x in pay(i).items():
            score[j] += x / (T - j)
    for t0 in range(sink, T):
        insert(t0)
    beta = math.exp(-math.log(100) / size)
    for t0 in range(T, T + steps):
        insert(t0)
        held = [*range(min(sink, t0)), *sorted(j for ring in chain for j in ring)]
        paid = pay(t0)
        score = {j: beta * score[j] + (1 - beta) * paid.get(j, 0.0) for j in score}
        yield held


# ---- chunks of which a step reads a few: one KV head, k (N,D) its rotated keys, q (G,D) its query heads -----------------


def shadow(k: Tensor, q: Tensor, chunk: int, local: int, outliers: int, budget: int) -> tuple[list[int], list[int]]:
    """ShadowKV's choice over lists: (positions exact from the start, positions this query fetches)."""
    n_chunks = len(k) // chunk - local
    chunks = [k[j * chunk : (j + 1) * chunk].double() for j in range(n_chunks)]
    marks = [c.mean(0) for c in chunks]
    alike = [min(float(m @ x / (m.norm() * x.norm())) for x in c) for m, c in zip(marks, chunks, strict=True)]
    out = sorted(range(n_chunks), key=lambda j: alike[j])[:outliers]
    free = [j for j in range(n_chunks) if j not in out]
    best = dict.fromkeys(free, 0.0)
    for head in q.double():
        score = torch.stack([marks[j] @ head for j in free]) / math.sqrt(k.shape[1])
        for j, p in zip(free, score.softmax(0).tolist(), strict=True):
            best[j] = max(best[j], p)
    chosen = sorted(free, key=lambda j: -best[j])[: -(-budget // chunk)]
    exact = [t for j in sorted(out) for t in range(j * chunk, (j + 1) * chunk)] + list(range(n_chunks * chunk, len(k)))
    return exact, sorted(t for j in chosen for t in range(j * chunk, (j + 1) * chunk))


def quest(k: Tensor, q: Tensor, page: int, budget: int) -> list[int]:
    """Quest's choice: positions of the pages that may hold the greatest products."""
    pages = [k[j * page : (j + 1) * page].double() for j in range(len(k) // page - 1)]
    worth = []
    for p in pages:
        low, high = p.amin(0), p.amax(0)
        worth.append(sum(sum(max(x * a, x * b) for x, a, b in zip(*t, strict=True)) for t in heads(q, low, high)))
    best = sorted(range(len(pages)), key=lambda j: -worth[j])[: -(-budget // page)]
    return sorted(t for j in best for t in range(j * page, (j + 1) * page))


def heads(q: Tensor, low: Tensor, high: Tensor) -> list[tuple[list[float], ...]]:
    return [(x.tolist(), low.tolist(), high.tolist()) for x in q.double()]


class HeldCache:
    """A cache that computes nothing: the prompt attends in full, and each later token i to the keys and values that a store said it held
    then, in `held[i][layer][head]` = (positions, K (n,D), V (n,D)). `true[layer][head]` collects what the model gave it. turn: all later
    tokens come at once; they attend to `held[prompt]` and to each other. exact_at_first: layers that read a token as the model gave it in
    its own step, and then round it.
    """

    owns = True

    def __init__(self, config, held, prompt: int, share=None, turn: bool = False, exact_at_first=()):
        self.config, self.held, self.prompt, self.share, self.turn = config, held, prompt, share or {}, turn
        self.exact_at_first = exact_at_first
        self.true = {}
        self.layers = [HeldLayer(self, i) for i in range(config.num_hidden_layers)]


class HeldLayer:
    owns = True

    def __init__(self, cache: HeldCache, index: int):
        self.cache, self.index = cache, index

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        c, cfg, of = self.cache, self.cache.config, self.cache.share.get(self.index, self.index)
        if of == self.index:
            c.true[of] = k[0].double(), v[0].double()
        keys, values = c.true[of]
        out, group = torch.zeros_like(q), cfg.num_attention_heads // cfg.num_key_value_heads
        for i in pos[0].tolist():
            for h in range(cfg.num_attention_heads):
                kv = h // group
                when, K, V = torch.arange(i + 1), keys[kv, : i + 1], values[kv, : i + 1]
                if i in c.held and not c.turn:
                    when, K, V = (x.double() for x in c.held[i][of][kv])
                    if of in c.exact_at_first:
                        K[-1], V[-1] = keys[kv, i], values[kv, i]
                elif c.turn and i >= c.prompt:
                    own = slice(c.prompt, i + 1)
                    when, K, V = (
                        torch.cat((a.double(), b[own]))
                        for a, b in zip(c.held[of][kv], (torch.arange(i + 1), keys[kv], values[kv]), strict=True)
                    )
                near = when > i - (cfg.window(self.index) or math.inf)
                score = K[near] @ q[0, h, i].double() / math.sqrt(cfg.head_dim)
                out[0, h, i] = (score.softmax(0) @ V[near]).to(q.dtype)
        return out


def fastgen(q, k, kinds: list[int], recovery: float, frequent: int, local: int, sink: int) -> list[int]:
    """One KV head's tokens: q (G,T,D) of its query heads, k (T,D). The whole matrix of weights, and sums over it."""
    T = len(k)
    rows = attention(q, k[None]).mean(0).tolist()
    column = [sum(rows[i][j] for i in range(j, T)) for j in range(T)]
    special = {j for j in range(T) if j < sink or kinds[j] == 1}
    marks = special | {j for j in range(T) if kinds[j] == 2}
    others = sorted((j for j in range(T) if j not in marks), key=lambda j: (-column[j], j))
    often = marks | set(others[:frequent])
    for kept in (special, marks, often):
        if sum(rows[i][j] for i in range(T) for j in range(i + 1) if j in kept) / T >= recovery:
            return sorted(kept)
    if sum(rows[i][j] for i in range(T) for j in range(i + 1) if j in often or i - j < local) / T >= recovery:
        return sorted(often | set(range(T - local, T)))
    return list(range(T))


def output_norms(v: Tensor, w_o: Tensor, heads: int, order: int = 1) -> list[list[float]]:
    """|W_o v| of each value (Hkv,T,D), mean over the query heads that read it; w_o (C, H·D)."""
    Hkv, T, D = v.shape
    group, out = heads // Hkv, []
    for h in range(Hkv):
        of_head = [w_o.double()[:, g * D : (g + 1) * D] for g in range(h * group, (h + 1) * group)]
        length = [
            [(w @ v[h, j].double()).abs().pow(order).sum().item() ** (1 / order) for w in of_head] for j in range(T)
        ]
        out.append([sum(of_token) / group for of_token in length])
    return out


def critical(score: list[float], norms: list[float], n: int, first: float, epsilon: float, always: list[int]):
    """CriticalKV's two stages in one head, where n tokens stay. score: mean attention of the observation window."""
    mine = top(score, int(first * n), always)
    rest = [j for j in range(len(score)) if j not in mine]
    rest.sort(key=lambda j: (j not in always, -(score[j] + epsilon) * norms[j], j))
    return sorted(mine + rest[: n - len(mine)])


def defensive(weight: Tensor, norms: list[list[float]], budget: int, window: int, kernel: int, mass: float):
    """DefensiveKV's scores. weight (H,window,T) → for each KV head a list; inf for the window, 2 for what is taken first."""
    H, _, T = weight.shape
    Hkv, n, out = len(norms), T - window, []
    for h in range(Hkv):
        group = weight.double()[h * (H // Hkv) : (h + 1) * (H // Hkv)]
        most = [max(group[g, i, j].item() for g in range(len(group)) for i in range(window)) for j in range(n)]
        pooled = []
        for j in range(n):
            near = [most[i] for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < n]
            pooled.append(sum(near) / kernel)
        least = sum(pooled) / n
        score = [max(x, least) * norms[h][j] / sum(of[j] for of in norms) for j, x in enumerate(pooled)]
        share = [group[:, :, j].sum().item() / (len(group) * window) for j in range(T)]
        held, taken = sum(share[n:]), 0
        for j in sorted(range(n), key=lambda j: (-share[j], j)):
            held += share[j]
            if held >= mass or taken == budget - window:
                break
            score[j], taken = 2.0, taken + 1
        out.append(score + [math.inf] * window)
    return out


def compactor(q, k, v, inv: Tensor, sink: int, recent: int, block: int, sketch: int, blend: float, seed: int):
    """Compactor's scores for one layer. q (H,T,D), k, v (Hkv,T,D) rotated, inv (D/2,) → for each KV head a list; inf at both ends."""
    (H, T, D), Hkv, a, b = q.shape, len(k), sink, q.shape[1] - recent
    projection = torch.randn(Hkv, D, sketch, generator=torch.Generator().manual_seed(seed)).double() / math.sqrt(sketch)
    leverage, attention = [], []
    for h in range(Hkv):
        rows = []
        for j in range(a, b):
            x, y = k[h, j, : D // 2].double(), k[h, j, D // 2 :].double()
            cos, sin = (j * inv.double()).cos(), (j * inv.double()).sin()
            rows.append(torch.cat((x * cos + y * sin, y * cos - x * sin)))
        x = torch.stack(rows)
        x = (x - x.mean(0)) @ projection[h]
        inverse = (x.T @ x + 0.01 * torch.eye(sketch, dtype=torch.float64)).inverse()
        leverage.append([(row @ inverse @ row).item() for row in x])
        paid = [0.0] * T
        for first in range(a, b, block):
            mine = range(first, min(first + block, b))
            for g in range(h * (H // Hkv), (h + 1) * (H // Hkv)):
                for i in mine:
                    weight = (k[h, mine.start : mine.stop].double() @ q[g, i].double()).softmax(0)
                    for j in mine:
                        paid[j] += weight[j - first].item() / (H // Hkv)
        paid = [0.0] + [paid[j] * v[h, j].double().norm().item() for j in range(a, b)] + [0.0]
        attention.append([sum(paid[j : j + 3]) / 3 for j in range(b - a)])
    parts = []
    for x in (leverage, attention):
        every = [s for of_head in x for s in of_head]
        mean, spread = statistics.fmean(every), statistics.pstdev(every)
        parts.append([[(s - mean) / spread for s in of_head] for of_head in x])
    return [
        [math.inf] * sink + [blend * x + y for x, y in zip(*both, strict=True)] + [math.inf] * recent
        for both in zip(*parts, strict=True)
    ]


def merged(k: Tensor, v: Tensor, kept: list[int]) -> Tensor:
    """One head's kept values (n,D) after each evicted value joined that of the most similar kept key."""
    total, weights = {j: v[j].double() for j in kept}, dict.fromkeys(kept, 1.0)
    for i in sorted(set(range(len(k))) - set(kept)):
        cosine = {j: float(k[i].double() @ k[j].double() / (k[i].double().norm() * k[j].double().norm())) for j in kept}
        best = max(kept, key=cosine.get)
        norm, its = float(v[i].double().norm()), float(v[best].double().norm())
        weight = max(0.0, cosine[best]) * norm / (norm + its)
        total[best] = total[best] + weight * v[i].double()
        weights[best] += weight
    return torch.stack([total[j] / weights[j] for j in kept])


def refitted(q: Tensor, k: Tensor, v: Tensor, kept: list[int], ridge: float) -> Tensor:
    """One head's kept values (n,D) by the normal equations, for queries q (heads,w,D) of the last w positions, as far as they
    see any kept key."""
    T, w = len(k), q.shape[1]
    rows, wanted = [], []
    for one in q.double():
        for i, x in enumerate(one):
            logits = k.double() @ x / math.sqrt(k.shape[1])
            sees = [j for j in range(T) if j <= T - w + i]
            mine = [j for j in kept if j <= T - w + i]
            if not mine:
                continue
            row = torch.zeros(T, dtype=torch.float64)
            row[mine] = logits[mine].softmax(0)
            rows.append(row[kept])
            wanted.append(logits[sees].softmax(0) @ v[sees].double())
    a, wanted = torch.stack(rows), torch.stack(wanted)
    pull = ridge * float((a @ a.T).diagonal().mean())
    square = a.T @ a + pull * torch.eye(len(kept), dtype=torch.float64)
    return torch.linalg.inv(square) @ (a.T @ wanted + pull * v[kept].double())


def rkv(weight: Tensor, k: Tensor, window: int, kernel: int, mix: float, similar: float) -> list[float]:
    """R-KV for one KV head: weight (G,window,N) of the last queries, k (N,D)."""
    n = len(k)
    importance = [max(float(w[:, j].double().mean()) for w in weight) if j < n - window else 0.0 for j in range(n)]
    pooled = [max(importance[max(0, j - kernel // 2) : j + kernel // 2 + 1]) for j in range(n)]
    unit = k.double() / k.double().norm(dim=-1, keepdim=True)
    mean = [0.0] * n
    for i in range(n):
        cosine = [float(unit[i] @ unit[j]) if i != j else 0.0 for j in range(n)]
        last = max([j for j in range(n) if cosine[j] > similar], default=0)
        for j in range(n):
            mean[j] += 0.0 if j == last else cosine[j] / n
    total = sum(math.exp(x) for x in mean)
    score = [mix * a - (1 - mix) * math.exp(b) / total for a, b in zip(pooled, mean, strict=True)]
    return score[: n - window] + [math.inf] * window


def triattention(
    raw: Tensor, k: Tensor, inv: Tensor, recent: int, far: int, pos: list[int] | None = None, now: int | None = None
) -> list[float]:
    """TriAttention for one KV head at position `now`: raw (G,T,D) queries before rotation, k (N,D) rotated to pos; in
    complex numbers."""
    _, T, D = raw.shape
    pos, now = list(range(len(k))) if pos is None else pos, T if now is None else now
    pairs, n = D // 2, len(k)
    distances = [2**i for i in range(64) if 2**i <= far]
    best = [-math.inf] * n
    for head in raw.double().tolist():
        q = [[complex(x[f], x[f + pairs]) for f in range(pairs)] for x in head]
        mean = [sum(x[f] for x in q) / T for f in range(pairs)]
        length = [sum(abs(x[f]) for x in q) / T for f in range(pairs)]
        scores = []
        for j in range(n):
            x = k[j].double().tolist()
            # the key before its rotation to position j
            key = [complex(x[f], x[f + pairs]) * cmath.exp(-1j * pos[j] * float(inv[f])) for f in range(pairs)]
            at = [
                sum(
                    (mean[f] * key[f].conjugate() * cmath.exp(1j * (now + d - pos[j]) * float(inv[f]))).real
                    for f in range(pairs)
                )
                for d in distances
            ]
            extra = sum((length[f] - abs(mean[f])) * abs(key[f]) for f in range(pairs))
            scores.append(sum(at) / len(at) + extra)
        middle = sum(scores) / n
        spread = math.sqrt(sum((s - middle) ** 2 for s in scores) / n)
        best = [max(b, (s - middle) / spread) for b, s in zip(best, scores, strict=True)]
    return best[: n - recent] + [math.inf] * recent
