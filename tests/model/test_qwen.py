"""The named Qwen2.5-Coder: what is fetched, as transformers reads it. Downloads half a gigabyte, so pytest -m exhaustive."""

from __future__ import annotations

import pytest
import torch

from nanokv import load, parse
from weights.fetch import locate

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow]
NAME = "qwen2.5-coder-0.5b"
TEXT = 'def quicksort(xs):\n    """Sort 12345 numbers, ünïcödé too."""\n' * 4


@pytest.fixture(scope="module")
def qwen():
    torch.set_num_threads(2)
    yield load(NAME, dtype="float32")
    torch.set_num_threads(1)


def test_logits_equal_those_of_transformers(qwen):
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(locate(NAME), dtype=torch.float32)
    ids = qwen.tokenizer.encode(TEXT)
    session = qwen.session(4, plan=parse("full"))
    ours = torch.cat([session.start([ids[:-3]]), *(session.feed(torch.tensor([[t]])) for t in ids[-3:])])
    with torch.no_grad():
        theirs = oracle(torch.tensor([ids])).logits[0, -4:]
    assert theirs.std() > 1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_texts_and_chats_are_encoded_as_by_transformers(qwen):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(locate(NAME))
    for text in (TEXT, "cafe\u0301 123456\n\n  x", "<|im_start|>user\nhi<|im_end|>", "日本語 'll 'S"):
        assert qwen.tokenizer.encode(text) == oracle(text)["input_ids"]
        assert qwen.tokenizer.decode(qwen.tokenizer.encode(text)) == oracle.decode(
            oracle(text)["input_ids"], skip_special_tokens=True
        )
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "x"}]
    assert qwen.tokenizer.chat(chat) == oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert oracle.eos_token_id in qwen.tokenizer.eos


def test_it_answers_and_ends(qwen):
    ids = qwen.tokenizer.encode(
        qwen.tokenizer.chat([{"role": "user", "content": "Say hello in one word."}]), special=False
    )
    answer = qwen.answer(qwen.session(40, plan=parse("snapkv:budget=50%+int4")), [ids], limit=40)
    text = "".join(piece for _, piece in answer)
    assert answer.reasons == ["eos"] and "hello" in text.lower()
