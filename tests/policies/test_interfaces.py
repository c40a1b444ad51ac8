"""The interfaces that no built-in method uses to the full yet, each shown by a toy that needs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import oracle
import pytest
import torch
from helpers import positions
from tiny import text

from kernels import reference
from nanokv import load, parse
from nanokv.backends import bf16_cpu, torch_cpu
from nanokv.cache.kept import Kept
from nanokv.cache.plan import Plan
from nanokv.cache.prefill import PromptCache
from nanokv.cache.scores import ScoreRequest
from nanokv.engine import Session
from nanokv.policies.base import Policy
from nanokv.policies.scorer import Scorer
from nanokv.save import restore, save
from nanokv.stores.quant.int import Int
from nanokv.summary import as_record, end_block

PROMPT = text(60, seed=5)
SEEN: list = []  # what the toys were shown


ONE_AFTER_THE_OTHER = reference.prefill_scored_by(torch_cpu.sdpa_prefill, torch_cpu.attention_scores)


@pytest.fixture(autouse=True)
def forget():
    SEEN.clear()


def start(llm, policy: Policy, prompt=PROMPT, chunk: int | None = None, **more) -> Session:
    session = Session(llm.models, replace(Plan(), policy=policy, **more), 8, chunk)
    session.start([prompt])
    return session


# ---- scoring passes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Replay(Policy):
    """KVzip's idea in small: the prompt is fed again behind itself, and the attention of that second reading counts."""

    request = ScoreRequest(last_queries=None, over_group="max")

    def keep(self, p):
        SEEN.append(p)
        return Kept.top(p, p.attention.sum(0, keepdim=True), 20)

    def passes(self, prompt_len):
        return 2

    def replay(self, tokens, i, encode):
        return torch.cat((tokens[:3], tokens)) if i == 0 else tokens[10:30]


