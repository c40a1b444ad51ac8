"""Drafts change when tokens are computed, never which: the same text, the same cache afterwards, the same distribution."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise, product

import pytest
import torch
from helpers import PLANS, every, first
from tiny import text, write_seeded
from torch.nn.functional import one_hot

from nanokv import Sampling, load, parse
from nanokv.speculate import Lookup, Speculation, check_draft, why_not
from nanokv.stores import EXAMPLES as STORES

ALL = [
    *PLANS,
    *(f"full+{store}" for name, store in STORES.items() if name != "mixed"),
    "mikv:budget=20,recent=0.3",
    "snapkv:budget=20,window=4+int4:group=4,residual=6",
]
CHECKS = [plan for plan in ALL if not why_not(parse(plan))]
N = 24


class Guesses:
    """Drafts from the right text, of which each token is another one with a chance of a third."""

    name = "guesses"

    def __init__(self, right: list[int]):
        self.right, self.dice = right, random.Random(0)

    def begin(self, *_):
        pass

    def propose(self, known: list[int], n: int, vocab: int):
        draft = [(t + (self.dice.random() < 1 / 3)) % vocab for t in self.right[len(known) :][:n]]
        return draft, one_hot(torch.tensor(draft, dtype=torch.long), vocab).float()


def answered(llm, plan: str, prompt: list[int], draft=None, tokens: int = 4, turn: list[int] = (), **options):
    """An answer and, after one more turn, a second one: the ids of both, and the session."""
    session, more = llm.session(0, plan=parse(plan)), {"ignore_eos": True, "limit": N, **options}
    session.reserve(3 * N + len(turn))
    speculation = draft if isinstance(draft, Speculation) else Speculation(draft, tokens) if draft else None
    one = llm.answer(session, [prompt], speculation=speculation, **more)
    list(one)
    rest = [] if one.unfed is None else [one.unfed]
    two = llm.answer(session, [], then=[*rest, *turn], speculation=speculation, **more)
    list(two)
    return one.ids[0], two.ids[0], session, speculation


def holds(session) -> list[torch.Tensor]:
    rows = [store.unpack()[0] for store in session.cache.stores.values()]
    return [x.float() for row in rows for part in row.parts for x in (part.pos, part.k, part.v)]


@pytest.mark.parametrize("plan", every(3, CHECKS))
@pytest.mark.parametrize("model", first(1, ["mistral", "g3", "bias"]))
def test_a_drafted_text_is_the_models_own(model, plan, llm_of):
    llm, prompt, turn = llm_of(model), text(50, 3), text(7, 4)
    one, two, session, _ = answered(llm, plan, prompt, turn=turn)
    right = [*prompt, *one, *turn, *two]
    drafted_one, drafted_two, drafted, speculation = answered(llm, plan, prompt, Guesses(right), turn=turn)
    assert (drafted_one, drafted_two) == (one, two)
    assert 0 < speculation.accepted < speculation.drafted
    assert drafted.seen == session.seen
    for mine, others in zip(holds(drafted), holds(session), strict=True):
        torch.testing.assert_close(mine, others, atol=2e-4, rtol=1e-3)


WRITERS = [
    "full",
    "streaming:sink=2,recent=10",
    "streaming:sink=2,recent=10,positions=cache",
    "snapkv:budget=20,window=4",
    "simlayer:threshold=0.45,sink=2,recent=16,window=4+int4:group=4,residual=6",
    "full+quest:chunk=4,budget=8,local=1",
]


@pytest.mark.parametrize("plan", every(3, CHECKS))
def test_tried_tokens_have_the_logits_of_single_steps(plan, llm_of):
    llm, prompt, more = llm_of("g3"), text(50, 3), text(5, 4)
    steps, tries = (llm.session(20, plan=llm.ready(parse(plan))) for _ in range(2))
    for session in (steps, tries):
        session.start([prompt])
    right = torch.stack([steps.feed(torch.tensor([[token]]))[0] for token in more])
    found = tries.try_tokens(torch.tensor([more[:2]]))[0], tries.try_tokens(torch.tensor([more[2:]]))[0]
    torch.testing.assert_close(torch.cat(found), right, atol=2e-4, rtol=1e-4)
    tries.accept(0)
    again = torch.stack([tries.feed(torch.tensor([[token]]))[0] for token in more])
    torch.testing.assert_close(again, right, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("store", ["dense", "int4:group=4,residual=6", "ragged"])
def test_a_single_tried_token_sees_what_is_stored_and_itself(store, llm_of):
    """A writer of drafts tries its tokens one by one. Nothing is stored, so no slot is read that holds no token."""
    llm, prompt = llm_of("g3"), text(50, 3)
    steps, tries = (llm.session(20, plan=llm.ready(parse(f"full+{store}"))) for _ in range(2))
    for session in (steps, tries):
        session.start([prompt])
    right, found = steps.feed(torch.tensor([[7]])), tries.try_tokens(torch.tensor([[7]]))[0]
    torch.testing.assert_close(found, right, atol=2e-4, rtol=1e-4)


def test_an_error_within_a_draft_leaves_a_session_that_says_so(llm_of, monkeypatch):
    llm, draft = llm_of("g3"), llm_of("g3").speculation("streaming:sink=2,recent=10")
    session = llm.session(40)
    answer = llm.answer(session, [text(50, 3)], limit=9, ignore_eos=True, speculation=draft)
    with monkeypatch.context() as patch:

        def broken(*_):
            raise KeyboardInterrupt

        patch.setattr("nanokv.speculate.check_draft", broken)
        with pytest.raises(KeyboardInterrupt):
            list(answer)
    assert not session.intact
    right = answered(llm, "full", text(50, 3), turn=text(7, 4))[:2]
    assert answered(llm, "full", text(50, 3), draft, turn=text(7, 4))[:2] == right


@pytest.mark.parametrize(("size", "writer_size"), [(96, 128), (128, 96)])
def test_models_of_one_vocabulary_may_pad_it_differently(size, writer_size, tmp_path):
    llms = {}
    for n in (size, writer_size):
        write_seeded(tmp_path / str(n), vocab_size=n, architectures=["LlamaForCausalLM"], model_type="llama")
        llms[n] = load(str(tmp_path / str(n)), dtype="float32")
    llm, sampling = llms[size], Sampling(temperature=3.0)
    answer = llm.answer(
        llm.session(60),
        [text(20)],
        limit=60,
        sampling=sampling,
        ignore_eos=True,
        speculation=llm.speculation("full", writer=llms[writer_size]),
    )
    list(answer)
    assert len(answer.ids[0]) == 60 and answer.speculation.drafted


def test_a_draft_that_has_no_room_is_told_before_anything_is_fed(llm_of, monkeypatch):
    llm = llm_of("g3")
    session, draft = llm.session(9), llm.speculation("full")
    monkeypatch.setattr("nanokv.llm.free_bytes", lambda device: 3000)
    with pytest.raises(ValueError, match="needs"):
        llm.answer(session, [text(20)], limit=9, speculation=draft)
    monkeypatch.undo()
    rooms = iter([10**9, 3000])
    monkeypatch.setattr("nanokv.llm.free_bytes", lambda device: next(rooms))
    with pytest.raises(ValueError, match=r"there is no room for drafts by .+ · full: the cache"):
        llm.answer(session, [text(20)], limit=9, speculation=draft)
    assert session.seen == []


def test_drafts_go_on_after_a_turn_without_them(llm_of):
    llm, turn = llm_of("g3"), text(7, 4)
    texts = []
    for draft in (None, llm.speculation("full")):
        session = llm.session(200)
        for speculation in (draft, None, draft, draft):
            begin = {"then": turn} if session.seen else {}
            answer = llm.answer(session, [] if begin else [text(50, 3)], limit=9, speculation=speculation, **begin)
            list(answer)
            texts.append(answer.ids)
    assert texts[:4] == texts[4:]
    assert draft.drafted


@pytest.mark.parametrize("draft", every(3, WRITERS))
def test_a_second_session_writes_drafts(draft, llm_of):
    llm, prompt, turn = llm_of("g3"), text(50, 3), text(7, 4)
    one, two, _, _ = answered(llm, "full", prompt, turn=turn)
    mine = answered(llm, "full", prompt, llm.speculation(draft), turn=turn)
    assert mine[:2] == (one, two)
    # the last pass of each answer is given fewer tokens than a draft may have
    assert mine[3].accepted == mine[3].drafted if draft == "full" else mine[3].drafted


def test_a_smaller_model_may_write_the_drafts(llm_of):
    prompt, turn = text(50, 3), text(7, 4)
    right = answered(llm_of("deep"), "full", prompt, turn=turn)[:2]
    assert (
        answered(llm_of("deep"), "full", prompt, llm_of("deep").speculation("full", writer=llm_of("g3")), turn=turn)[:2]
        == right
    )


@pytest.mark.parametrize("stop_after", every(3, range(1, 7)))
def test_a_text_that_stops_within_a_draft_goes_on_as_if_there_had_been_none(stop_after, llm_of):
    llm, prompt, turn = llm_of("g3"), text(50, 3), text(7, 4)
    one = answered(llm, "full", prompt, turn=turn)[0]
    stop = llm.tokenizer.decode([one[stop_after]])
    found, two, session, _ = answered(llm, "full", prompt, turn=turn, stop=stop)
    right = [*prompt, *one]
    drafted = answered(llm, "full", prompt, Guesses(right), turn=turn, stop=stop)
    assert drafted[:2] == (found, two)
    assert drafted[2].seen == session.seen


@pytest.mark.parametrize("plan", [plan for plan in ALL if why_not(parse(plan))])
def test_a_plan_that_cannot_check_drafts_is_refused(plan, llm_of):
    with pytest.raises(ValueError, match=r"cannot check drafts: it .+; use another plan, or no draft"):
        answered(llm_of("g3"), plan, text(50), Lookup())


def test_drafts_are_for_one_row(llm_of):
    llm = llm_of("g3")
    for prompts, copies in (([text(9), text(9)], 1), ([text(9)], 2)):
        with pytest.raises(ValueError, match="for one row"):
            llm.answer(llm.session(4), prompts, copies=copies, limit=4, speculation=Speculation(Lookup()))


@pytest.mark.parametrize("plan", ["h2o:budget=20", "snapkv:budget=20,window=4,every=5"])
def test_a_plan_that_cannot_write_drafts_is_refused(plan, llm_of):
    with pytest.raises(ValueError, match="cannot write drafts: it scores its tokens"):
        llm_of("g3").speculation(plan)


def test_lookup_finds_the_longest_match_and_of_several_the_last():
    def loop(ids: list[int], ngram: int, n: int) -> list[int]:
        best = (0, 0)  # length of the match, where it ends
        for end in range(1, len(ids)):
            size = 0
            while size < min(ngram, end) and ids[end - 1 - size] == ids[-1 - size]:
                size += 1
            best = max(best, (size, end))
        return ids[best[1] :][:n] if best[0] else []

    for seed in range(300):
        dice = random.Random(seed)
        ids = [dice.randrange(4) for _ in range(dice.randint(1, 30))]
        ngram, n = dice.randint(1, 4), dice.randint(1, 6)
        draft, q = Lookup(ngram).propose(ids, n, 4)
        assert draft == loop(ids, ngram, n)
        assert q.tolist() == [[float(i == t) for i in range(4)] for t in draft]


class Chain:
    """A session whose next token depends on the last one only: row t of a table are the logits after token t."""

    def __init__(self, table: torch.Tensor):
        self.table, self.pos, self.seen, self.n_tried, self.cache = table, torch.zeros(1, 1), [1], 0, self

    def next_piece(self, n: int, seen: list[int]) -> int:
        return n

    def try_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        self.n_tried = tokens.shape[1]
        return self.table[tokens]

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens[:, -1]]

    def accept(self, n: int) -> None:
        self.n_tried = 0


class OtherChain:
    name = "other chain"

    def __init__(self, table: torch.Tensor, dice: torch.Generator):
        self.q, self.dice = table.softmax(-1), dice

    def begin(self, *_):
        pass

    def propose(self, known: list[int], n: int, vocab: int):
        draft = [known[-1]]
        for _ in range(n):
            draft.append(int(torch.multinomial(self.q[draft[-1]], 1, generator=self.dice)))
        return draft[1:], self.q[draft[:-1]]


@pytest.mark.parametrize("drafts_by", ["another chain", "the same chain", "lookup"])
def test_a_drafted_text_has_the_models_distribution(drafts_by):
    """Chi-square over all texts of three tokens of three kinds, after the token 0. The 0.9999 quantile for 26 degrees of
    freedom is 62."""
    table = torch.tensor([[1.0, 0.0, -1.0], [0.5, -0.5, 1.5], [-1.0, 2.0, 0.0]])
    dice, n, p = torch.Generator().manual_seed(5), 2000, table.softmax(-1).tolist()
    other = {"another chain": table.flip(0), "the same chain": table}
    draft = OtherChain(other[drafts_by], dice) if drafts_by in other else Lookup()
    counts, drafted = Counter(), 0
    for _ in range(n):
        session, speculation = Chain(table), Speculation(draft, 2)
        speculation.begin(session, [0], 3, Sampling(temperature=1.0), dice)
        counts[tuple(int(x) for x in speculation.generate(session, table[:1], 3))] += 1
        drafted += speculation.drafted
    chi2 = 0.0
    for found in product(range(3), repeat=3):
        expected = n
        for a, b in pairwise((0, *found)):
            expected *= p[a][b]
        chi2 += (counts[found] - expected) ** 2 / expected
    assert chi2 < 62
    assert drafted > n / 3


def test_a_draft_is_cut_at_its_first_rejected_token():
    q, p = one_hot(torch.tensor([3, 1, 2]), 4).float(), one_hot(torch.tensor([3, 0, 2, 1]), 4).float()
    assert check_draft([3, 1, 2], q, p, None) == [3, 0]
    assert check_draft([3], q[:1], p[:2], None) == [3, 0]
    assert check_draft([], q[:0], p[:1], None) == [3]
