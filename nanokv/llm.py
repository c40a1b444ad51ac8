"""Text in, text out: a model with its tokenizer, plan and devices, and one answer at a time with its timings.

`load` finds and reads a model. `LLM.stream` is the short way; `LLM.answer` also takes several prompts, a question after the
prompt, and later turns.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from string import printable

import torch
from tqdm import tqdm

from nanokv import sensitivity
from nanokv.answer import Answer
from nanokv.backends import BACKENDS
from nanokv.backends.check import ALWAYS, verdicts
from nanokv.backends.choose import Check, choose
from nanokv.backends.triton import need_triton
from nanokv.backends.watch import Calls
from nanokv.cache.plan import Plan, nearest, parse
from nanokv.cache.report import Report, mib
from nanokv.compiled import CompileOptions
from nanokv.device import check_weights, choose_device, choose_precision, free_bytes
from nanokv.engine import Models, Session
from nanokv.inspect.finite import watch as watch_finite
from nanokv.model import loader
from nanokv.model.config import ModelConfig
from nanokv.model.presets import PRESETS
from nanokv.runner import RUNNERS, make
from nanokv.sharing import search
from nanokv.sharing.base import Sharing
from nanokv.speculate import Lookup, SecondSession, Speculation, check_plans, draft_plan
from nanokv.stores.quant.tuned import Tuned
from nanokv.text import tokenizer
from nanokv.text.sampler import Sampling
from weights.fetch import locate
from weights.from_gguf import GGUF
from weights.registry import MODELS, settings

PROBE = f"Text of all kinds: {printable} äßé €–“ \n\n\tdef f(x):\n        return 1234567890"


def load(
    model: str = "smollm2-135m",
    plan: str | Plan = "full",
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    runner: str = "auto",
    compile_options: CompileOptions | None = None,
    random_weights: bool = False,
    watch: bool = False,
    bar: bool = False,
) -> LLM:
    """A model by directory, .gguf file, name or hub id.

    dtype            auto, one type, or prefill/decode as in bfloat16/float16.
    compile_options  for runner compile.
    watch            note in `LLM.calls` which functions of the backend run.
    bar              show progress bars.

    Raises ValueError for whatever the user can mend: unknown names, damaged files, too little memory.
    """
    t0, notes = time.perf_counter(), []
    plan = parse(plan) if isinstance(plan, str) else plan
    if backend not in ("auto", "triton", *BACKENDS):
        raise ValueError(
            f"unknown backend {backend!r}{nearest(backend, [*BACKENDS, 'triton'])}; backends are auto, {', '.join(BACKENDS)}, triton"
        )
    if runner not in ("auto", *RUNNERS):
        raise ValueError(f"unknown runner {runner!r}{nearest(runner, RUNNERS)}; runners are auto, {', '.join(RUNNERS)}")
    where = choose_device(device)
    if backend == "triton":
        need_triton(where)  # at once, not after a download
    if random_weights:
        shape = MODELS[model].shape if model in MODELS else model
        if shape not in PRESETS:
            raise ValueError(
                f"no known shape {model!r}{nearest(model, MODELS)}; --random-weights builds one of {', '.join(MODELS)}"
            )
        config, vocabulary, tensors = PRESETS[shape], tokenizer.byte_level(), None
    else:
        path = locate(model, bar, notes.append)
        config, vocabulary, tensors = _source(path, notes)
        loader.check_size(config, tensors, str(path))
        if vocabulary.template is not None:
            vocabulary.renderer.start()  # beside the weights, which take longer
    use = choose_precision(config, where, dtype)
    check_weights(model, config, where, use)

    checked: dict[str, str] = {}

    def check(names: Sequence[str]) -> dict[str, str]:
        if missing := [name for name in names if name not in checked]:
            shape = config.num_attention_heads // config.num_key_value_heads, config.head_dim
            checked.update(verdicts(where, use.decode, shape, missing, settings().weights))
        return {name: checked[name] for name in names}

    ops = choose(backend, where, use.decode, (*ALWAYS, *plan.kernels), check)
    ops = ops if ops.has_kernels else replace(ops, linear=use.linear)
    calls = Calls() if watch else None
    ops = calls.watched(ops) if calls else ops
    runner = "eager" if settings().debug and runner == "auto" else runner  # a captured step cannot stop half way
    main = loader.empty(config, ops, where, use.prefill)
    if tensors is None:
        loader.randomise(main)
    else:
        loader.fill(main, tensors, str(path), bar)
    decode = loader.copy(main, ops, use.decode) if use.decode != use.prefill else main
    models = Models(main, decode, ops, make(runner, decode, compile_options), use.cache)
    if models.runner.name == "compile":
        notes.append("behind the first token torch.compile works for some time, less in later runs")
    if settings().debug and models.runner.name == "eager":
        for each in {main, decode}:
            watch_finite(each)
    name = f"{model} (random weights)" if random_weights else model
    llm = LLM(name, models, vocabulary, plan, use.why, time.perf_counter() - t0, calls)
    llm.notes = notes
    llm.check_kernels = check if ops.has_kernels and backend == "auto" else None
    llm.plan = llm.ready(plan)
    return llm


def _source(path: Path, notes: list[str]) -> tuple[ModelConfig, tokenizer.Tokenizer, list[loader.LazyTensor]]:
    """A directory or a .gguf file as (config, tokenizer, weights to read). What had to be guessed is added to `notes`."""
    if path.is_dir():
        config = ModelConfig.from_dir(path)
        tensors = list(loader.read(loader.find_shards(path)))
        return config, tokenizer.from_dir(path, config), tensors
    file = GGUF(path)
    with tempfile.TemporaryDirectory() as tmp:
        file.write_texts(Path(tmp))
        config = ModelConfig.from_dir(Path(tmp))
        vocabulary = tokenizer.from_dir(Path(tmp), config)
    notes += file.notes
    return config, vocabulary, list(file.tensors())


def _token_kinds(vocabulary: tokenizer.Tokenizer, n: int, device: torch.device) -> torch.Tensor:
    """(n,) uint8: what each token is, as a policy may ask."""
    return torch.tensor(vocabulary.kinds(n), dtype=torch.uint8, device=device)


class LLM:
    def __init__(
        self,
        name: str,
        models: Models,
        vocabulary: tokenizer.Tokenizer,
        plan: Plan,
        why_dtype: str,
        load_s: float,
        calls: Calls | None = None,
    ):
        self.calls = calls
        self.name, self.tokenizer, self.plan = name, vocabulary, plan
        kinds = partial(_token_kinds, vocabulary, models.decode.config.vocab_size, models.new_context().device)
        self.models = replace(models, token_kinds=cache(kinds), encode=vocabulary.encode_more)
        self.config, self.why_dtype, self.load_s = models.decode.config, why_dtype, load_s
        self.device = models.new_context().device
        self.last: Session | None = None
        # checks a plan's kernels; None where the user chose the backend, or it has none
        self.check_kernels: Check | None = None
        self.notes: list[str] = []  # what the user should know before the first answer

    @property
    def dtypes(self) -> dict[str, str]:
        both = {"prefill": self.models.prefill, "decode": self.models.decode}
        return {phase: str(m.embed_tokens.weight.dtype).removeprefix("torch.") for phase, m in both.items()}

    @property
    def cache_dtype(self) -> str:
        return str(self.models.new_context().dtype).removeprefix("torch.")

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chunk: int | None = None,
    ) -> Iterator[str]:
        """Yield the continuation of a prompt, piece by piece, under this model's plan."""
        session = self.session(max_new_tokens, chunk)
        ids = self.tokenizer.encode(prompt)
        for _, piece in self.answer(session, [ids], limit=max_new_tokens, sampling=sampling, seed=seed, stop=stop):
            yield piece

    def session(self, room: int, chunk: int | None = None, plan: Plan | None = None) -> Session:
        """A new session. room: tokens that will follow its prompt."""
        self.last = Session(self.models, self.ready(plan or self.plan), room, chunk)
        return self.last

    def fingerprint(self) -> str:
        """A hash of the shape and of the signs of some weights in each matrix, which are the same in every precision."""
        found = hashlib.sha256(
            f"{self.config}{self.config.full_attention_layers or ''}{self.config.shared_layers or ''}".encode()
        )
        for weight in self.models.prefill.parameters():
            flat = weight.detach().flatten()
            found.update((flat[:: max(1, len(flat) // 64)] < 0).cpu().numpy().tobytes())
        return found.hexdigest()[:32]

    def ready(self, plan: Plan) -> Plan:
        """The plan with its map of shared layers and its bits by layer: from the plan's file, from what was measured
        earlier, or measured and kept now.
        """
        for name, why in self.check_kernels(plan.kernels).items() if self.check_kernels else ():
            if why:
                raise ValueError(f"{plan} cannot run here: kernel {name} {why}; use --backend sdpa")
        if self.config.shared_layers and plan.sharer and not plan.share:
            raise ValueError(
                f"{self.name} was trained with shared layers, so no others can be found: leave {plan.names[-1]} out"
            )
        if not plan.store.calibrated:
            file = sensitivity.file_of(settings().weights, self.fingerprint(), plan.store)
            known = sensitivity.read(file, self.fingerprint(), self.config) if file.is_file() else None
            store = plan.store.with_sensitivity(known or self.measure_sensitivity(plan.store, file))
            plan = replace(plan, store=store, ready=plan.sharer is None or bool(plan.share))
        if plan.ready:
            return replace(plan, share=plan.share or self.config.shared_layers)
        plan.check_share(self.config.num_hidden_layers)
        want = plan.sharer
        file = Path(want.map) if want.map else search.map_file(settings().weights, self.fingerprint(), want)
        if want.map or file.is_file():
            layers = search.read_map(file, self.fingerprint(), self.config)
        else:
            layers = self.search(want, file)
        return replace(plan, share=layers, sharer=replace(want, layers=len(layers)), ready=True)

    def measure_sensitivity(self, store: Tuned, file: Path) -> sensitivity.Sensitivity:
        """Measure how much rounding each layer changes what this model predicts, and write it to `file`."""
        sensitivity.check_writable(file)
        t0, model = time.perf_counter(), self.models.prefill
        texts = sensitivity.passages(self.tokenizer, store.group)
        n = 1 + 2 * self.config.num_hidden_layers
        with tqdm(total=n, desc="bits by layer", unit="pass", leave=False, disable=not sys.stderr.isatty()) as bar:
            found = sensitivity.measure(model, self.models.ops, store, texts.to(self.device), bar.update)
        sensitivity.write(file, self.name, self.fingerprint(), found)
        self.notes.append(f"measured in {time.perf_counter() - t0:.0f} s how sensitive each layer is; kept in {file}")
        return found

    def search(self, want: Sharing, file: Path, accepted: Callable[[object], None] | None = None) -> dict[int, int]:
        """Search for the layers that can share and write the map to `file`. accepted(pair) is called for each
        accepted pair.
        """
        texts = search.calibration(self.tokenizer).to(self.device)
        with tqdm(total=want.layers, desc="shared layers", unit="", disable=not sys.stderr.isatty()) as bar:

            def tried(pair: search.Pair, good: bool) -> None:
                bar.set_postfix_str(f"{pair.reader} ← {pair.owner} {pair.similarity:.3f}")
                if good:
                    bar.update()
                    if accepted:
                        accepted(pair)

            layers, pairs = want.search(self.models.prefill, self.models.ops, texts, tried)
        search.write_map(file, self.name, self.fingerprint(), want, layers, pairs)
        return layers

    def speculation(self, draft: str = "lookup", tokens: int = 4, writer: LLM | None = None) -> Speculation:
        """Drafts of at most so many tokens, for one session of this model and its later turns.

        draft   lookup (the text itself), or the plan of a second session that writes them.
        writer  whose session that is: this model, or a smaller one that splits texts into the same tokens.

        ValueError if they cannot be written in this way.
        """
        plan, writer = draft_plan(draft), writer or self
        if plan is None:
            return Speculation(Lookup(), tokens)
        check_plans(Plan(), plan)
        if self.tokenizer.encode(PROBE) != writer.tokenizer.encode(PROBE):
            raise ValueError(f"{writer.name} cannot write drafts for {self.name}: it splits texts into other tokens")
        plan = writer.ready(plan)

        def start(text: list[int], room: int) -> Session:
            session = Session(writer.models, plan, room)
            try:
                writer.check_passes(session, [text])
                writer.check_memory(session, [text], room)
            except ValueError as e:
                raise ValueError(f"there is no room for drafts by {writer.name} · {draft}: {e}") from None
            session.start([text])
            return session

        return Speculation(SecondSession(f"{writer.name} · {draft}", plan, start), tokens)

    def report(self) -> Report | None:
        """The receipt (bytes and tokens held) of the newest session; None before its prompts are compressed."""
        return None if self.last is None else self.last.report()

    def answer(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        *,
        then: Sequence[int] = (),
        copies: int = 1,
        limit: int = 256,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        overflow: bool = False,
        speculation: Speculation | None = None,
        beams: int = 1,
        progress: Callable[[int], None] | None = None,
        on_compressed: Callable[[], None] | None = None,
    ) -> Answer:
        """Start a session with `prompts`, or continue it if there are none, and answer. The prompts are prefilled before
        this returns; iterate over the result for (row, piece of text).

        prompts        token ids, one prompt per row.
        then           token ids that every row is fed on the compressed cache, after the prompt.
        copies         how many rows share each prompt (samples).
        limit          new tokens per row, at most.
        sampling, seed how tokens are chosen; the default is greedy.
        stop           strings that end a row's text; they are not part of it. A special token ends it by its id. One
                       string is one stop.
        ignore_eos     go on after an end-of-sequence token.
        overflow       go on beyond the model's context.
        speculation    drafts that make decoding faster, for one row; keep it for the session's later turns.
        beams          more than one: beam search, with the likeliest text as the answer. No turn can follow it.
        progress       progress(n) is called after every n prompt tokens, and after those of scoring passes.
        on_compressed  called when all prompts are compressed, before anything follows.

        ValueError if the arguments contradict each other, or the cache would not fit into the free memory.
        """
        if (not prompts and not then) or (prompts and session.seen):
            raise ValueError("a new session begins with prompts, a later turn goes on with `then`")
        longest = max([len(p) for p in prompts] or session.seen) + len(then)
        max_len = self.config.max_position_embeddings
        if prompts and not all(prompts):
            raise ValueError("the prompt is empty; give a text with -p, --prompt-file or on standard input (-p -)")
        if limit < 1:
            raise ValueError(f"max-new-tokens is {limit}; give at least 1")
        if longest + limit > max_len and not overflow and not session.plan.policy.positions_by_chunk:
            text = f"{longest} tokens of prompt" if prompts else f"a text of {longest - len(then)}, {len(then)} more"
            raise ValueError(
                f"{text} and {limit} new ones are more than the {max_len} of this model's context; "
                f"{'shorten one of them' if prompts else 'begin anew'}, or go on regardless with --allow-overflow"
            )
        if session.is_searched:
            raise ValueError("a beam search ended this session; start a new one")
        if beams > self.config.vocab_size:
            raise ValueError(f"beams is {beams}; a model of {self.config.vocab_size} tokens has at most so many")
        if beams < 1 or (beams > 1 and (not prompts or len(prompts) * copies > 1 or speculation)):
            raise ValueError(f"beams is {beams}; give 1 or more, for one new prompt without copies and drafts")
        if beams > 1 and session.plan.policy.decide_after:
            raise ValueError(f"{session.plan.names[0]} decides after the first new token, when the beams have parted")
        if beams > 1 and sampling and sampling.temperature:
            raise ValueError(f"beam search is greedy and temperature is {sampling.temperature}; give 0, or one beam")
        if speculation and max(len(prompts) * copies, len(session.seen)) > 1:
            raise ValueError("drafts are written for one row; give one prompt and one copy, or no draft")
        if speculation:
            check_plans(session.plan, None)
        copies = max(copies, beams)
        if prompts and not overflow:
            self.check_passes(session, prompts, copies)
        if prompts:
            self.check_memory(session, prompts, len(then) + limit, copies)
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; give a whole number from 0 to 2^63 − 1")
        generator = torch.Generator(self.device).manual_seed(seed)
        stop = tuple(filter(None, (stop,) if isinstance(stop, str) else stop))
        answer = Answer(
            session, self.tokenizer, limit, sampling or Sampling(), generator, stop, ignore_eos, speculation, beams
        )
        answer.begin(prompts, then, copies, progress, on_compressed)
        return answer

    def check_passes(self, session: Session, prompts: Sequence[Sequence[int]], copies: int = 1) -> None:
        """Raise ValueError if the scoring passes that a policy asks for would stand beyond the model's context."""
        max_len = self.config.max_position_embeddings
        for p in prompts:
            again = max(session.pass_lengths(p, len(prompts) * copies), default=0)
            if again and len(p) + again > max_len:
                raise ValueError(
                    f"{session.plan.names[0]} scores a prompt of {len(p)} tokens with up to {again} more behind it, and this "
                    f"model's context is {max_len}; shorten the prompt or give smaller pieces (piece=); "
                    "generate.py goes on regardless with --allow-overflow"
                )

    def check_memory(self, session: Session, prompts: Sequence[Sequence[int]], room: int, copies: int = 1) -> None:
        """Raise ValueError if the cache cannot fit: what all layers keep, plus the uncompressed prompt of one layer, or of
        all layers if the policy or --chunk delays their compression.
        """
        context, plan = self.models.new_context(), session.plan
        config, dtype, on_cpu = self.config, context.dtype, self.device.type == "cpu"
        per_token, _ = plan.cost(config, dtype)
        dense, _ = Plan().cost(config, self.models.prefill.embed_tokens.weight.dtype)
        layers, need, n = plan.n_owners(config.num_hidden_layers), 0.0, len(prompts) * copies
        for p in prompts:
            fitted = plan.fit(config, dtype, len(p), room, n)
            here, on_host = (f(config, dtype, len(p), room) for f in (fitted.device_bytes, fitted.host_bytes))
            # on a CPU the host's memory is the same one; elsewhere two layers of it are in the staging buffer
            here += on_host * (1 if on_cpu else min(1, 2 / layers))
            again = max(session.pass_lengths(p, n), default=0)  # a scoring pass has keys and values of its own
            waiting = fitted.prompt_layers(len(p), config.num_hidden_layers, bool(session.chunk))
            prompt = waiting * len(p) + (layers if session.chunk else 1) * again
            need += copies * layers * here + prompt * dense
        shared = session.shared_tokens(prompts, copies)
        # rows without a prefix of their own: the first has it, and of several prompts one more while it is prefilled
        fewer = n - min(len(prompts), 2)
        need -= fewer * layers * per_token * min(shared, fitted.policy.max_kept(shared))
        free = free_bytes(self.device)
        if need > free:
            fits = max(0, int(free / (layers * per_token * n)) - room)
            raise ValueError(
                f"the cache of this prompt needs {mib(int(need))} and {mib(free)} are free; about {fits} tokens of prompt would fit "
                f"as they are, or give a policy with a smaller budget"
            )
