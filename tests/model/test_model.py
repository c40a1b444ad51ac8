"""The model against transformers: logits of tiny random models of every supported kind, in fp32."""

from __future__ import annotations

import pytest
import torch
from tiny import VARIANTS, text

from nanokv import parse
from nanokv.backends.torch_cpu import few_rows_linear


def logits_of(llm, ids: list[int], plan: str = "full", chunk: int | None = None, n: int = 12) -> torch.Tensor:
    """Logits after the prompt and after each of the last n tokens, fed one by one: (n+1, vocab)."""
    session = llm.session(n, chunk, parse(plan))
    out = [session.start([ids[:-n]])]
    out += [session.feed(torch.tensor([[i]])) for i in ids[-n:]]
    return torch.cat(out)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunk", [None, 13])
def test_logits_equal_those_of_transformers(name, chunk, tiny, llm_of):
    ids = text(90, seed=1)
    with torch.no_grad():
        theirs = tiny(name)[1](torch.tensor([ids])).logits[0, 77:]
    ours = logits_of(llm_of(name), ids, chunk=chunk)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["window-1", "mistral", "windows"])
def test_a_turn_of_many_tokens_sees_what_single_tokens_see(name, tiny, llm_of):
    ids, llm = text(60, seed=1), llm_of(name)
    for prompt in (1, 2, 40):
        session = llm.session(60)
        first = session.start([ids[:prompt]])
        ours = torch.cat((first, session.feed(torch.tensor([ids[prompt:]]), every_logit=True)[0]))
        with torch.no_grad():
            theirs = tiny(name)[1](torch.tensor([ids])).logits[0, prompt - 1 :]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama31", "mistral"])
def test_the_checks_above_notice_a_wrong_position(name, tiny, llm_of):
    ids = text(90, seed=1)
    session = llm_of(name).session(4)
    session.start([ids[:80]])
    session.pos = session.pos + 1
    ours = session.feed(torch.tensor([[ids[80]]]))
    with torch.no_grad():
        theirs = tiny(name)[1](torch.tensor([ids[:81]])).logits[0, -1:]
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["g3", "mistral"])
def test_backends_agree(name, backend, tiny, llm_of):
    from nanokv import load

    ids = text(90, seed=2)
    other = load(str(tiny(name)[0]), dtype="float32", backend=backend)
    torch.testing.assert_close(logits_of(other, ids), logits_of(llm_of(name), ids), atol=1e-4, rtol=1e-4)


def test_two_types_share_one_text(tiny):
    from nanokv import load

    mixed = load(str(tiny("g3")[0]), dtype="float32/float16")
    exact = load(str(tiny("g3")[0]), dtype="float32")
    assert mixed.dtypes == {"prefill": "float32", "decode": "float16"}
    ids = text(60, seed=3)
    error = (logits_of(mixed, ids).float() - logits_of(exact, ids)).abs().max()
    assert 0 < error < 0.06  # seen: 0.029 on logits up to 7.2


def test_keys_and_values_have_a_type_of_their_own(tiny, monkeypatch, tmp_path):
    """On a CPU that multiplies bf16 but no bf16 tiles, weights are fp16 for single tokens and the cache is bf16."""
    from nanokv import load
    from nanokv.save import restore, save
    from nanokv.stores import EXAMPLES
    from nanokv.summary import first_line

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("nanokv.device.free_bytes", lambda device: 2**40)
    mixed, exact = load(str(tiny("g3")[0])), load(str(tiny("g3")[0]), dtype="float32")
    assert mixed.dtypes == {"prefill": "bfloat16", "decode": "float16"}
    assert (mixed.cache_dtype, exact.cache_dtype) == ("bfloat16", "float32")
    assert "decode float16, cache bfloat16 (" in first_line(mixed, "full") and ", cache" not in first_line(
        exact, "full"
    )
    ids = text(60, seed=3)
    error = (logits_of(mixed, ids).float() - logits_of(exact, ids)).abs().max()
    assert 0 < error < 0.5
    session = mixed.session(20)
    session.start([ids])
    session.feed(torch.tensor([[4]]))
    session.feed(torch.tensor([[5, 6, 7]]))
    k, v = (planes[0] for planes in session.cache.stores[0].planes)
    assert k.dtype == v.dtype == torch.bfloat16
    save(mixed, session, tmp_path / "cache.kv")
    again = restore(mixed, tmp_path / "cache.kv", 4)
    assert torch.equal(again.feed(torch.tensor([[8]])), session.feed(torch.tensor([[8]])))
    other = load(str(tiny("g3")[0]), dtype="bfloat16/float16")  # as this CPU's own types were before
    refused = set()
    for store in (x for name, x in EXAMPLES.items() if name != "mixed"):
        session = other.session(20, plan=parse(f"full+{store}"))
        session.start([ids])
        save(other, session, tmp_path / "cache.kv")
        try:
            again = restore(mixed, tmp_path / "cache.kv", 4)
        except ValueError as e:
            assert "try --dtype float16" in str(e)
            refused.add(store.partition(":")[0])
            continue
        torch.testing.assert_close(
            again.feed(torch.tensor([[8]])), session.feed(torch.tensor([[8]])), atol=0.5, rtol=0, msg=store
        )
    assert refused == {"gear", "minicache"}  # their exact parts are of the run's type


