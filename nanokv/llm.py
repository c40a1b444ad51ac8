"""Text in, text out: a model with its tokenizer, plan and devices, and one answer at a time with its timings.

`load` finds and reads a model; `LLM.stream` is the short way, `LLM.turn` the one with rows, questions and continuations.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from nanokv.answer import Turn
from nanokv.backends import BACKENDS
from nanokv.backends.triton import triton_for
from nanokv.cache.plan import Plan, nearest, parse
from nanokv.cache.report import Report, mib
from nanokv.device import check_weights, choose_device, choose_precision, free_bytes
from nanokv.engine import Models, Session
from nanokv.model import loader
from nanokv.model.config import ModelConfig
from nanokv.model.presets import PRESETS
from nanokv.runner import RUNNERS, make
from nanokv.sharing.kvsharer import KVSharer
from nanokv.text import tokenizer
from nanokv.text.sampler import Sampling



def load(
    model: str = "smollm2-135m",
    plan: str | Plan = "full",
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    runner: str = "auto",
    random_weights: bool = False,
    bar: bool = False,
) -> LLM:
    """A model by directory, .gguf file, name or hub id. dtype: auto, one type, or prefill/decode as in bfloat16/float16.

    Raises ValueError for whatever the user can mend: unknown names, damaged files, too little memory.
    """
    from weights.fetch import locate
    from weights.registry import MODELS

    t0 = time.perf_counter()
    plan = parse(plan) if isinstance(plan, str) else plan
    if backend not in ("auto", "triton", *BACKENDS):
        raise ValueError(
            f"unknown backend {backend!r}{nearest(backend, [*BACKENDS, 'triton'])}; backends are auto, {', '.join(BACKENDS)}, triton"
        )
    if runner not in ("auto", *RUNNERS):
        raise ValueError(f"unknown runner {runner!r}{nearest(runner, RUNNERS)}; runners are auto, {', '.join(RUNNERS)}")
    where = choose_device(device)
    ops = triton_for(where) if backend == "triton" else BACKENDS["sdpa" if backend == "auto" else backend]
    if random_weights:
        shape = MODELS[model].shape if model in MODELS else model
        if shape not in PRESETS:
            raise ValueError(
                f"no known shape {model!r}{nearest(model, MODELS)}; --random-weights builds one of {', '.join(MODELS)}"
            )
        config, words, read = PRESETS[shape], tokenizer.byte_level(), lambda m, bar: loader.randomise(m)
    else:
        config, words, read = _source(locate(model, bar))
    use = choose_precision(config, where, dtype)
    check_weights(model, config, where, use)
    ops = ops if backend == "triton" else replace(ops, linear=use.linear)
    main = loader.empty(config, ops, where, use.prefill)
    read(main, bar)
    decode = loader.copy(main, ops, use.decode) if use.decode != use.prefill else main
    models = Models(main, decode, ops, make(runner, decode))
    name = f"{model} (random weights)" if random_weights else model
    llm = LLM(name, models, words, plan, use.why, time.perf_counter() - t0)
    llm.plan = llm.ready(plan)
    return llm


def _source(path: Path) -> tuple[ModelConfig, tokenizer.Tokenizer, Callable]:
    """A directory or a .gguf file as (config, tokenizer, how to fill a model)."""
    if path.is_dir():
        config, files = ModelConfig.from_dir(path), loader.find_shards(path)
        return (
            config,
            tokenizer.from_dir(path, config),
            lambda m, bar: loader.fill(m, loader.read(files), str(path), bar),
        )
    from weights.from_gguf import GGUF

    file = GGUF(path)
    with tempfile.TemporaryDirectory() as tmp:
        file.write_texts(Path(tmp))
        config = ModelConfig.from_dir(Path(tmp))
        words = tokenizer.from_dir(Path(tmp), config)
    return config, words, lambda m, bar: loader.fill(m, file.tensors(), str(path), bar)


class LLM:
    def __init__(
        self, name: str, models: Models, words: tokenizer.Tokenizer, plan: Plan, why_dtype: str, load_s: float
    ):
        self.name, self.models, self.tokenizer, self.plan = name, models, words, plan
        self.config, self.why_dtype, self.load_s = models.decode.config, why_dtype, load_s
        self.device = models.context.device
        self.last: Session | None = None

    @property
    def dtypes(self) -> dict[str, str]:
        both = {"prefill": self.models.prefill, "decode": self.models.decode}
        return {phase: str(m.embed_tokens.weight.dtype).removeprefix("torch.") for phase, m in both.items()}

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        chunk: int | None = None,
    ) -> Iterator[str]:
        """The continuation of a prompt, piece by piece, under this model's plan."""
        session = self.session(max_new_tokens, chunk)
        ids = self.tokenizer.encode(prompt)
        for _, piece in self.turn(session, [ids], limit=max_new_tokens, sampling=sampling, seed=seed, stop=stop):
            yield piece

    def session(self, room: int, chunk: int | None = None, plan: Plan | None = None) -> Session:
        """A new text; room: tokens that will follow its prompt."""
        self.last = Session(self.models, self.ready(plan or self.plan), room, chunk)
        return self.last

    def fingerprint(self) -> str:
        """Of the shape, and of signs of weights all over the model: these are the same in every precision."""
        found = hashlib.sha256(repr(self.config).encode())
        for weight in self.models.prefill.parameters():
            flat = weight.detach().flatten()
            found.update((flat[:: max(1, len(flat) // 64)] < 0).cpu().numpy().tobytes())
        return found.hexdigest()[:32]

    def ready(self, plan: Plan) -> Plan:
        """The plan with its map of shared layers: that of its file, of an earlier search, or of one made now and kept."""
        if plan.ready:
            return plan
        from nanokv.sharing import search as share
        from weights.registry import settings

        want, found = plan.sharer, share.place(settings().weights, self.fingerprint(), plan.sharer)
        if want.map or found.is_file():
            layers = share.stored(
                Path(want.map) if want.map else found, self.fingerprint(), self.config.num_hidden_layers
            )
        else:
            layers = self.search(want, found)
        return replace(plan, share=layers, sharer=replace(want, layers=len(layers)), ready=True)

    def search(self, want: KVSharer, file: Path, say: Callable[[object], None] | None = None) -> dict[int, int]:
        """Search for the layers that can share and write the map. say(pair) is told of those that are accepted."""
        from nanokv.sharing import search as share

        texts = share.calibration(self.tokenizer).to(self.device)
        with tqdm(total=want.layers, desc="shared layers", unit="", disable=not sys.stderr.isatty()) as bar:

            def tick(pair: share.Pair, good: bool) -> None:
                bar.set_postfix_str(f"{pair.reader} ← {pair.owner} {pair.similarity:.3f}")
                if good:
                    bar.update()
                    (say or (lambda _: None))(pair)

            layers, pairs = share.search(self.models.prefill, self.models.ops, texts, want, tick)
        share.write(file, self.name, self.fingerprint(), want, layers, pairs)
        return layers

    def report(self) -> Report | None:
        """The receipt of the last text."""
        return None if self.last is None else self.last.report()

    def turn(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        *,
        then: Sequence[int] = (),
        copies: int = 1,
        limit: int = 256,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        overflow: bool = False,
        tick: Callable[[int], None] | None = None,
        compressed: Callable[[], None] | None = None,
    ) -> Turn:
        """Start a session with `prompts` (none: it goes on) and answer; `then` follows on the compressed cache.

        tick(n) is told of every n prompt tokens done, compressed() when all are and before anything follows.
        """
        if (not prompts and not then) or (prompts and session.seen):
            raise ValueError("a new session begins with prompts, a later turn goes on with `then`")
        longest = max([len(p) for p in prompts] or session.seen) + len(then)
        top = self.config.max_position_embeddings
        if prompts and not all(prompts):
            raise ValueError("the prompt is empty; give a text with -p, --prompt-file or on standard input (-p -)")
        if limit < 1:
            raise ValueError(f"max-new-tokens is {limit}; give at least 1")
        if longest + limit > top and not overflow:
            raise ValueError(
                f"{longest} tokens of prompt and {limit} new ones are more than the {top} of this model's context; "
                "shorten one of them, or go on regardless with --allow-overflow"
            )
        if prompts:
            self._check_cache(session, prompts, len(then) + limit, copies)
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; give a whole number from 0 to 2^63 − 1")
        dice = torch.Generator(self.device).manual_seed(seed)
        turn = Turn(session, self.tokenizer, limit, sampling or Sampling(), dice, tuple(filter(None, stop)), ignore_eos)
        turn.begin(prompts, then, copies, tick, compressed)
        return turn

    def _check_cache(self, session: Session, prompts: Sequence[Sequence[int]], room: int, copies: int) -> None:
        """Raise before the work if the cache cannot fit: kept tokens of all layers and one layer's whole prompt."""
        context, plan = self.models.context, session.plan
        per_token, _ = plan.cost(self.config, context.dtype)
        dense, _ = Plan().cost(self.config, self.models.prefill.embed_tokens.weight.dtype)
        layers, need, n = self.config.num_hidden_layers - len(plan.share), 0.0, len(prompts) * copies
        for p in prompts:
            fitted = plan.fit(self.config, context.dtype, len(p), room, n)
            whole = layers if session.chunk or fitted.keep.wait else 1
            sizes = [f(self.config, context.dtype, len(p), room) for f in (fitted.held, fitted.hosted)]
            # on a CPU the host's memory is the same; elsewhere two layers of it are on their way
            here = sizes[0] + sizes[1] * (1 if self.device.type == "cpu" else min(1, 2 / layers))
            need += copies * layers * here + whole * len(p) * dense
        free = free_bytes(self.device)
        if need > free:
            fits = max(0, int(free / (layers * per_token * n)) - room)
            raise ValueError(
                f"the cache of this prompt needs {mib(int(need))} and {mib(free)} are free; about {fits} tokens of prompt would fit "
                f"as they are, or give a policy with a smaller budget"
            )
