"""Beam search: the texts and scores of transformers under the full cache, and under every plan scores that hold."""

from __future__ import annotations

import pytest
import torch
from helpers import PLANS, every, first
from tiny import text

from nanokv import Sampling, engine, parse
from nanokv.beam import search
from nanokv.stores import EXAMPLES as STORES

STORED = [f"full+{store}" for name, store in STORES.items() if name != "mixed"]
ALL = [plan for plan in [*PLANS, *STORED, "mikv:budget=20,recent=0.3"] if not parse(plan).policy.decide_after]


def found(llm, plan: str, prompt: list[int], n: int, beams: int, **options) -> list[tuple[float, list[int]]]:
    session = llm.session(n, plan=llm.ready(parse(plan)))
    logits = session.start([prompt], copies=beams)
    return search(session, logits, n, **options)


@pytest.mark.parametrize("ends", [(), (5, 17, 40, 63, 80)])
@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (5, 0.0), (4, 2.0)])
@pytest.mark.parametrize("model", first(1, ["g3", "bias"]))
def test_texts_and_scores_are_those_of_transformers(model, beams, penalty, ends, tiny, llm_of):
    prompt = text(20, 3)
    with torch.no_grad():
        right = tiny(model)[1].generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, 20),
            max_new_tokens=12,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=penalty,
            do_sample=False,
            early_stopping=False,
            eos_token_id=list(ends) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    mine = found(llm_of(model), "full", prompt, 12, beams, ends=ends, length_penalty=penalty)
    for (score, ids), theirs, their_score in zip(mine, right.sequences[:, 20:], right.sequences_scores, strict=True):
        assert ids == theirs.tolist()[: len(ids)]
        assert score == pytest.approx(their_score.item(), abs=1e-3)


@pytest.mark.parametrize("plan", every(12, ALL))
@pytest.mark.parametrize("shared", [10, 1000])
def test_every_beams_score_is_what_its_text_scores_alone(plan, shared, llm_of, monkeypatch):
    monkeypatch.setattr(engine, "SHARED_AT_LEAST", shared)
    llm, prompt, n = llm_of("g3"), text(50, 3), 12
    texts = found(llm, plan, prompt, n, 3, ends=())
    assert len({tuple(ids) for _, ids in texts}) == 3 and texts == sorted(texts, reverse=True)
    for score, ids in texts:
        session, total = llm.session(n, plan=llm.ready(parse(plan))), 0.0
        logits = session.start([prompt])
        for token in ids:
            total += logits.log_softmax(-1)[0, token].item()
            logits = session.feed(torch.tensor([[token]]))
        assert score == pytest.approx(total / n, abs=1e-3)


def test_the_best_text_is_the_answer(llm_of):
    llm, prompt = llm_of("g3"), text(20, 3)
    answer = llm.answer(llm.session(12), [prompt], limit=12, ignore_eos=True, beams=4)
    pieces = "".join(piece for _, piece in answer)
    ids = found(llm, "full", prompt, 12, 4, ends=())[0][1]
    assert answer.ids == [ids] and answer.texts == [pieces] and answer.reasons == ["length"]
    assert answer.counted == 12 and answer.decode_s > 0
    with pytest.raises(ValueError, match="a beam search ended this session"):
        llm.answer(answer.session, [], then=prompt, limit=4)


def test_an_interrupted_search_answers_with_the_best_so_far(llm_of):
    llm = llm_of("g3")
    answer = llm.answer(llm.session(12), [text(20, 3)], limit=12, ignore_eos=True, beams=4)
    answer.interrupted = True
    assert list(answer) and answer.reasons == ["interrupted"] and len(answer.ids[0]) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"copies": 2}, "for one new prompt without copies and drafts"),
        ({"sampling": Sampling(temperature=1.0)}, "beam search is greedy and temperature is 1.0"),
        ({"beams": 0}, "beams is 0; give 1 or more"),
        ({"beams": 97}, "a model of 96 tokens has at most so many"),
    ],
)
def test_what_beams_cannot_do_is_told(options, reason, llm_of):
    llm = llm_of("g3")
    with pytest.raises(ValueError, match=reason):
        llm.answer(llm.session(4), [text(9)], limit=4, **{"beams": 2, **options})


def test_a_policy_that_decides_later_is_refused(llm_of):
    llm = llm_of("g3")
    plan = parse("simlayer:variant=decode,threshold=0,sink=2,recent=16")
    with pytest.raises(ValueError, match="decides after the first new token"):
        llm.answer(llm.session(4, plan=plan), [text(9)], limit=4, beams=2)