@pytest.mark.parametrize("model", ["g3", "llama2", "windows"])
@pytest.mark.parametrize("chunk", [None, 16])
def test_scoring_passes_see_the_prompt_and_leave_nothing_behind(model, chunk, llm_of):
    llm = llm_of(model)
    session = start(llm, Replay(), chunk=chunk)
    replays = [PROMPT[:3] + PROMPT, PROMPT[10:30]]
    config = llm.config
    G = config.num_attention_heads // config.num_key_value_heads
    for layer, p in enumerate(SEEN):
        window = config.window(layer)
        assert p.n_queries == 63 + 20 and p.seen == 60
        # nothing but the prompt's keys is kept alive while all layers wait
        assert p.k.untyped_storage().nbytes() == 60 * config.num_key_value_heads * config.head_dim * 4
        right = torch.zeros(config.num_attention_heads, 60, dtype=torch.float64)
        for (
            replayed
        ) in replays:  # the attention of a text that holds the prompt and then the replay, by a plain forward pass
            q, k = queries_and_keys(llm, PROMPT + replayed, layer)
            for h in range(config.num_attention_heads):
                logits = q[h].double() @ k[h // G].double().T * config.head_dim**-0.5
                i, j = torch.arange(len(logits))[:, None], torch.arange(len(logits))
                hidden = (j > i) | (j <= i - window if window else False)
                right[h] += logits.masked_fill(hidden, -torch.inf).softmax(-1)[60:, :60].sum(0)
        right = right.unflatten(0, (-1, G)).amax(1)
        torch.testing.assert_close(p.attention[0].double(), right[:, -len(p) :], atol=1e-4, rtol=1e-4)
    assert session.report().layers[0].kept == [[20] * config.num_key_value_heads]  # the replayed tokens are not held


def queries_and_keys(llm, ids: list[int], layer: int):
    """(H,T,D) and (Hkv,T,D) of one layer, rotated, as a prompt cache receives them."""
    found = {}

    class Listens(PromptCache):
        pass

    cache = Listens(Plan(), torch.tensor(ids), llm.models.new_context())
    inner = cache.layers[layer]
    attend = inner.attend

    def listen(q, k, v, pos):
        found["q"], found["k"] = q[0], k[0]
        return attend(q, k, v, pos)

    inner.attend = listen
    with torch.inference_mode():
        llm.models.prefill.hidden(torch.tensor([ids]), torch.arange(len(ids))[None], cache)
    return found["q"], found["k"]


def test_passes_change_neither_logits_nor_what_full_keeps(llm_of):
    @dataclass(frozen=True, kw_only=True)
    class KeepsAll(Replay):
        def keep(self, p):
            return Kept.all(p)

    llm, logits = llm_of("g3"), []
    for policy in (KeepsAll(), parse("full").policy):
        session = Session(llm.models, replace(Plan(), policy=policy), 8)
        logits.append([session.start([PROMPT]), *(session.feed(torch.tensor([[t]])) for t in (1, 2, 3))])
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_passes_and_a_late_decision_exclude_each_other(llm_of):
    @dataclass(frozen=True, kw_only=True)
    class Both(Replay):
        decide_after = 1

    with pytest.raises(ValueError, match="may have no decide_after"):
        start(llm_of("g3"), Both())


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize(("sink", "piece", "normed"), [(2, 25, False), (0, 60, False), (4, 59, True)])
def test_kvzip_keeps_what_repeating_the_prompt_reads(sink, piece, normed, chunk, llm_of):
    llm = llm_of("g3")
    config, encode = llm.config, llm.tokenizer.encode_more
    policy = parse(f"kvzip:budget=20,sink={sink},piece={piece},normed={str(normed).lower()}").policy
    session = start(llm, policy, chunk=chunk)
    scores = [[0.0] * 60 for _ in range(3 * 2)]
    for first in range(0, 60, piece):
        request = encode("\n\nRepeat the previous context exactly.\n")
        if first:
            request = encode("\n\nRepeat the part of the previous context exactly, starting with")
            request = request + PROMPT[max(0, first - 8) : first] + encode("\n")
        mine = [j for j in range(60) if j < min(sink, first) or first <= j < first + piece]
        replay = request + PROMPT[first : first + piece]
        for layer in range(3):
            q, k = (x.double() for x in queries_and_keys(llm, PROMPT + replay, layer))
            for h in range(config.num_attention_heads):
                for i in range(60, 60 + len(replay)):
                    cols = mine + list(range(60, i + 1))
                    weight = (k[h // 3, cols] @ q[h, i] * config.head_dim**-0.5).softmax(0).tolist()
                    of = scores[2 * layer + h // 3]
                    for j, w in zip(mine, weight, strict=False):
                        of[j] = max(of[j], w)
    if normed:
        values = [store.unpack()[0].v[0] for store in start(llm, parse("full").policy).cache.stores.values()]
        w_o = llm.models.prefill.output_weights()
        norms = [x for v, w in zip(values, w_o, strict=True) for x in oracle.output_norms(v, w, 6, order=2)]
        scores = [[s * n for s, n in zip(*pair, strict=True)] for pair in zip(scores, norms, strict=True)]
    right = oracle.ada(scores, 20, 0.0, list(range(sink)))
    kept = [positions(x, h) for s in session.cache.stores.values() for x in s.unpack() for h in range(2)]
    assert kept == right and len({len(x) for x in kept}) > 1


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("share", [{}, {2: 0}])
def test_kvzip_scores_as_well_by_the_weights_of_attention(share, chunk, tiny, monkeypatch):
    """On a CPU that multiplies bf16 the scores come from attention itself. Attention as products gives both runs the same
    queries and keys.
    """

    @dataclass(frozen=True, kw_only=True)
    class Seen(type(parse("kvzip").policy)):
        def keep_all(self, prompts):
            SEEN.extend(p.attention for p in prompts)
            return super().keep_all(prompts)

    llm = load(str(tiny("g3")[0]), dtype="bfloat16", backend="sdpa")
    monkeypatch.setattr(bf16_cpu, "applies", lambda q, k: True)
    found = []
    for ops in (llm.models.ops, replace(llm.models.ops, prefill_scored=ONE_AFTER_THE_OTHER)):
        SEEN.clear()
        llm.models = replace(llm.models, ops=ops)
        start(llm, Seen(budget=20, sink=2, piece=25), chunk=chunk, share=share)
        found.append(torch.cat([x.amax(0) for x in SEEN]))
    assert found[0].shape == (2 * (3 - len(share)), 60) and (found[0] > 0).all()
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [None, 16])
def test_passes_are_counted_shown_and_reported(chunk, llm_of):
    llm, seen = llm_of("g3"), []
    session = llm.session(4, chunk, parse("kvzip:budget=20,piece=25"))
    lengths, request = session.pass_lengths(PROMPT), len("..Repeat the previous context exactly..")
    assert len(lengths) == 3 and lengths[0] == request + 25
    answer = llm.answer(session, [PROMPT], limit=4, progress=seen.append)
    "".join(piece for _, piece in answer)
    assert sum(seen) == 60 + sum(lengths)
    (cost,) = session.passes
    config = llm.config
    assert cost.tokens == sum(lengths) and 0 < cost.seconds < answer.prefill_s
    assert cost.bytes == 60 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4
    assert f"kvzip scored with {cost.tokens} more tok" in end_block(llm, answer)
    assert as_record(llm, answer)["scoring_passes"] == [asdict(cost)]
    plain = llm.session(4, chunk, parse("snapkv:budget=20,window=4"))
    answer = llm.answer(plain, [PROMPT], limit=4)
    "".join(piece for _, piece in answer)
    assert not plain.passes and "scoring_passes" not in as_record(llm, answer)


def test_passes_count_for_the_context_and_the_memory(llm_of, monkeypatch):
    llm = llm_of("g3")  # a context of 512 tokens
    prompt = text(300, seed=6)

    def begin(plan, **more):
        return llm.answer(llm.session(4, plan=parse(plan)), [prompt], limit=4, **more)

    with pytest.raises(ValueError, match=r"up to 339 more behind it.*piece="):
        begin("kvzip:budget=20")
    begin("kvzip:budget=20", overflow=True)
    begin("kvzip:budget=20,piece=100")
    begin("kvzip:budget=300")  # keeps all, so nothing is scored
    per_token = int(Plan().cost(llm.config, torch.float32)[0])
    needs = {}
    for chunk, layers in ((None, 1), (50, 3)):
        session = llm.session(4, chunk, parse("kvzip:budget=20,piece=100"))
        for free in range(0, 10**6, per_token):
            monkeypatch.setattr("nanokv.llm.free_bytes", lambda device, free=free: free)
            try:
                llm.check_memory(session, [prompt], 4)
            except ValueError:
                continue
            needs[chunk] = free - layers * max(session.pass_lengths(prompt)) * per_token
            break
    assert abs(needs[None] - needs[50]) <= per_token and needs[50] > 3 * 300 * per_token


# ---- choices across layers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OneBudget(Policy):
    """All layers share one budget, which goes to the tokens of largest value norm."""

    cross_layer = True

    def keep(self, p):
        raise AssertionError("a policy across layers is never asked about one of them")

    def keep_all(self, prompts):
        SEEN.append([p.layer for p in prompts])
        norms = torch.stack([p.v.norm(dim=-1).mean(1)[0] for p in prompts])  # (layers,N)
        best = norms.flatten().topk(50).indices // norms.shape[1]
        return [Kept.top(p, p.v.norm(dim=-1), max(1, int((best == i).sum()))) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("share", [{}, {2: 0}, {1: 0}])
def test_keep_all_is_called_once_with_every_layer(share, llm_of):
    session = start(llm_of("g3"), OneBudget(), share=share)
    owners = [i for i in range(3) if i not in share]
    assert [owners] == SEEN
    kept = [x.kept[0][0] for x in session.report().layers if x.owner == x.layer]
    assert sum(kept) in range(50, 50 + len(kept)) and len(set(kept)) > 1


# ---- bits per layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FirstLayersBetter(Int):
    """8 bits in the first layer and 2 in the others."""

    group: int = 8
    residual: int = 8

    def at(self, layer, n_layers):
        bits = 8 if layer == 0 else 2
        return replace(self, k=bits, v=bits)


def test_a_store_may_have_other_bits_in_other_layers(llm_of, tmp_path):
    llm = llm_of("g3")
    plan = replace(Plan(), store=FirstLayersBetter())
    session = Session(llm.models, plan, 40)
    session.start([PROMPT])
    for t in range(20):
        session.feed(torch.tensor([[t]]))
    bits = [x.k_bits for x in session.report().layers]
    assert bits[0] > bits[1] + 4 and bits[1] == bits[2]
    assert [store.spec.k for store in session.cache.stores.values()] == [8, 2, 2]
    estimate = 3 * plan.fit(llm.config, torch.float32, 60, 40).device_bytes(llm.config, torch.float32, 60, 40)
    assert session.report().bytes <= estimate
    mean = [FirstLayersBetter(k=b, v=b).cost(llm.config, torch.float32, 0)[0] for b in (8, 2, 2)]
    assert plan.cost(llm.config, torch.float32)[0] == pytest.approx(sum(mean) / 3)


# ---- what a policy may ask for --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ValueAware(Scorer):
    """Scores a token by |W_o v|, and notes the token ids."""

    request = ScoreRequest(output_weights=True)

    def score(self, p):
        SEEN.append((p.layer, p.w_o, p.tokens.tolist(), p.seen))
        heads, D = p.v.shape[1], p.v.shape[3]
        w = p.w_o.view(p.w_o.shape[0], heads, -1, D)  # (C,Hkv,G,D)
        return torch.einsum("bhnd,chgd->bhngc", p.v.float(), w.float()).norm(dim=-1).mean(-1)


def test_a_policy_may_ask_for_the_output_projection_and_the_token_ids(llm_of):
    llm = llm_of("g3")
    session = start(llm, ValueAware(budget=20, every=4))
    for t in (7, 8, 9, 10):
        session.feed(torch.tensor([[t]]))
    weights = [block.self_attn.o_proj.weight for block in llm.models.decode.layers]
    assert [layer for layer, *_ in SEEN] == [0, 1, 2, 0, 1, 2]  # the prompt, and one rescore
    assert all(w is weights[layer] for layer, w, _, _ in SEEN)
    assert all(tokens == (PROMPT if n == 60 else [*PROMPT, 7, 8, 9, 10]) for _, _, tokens, n in SEEN)
    assert {n for *_, n in SEEN} == {60, 64}


# ---- state of stores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text_of_plan", ["full+fp8", "full+int4:group=8,residual=8", "full+quest:chunk=4,budget=8", "zipcache+mixed:high=4"]
)
def test_saved_state_is_the_stores_own_record(text_of_plan, llm_of, tmp_path):
    llm = llm_of("g3")
    session = llm.session(8, plan=parse(text_of_plan))
    session.start([PROMPT])
    save(llm, session, tmp_path / "a")
    for part in (p for s in session.cache.stores.values() for r in s.unpack() for p in r.parts if p.state is not None):
        assert isinstance(part.state, session.plan.store.state_type)
        again = type(part.state).from_tensors(part.state.tensors())
        assert {n: x.tolist() for n, x in again.tensors().items()} == {
            n: x.tolist() for n, x in part.state.tensors().items()
        }
    there = restore(llm, tmp_path / "a", 8)
    assert torch.equal(session.feed(torch.tensor([[3]])), there.feed(torch.tensor([[3]])))