def test_a_turn_of_many_tokens_equals_feeding_them_one_by_one(llm_of):
    llm, ids = llm_of("g3"), text(80, seed=4)
    one, many = llm.session(30), llm.session(30)
    one.start([ids[:50]])
    many.start([ids[:50]])
    for i in ids[50:]:
        last = one.feed(torch.tensor([[i]]))
    torch.testing.assert_close(many.feed(torch.tensor([ids[50:]])), last, atol=1e-4, rtol=1e-4)
    for session in (one, many):
        assert session.pos.item() == 80


PROMPTS = (
    "The three primary colours are",
    "Write a short letter to a friend who has moved to another city.",
    "def fibonacci(n):\n",
    "In 1969, the first people landed on the Moon. Their names were",
    "Explain in simple words why the sky is blue.",
)
CASES = [(prompt, chat, 64) for chat in (False, True) for prompt in PROMPTS]
FEW = [(PROMPTS[4], True, 24)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "chat", "n"), [*FEW, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in CASES)]
)
def test_smollm2_writes_the_same_tokens_as_transformers(prompt, chat, n, smollm):
    import transformers

    from weights.fetch import locate

    transformers.utils.logging.disable_progress_bar()
    oracle = transformers.AutoModelForCausalLM.from_pretrained(locate("smollm2-135m"), dtype=torch.float32).eval()
    words = smollm.tokenizer
    plain = words.chat([{"role": "user", "content": prompt}]) if chat else prompt
    ids = words.encode(plain, special=not chat)
    with torch.no_grad():
        theirs = oracle.generate(
            torch.tensor([ids]), max_new_tokens=n, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    turn = smollm.answer(smollm.session(n), [ids], limit=n, ignore_eos=True)
    list(turn)
    assert turn.ids[0] == theirs[0, len(ids) :].tolist()


def test_an_mlp_in_parts_computes_what_it_computes_at_once(llm_of, monkeypatch):
    mlp = llm_of("g3").models.prefill.layers[0].mlp
    x = torch.randn(3, 5, mlp.down_proj.out_features, generator=torch.Generator().manual_seed(0))
    right = mlp(x)
    parts, products = [], mlp._products
    monkeypatch.setattr("nanokv.model.llama.TOKENS_AT_ONCE", 4)
    monkeypatch.setattr(mlp, "_products", lambda part: parts.append(len(part)) or products(part))
    torch.testing.assert_close(mlp(x), right)
    assert parts == [4, 4, 4, 3]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_head_that_holds_nothing_adds_nothing(backend):
    from nanokv.backends import BACKENDS
    from nanokv.backends.base import merge

    q, k, v = (
        torch.randn(1, n, t, 16, generator=torch.Generator().manual_seed(1)) for n, t in ((4, 2), (2, 5), (2, 5))
    )
    kpos, now = torch.arange(5).expand(1, 2, 5), torch.tensor([[5, 6]])
    decode = BACKENDS[backend].decode
    out, lse, _ = decode(q, k, v, torch.tensor([[0, 3]]), kpos, now, None)
    assert (out[:, :2] == 0).all() and lse[:, :2].isneginf().all() and lse[:, 2:].isfinite().all()
    whole = decode(q, k, v, None, kpos, now, None)[:2]
    both, _ = merge([whole, (out.masked_fill(torch.ones_like(out).bool(), 0), lse.fill_(-torch.inf))])
    torch.testing.assert_close(both, whole[0])


@pytest.mark.parametrize("rows", [(1, 1), (1, 2), (2, 3), (1, 6), (1, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_few_rows_is_that_of_torch(rows, bias):
    dice = torch.Generator().manual_seed(0)
    x, weight, more = (torch.randn(n, generator=dice) for n in ((*rows, 40), (70, 40), (70,)))
    found = few_rows_linear(x, weight, more if bias else None)
    right = torch.nn.functional.linear(x.double(), weight.double(), more.double() if bias else None)
    torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)
    assert found.is_contiguous()
