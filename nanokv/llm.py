"""Text in, text out: a model with its tokenizer, plan and devices, and one answer at a time with its timings.

`load` finds and reads a model; `LLM.stream` is the short way, `LLM.turn` the one with rows, questions and continuations.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from nanokv import loader, tokenizer
from nanokv.cache import Report, mib
from nanokv.config import PRESETS, ModelConfig
from nanokv.engine import Models, Session, generate
from nanokv.ops import BACKENDS, Ops, linear, row_linear, triton
from nanokv.plan import Plan, nearest, parse
from nanokv.runner import RUNNERS, make
from nanokv.sampler import Sampling, sample
from nanokv.shares import KVSharer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


TURN = 512  # tokens of a turn that are fed at once


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
    where = _device(device)
    ops = _triton(where) if backend == "triton" else BACKENDS["sdpa" if backend == "auto" else backend]
    if random_weights:
        shape = MODELS[model].shape if model in MODELS else model
        if shape not in PRESETS:
            raise ValueError(
                f"no known shape {model!r}{nearest(model, MODELS)}; --random-weights builds one of {', '.join(MODELS)}"
            )
        config, words, read = PRESETS[shape], tokenizer.byte_level(), lambda m, bar: loader.randomise(m)
    else:
        config, words, read = _source(locate(model, bar))
    use = _precision(config, where, dtype)
    _check_weights(model, config, where, use)
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
        from nanokv import share
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
        from nanokv import share

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


@dataclass
class Turn:
    """One answer in the making: iterate for (row, piece of text); afterwards the fields tell what happened."""

    session: Session
    tokenizer: tokenizer.Tokenizer
    limit: int
    sampling: Sampling
    dice: torch.Generator
    stop: tuple[str, ...]
    ignore_eos: bool
    prompt_tokens: int = 0
    lengths: list[int] = field(default_factory=list)  # of the prompts that started the session
    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    prefill_s: float = 0.0
    compile_s: float = 0.0
    decode_s: float = 0.0  # of the steps after the first, which is the warm-up, but those that compiled
    counted: int = 0  # tokens that came in decode_s, of rows that had not ended
    unfed: int | None = None  # row 0's last token, where the next turn must feed it first
    interrupted: bool = False  # set from outside, at any time; the answer ends after the step in progress
    logits: torch.Tensor | None = None
    streams: list[Stopper] = field(default_factory=list)

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        then: Sequence[int],
        copies: int,
        tick: Callable[[int], None] | None,
        compressed: Callable[[], None] | None,
    ) -> None:
        t0, session = time.perf_counter(), self.session
        if prompts:
            self.logits = session.start(prompts, copies, tick)
        if compressed:
            compressed()
        if then:
            session.reserve(len(then) + self.limit)
            rows = torch.tensor([list(then)], device=session.pos.device).expand(len(session.seen), -1)
            step = session.chunk or TURN  # pieces bound the scores; each enters the cache before the next one reads it
            for a in range(0, len(then), step):
                self.logits = session.feed(rows[:, a : a + step])
        _wait(session.pos.device)
        self.prefill_s = time.perf_counter() - t0
        self.lengths = [len(p) for p in prompts]
        self.prompt_tokens = sum(self.lengths) + len(then)
        n = len(session.seen)
        self.ids, self.texts, self.reasons = [[] for _ in range(n)], [""] * n, [None] * n
        before = [list(then)] * n if then else [list(p) for p in prompts for _ in range(copies)]
        self.streams = [Stopper(tokenizer.Stream(self.tokenizer, ids), self.stop) for ids in before]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        clock, column, runner = 0.0, None, self.session.models.runner
        before = compiled = runner.compile_s
        for i, column in enumerate(generate(self.session, self.logits, self.limit, self._pick)):
            tokens = column.tolist()
            if i > 1 and runner.compile_s == compiled:  # a step that compiled is no common one
                self.decode_s += time.perf_counter() - clock
                self.counted += self.reasons.count(None)
            self.unfed = tokens[0] if self.ignore_eos or tokens[0] not in self.tokenizer.eos else None
            for row, token in enumerate(tokens):
                yield from self._take(row, token, last=i + 1 == self.limit)
            if self.interrupted:
                for row, reason in enumerate(self.reasons):
                    if reason is None:
                        self.reasons[row] = "interrupted"
                        yield from self._emit(row, self.streams[row].end())
            if all(self.reasons):
                break
            compiled, clock = runner.compile_s, time.perf_counter()
        self.compile_s += runner.compile_s - before
        if self.session.open:  # a policy that waits has seen no token yet: give it the one it needs to decide
            self.session.feed(column[:, None])
            self.unfed = None

    def _pick(self, logits: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return sample(logits, self.sampling, self.dice)

    def _take(self, row: int, token: int, last: bool) -> Iterator[tuple[int, str]]:
        if self.reasons[row]:
            return  # an ended row decodes into its own slots until all have ended
        if token in self.tokenizer.eos and not self.ignore_eos:
            self.reasons[row] = "eos"
            yield from self._emit(row, self.streams[row].end())
            return
        self.ids[row].append(token)
        yield from self._emit(row, self.streams[row].push(token))
        if self.streams[row].stopped:
            self.reasons[row] = "stop"
        elif last:
            self.reasons[row] = "length"
            yield from self._emit(row, self.streams[row].end())

    def _emit(self, row: int, piece: str) -> Iterator[tuple[int, str]]:
        if piece:
            self.texts[row] += piece
            yield row, piece


class Stopper:
    """A text stream that ends before the first stop string, and holds back what could be the beginning of one."""

    def __init__(self, stream: tokenizer.Stream, stop: tuple[str, ...]):
        self.stream, self.stop, self.held, self.stopped = stream, stop, "", False

    def push(self, token: int) -> str:
        return self._pass(self.stream.push(token), final=False)

    def end(self) -> str:
        return "" if self.stopped else self._pass(self.stream.end(), final=True)

    def _pass(self, piece: str, final: bool) -> str:
        text = self.held + piece
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _device(name: str) -> torch.device:
    if name.partition(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {name!r}; devices are auto, cpu, cuda, mps")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r} cannot be used here ({str(e).splitlines()[0]}); use --device cpu") from None
    return device


def _triton(device: torch.device) -> Ops:
    try:
        from triton.knobs import runtime
    except ImportError:
        raise ValueError("backend triton needs the triton package; pip install triton, or use --backend sdpa") from None
    if device.type != "cuda" and not runtime.interpret:
        raise ValueError(
            f"backend triton makes code for CUDA devices and the device is {device.type}; use --backend sdpa"
        )
    return triton()


@dataclass(frozen=True)
class Precision:
    """Which type prompts and single tokens are computed in, by which linear, and why."""

    prefill: torch.dtype
    decode: torch.dtype
    linear: Callable
    why: str


def _precision(config: ModelConfig, device: torch.device, asked: str) -> Precision:
    """A table, not a probe: the same command on the same machine must write the same text."""
    if asked != "auto":
        names = [ALIASES.get(n, n) for n in asked.split("/")]
        if len(names) > 2 or any(n not in DTYPES for n in names):
            raise ValueError(
                f"unknown dtype {asked!r}; give auto, {', '.join(DTYPES)}, or prefill/decode as in bfloat16/float16"
            )
        first, second, why = DTYPES[names[0]], DTYPES[names[-1]], "asked for"
    elif device.type == "cuda":
        first = second = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        why = "the device's own"
    elif device.type != "cpu":
        first = second = torch.float16
        why = "the device's own"
    elif torch.cpu._is_amx_tile_supported():
        # 2 cores of an Emerald Rapids: prompts 2,300 GFLOP/s in bf16, 430 in fp32, 410 in fp16; one row streams
        # 24 GB/s of bf16 (by mv; 16 by linear), 13 of fp16, 28 of fp32, which is twice the bytes
        first = second = torch.bfloat16
        why = "this CPU multiplies bf16 tiles"
    elif torch.cpu._is_avx512_bf16_supported():
        # 2 cores of a Zen 5: prompts 312 GFLOP/s in bf16, 75 in fp32, 22 in fp16; one row streams 42 GB/s of fp16,
        # 25 of bf16, 15 of fp32. Two copies of the weights, if there is room for a second
        first, second = torch.bfloat16, torch.float16
        why = "this CPU multiplies bf16 best and streams fp16 best"
        size = config.parameters() * 2
        if size > (free_bytes(device) - size) / 4:
            second, why = (
                first,
                "this CPU multiplies bf16 best; a second copy of the weights for single tokens would not fit",
            )
    else:
        first = second = torch.float32
        why = "this CPU has no bf16 arithmetic"
    rows = device.type == "cpu" and second == torch.bfloat16
    return Precision(first, second, row_linear if rows else linear, why)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device; a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # file cache gives way
            free = min(free, int(limit) - used)
        return free
    except (OSError, KeyError, ValueError):
        return sys.maxsize  # no way to tell on this system


def _check_weights(name: str, config: ModelConfig, device: torch.device, use: Precision) -> None:
    each = sum(t.itemsize for t in {use.prefill, use.decode})
    need, free = config.parameters() * each, free_bytes(device)
    if need > free:
        fits = [n for n, c in PRESETS.items() if c.parameters() * each < free * 0.9]
        types = " and ".join(dict.fromkeys(str(t).removeprefix("torch.") for t in (use.prefill, use.decode)))
        raise ValueError(
            f"{name} needs {mib(need)} in {types} and {mib(free)} are free on {device}; "
            + (f"these would fit: {', '.join(fits)}" if fits else "no known model would fit")
        )


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held on the device: of the CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
