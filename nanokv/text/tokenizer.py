"""Text ↔ token ids: one class over tokenizer.json (tokenizers) or tokenizer.model (sentencepiece), chosen by the file that is there,
and the model's chat template, rendered in jinja2's sandbox because a template is somebody else's program.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanokv.model.config import ModelConfig, read_json

BEFORE = "\ue000"  # of private use: no vocabulary joins it to what follows

CUT = "\ufffd"  # what a decoder shows for a character whose bytes are not all there yet


@dataclass
class Tokenizer:
    encode_plain: Callable[[str, bool], list[int]]  # (text, add special tokens)
    decode_ids: Callable[[Sequence[int]], str]
    size: int
    bos: int | None
    eos: tuple[int, ...]
    template: str | None = None
    specials: dict[str, str] = field(default_factory=dict)  # names a template may use, such as bos_token

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; special: with the BOS that the model wants, once even if the text begins with it."""
        try:
            text.encode()
        except UnicodeEncodeError as e:  # a surrogate: how Python reads an argument that is not UTF-8
            raise ValueError(f"the text is not UTF-8 (character {e.start + 1}); convert it first") from None
        ids = self.encode_plain(text, special)
        return ids[1:] if special and len(ids) > 1 and ids[0] == ids[1] == self.bos else ids

    def encode_more(self, text: str) -> list[int]:
        """Ids of a text that continues another: without the space that sentencepiece puts before every text it is given."""
        before = self.encode(BEFORE, special=False)
        both = self.encode(BEFORE + text, special=False)
        return both[len(before) :] if both[: len(before)] == before else self.encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_ids(list(ids))

    def chat(self, messages: list[dict[str, str]], more: bool = True) -> str:
        """The model's own rendering of a conversation; more: ending where the assistant begins to speak."""
        if self.template is None:
            raise ValueError(
                "this model has no chat template; leave out --chat, --system and --interactive, or use its instruct variant"
            )
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.globals["raise_exception"] = _refuse
        env.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
        env.filters["tojson"] = _tojson
        try:
            template = env.from_string(self.template)
            return template.render(
                messages=messages, add_generation_prompt=more, tools=None, documents=None, **self.specials
            )
        except Exception as e:  # somebody else's program can fail in any way
            raise ValueError(f"the model's chat template refuses this conversation: {_line(e)}") from None


def from_dir(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model directory. ValueError if there is none or it cannot be read."""
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    if (path / "tokenizer.json").is_file():
        tok = _from_json(path / "tokenizer.json", settings, config)
    elif (path / "tokenizer.model").is_file():
        tok = _from_sentencepiece(path / "tokenizer.model", settings, config)
    else:
        raise ValueError(f"{path} has neither tokenizer.json nor tokenizer.model; fetch the model again")
    if tok.size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tok.size} tokens, the model {config.vocab_size}; they belong to different models"
        )
    tok.template = _template(path, settings)
    tok.specials = {k: _content(v) for k, v in settings.items() if k.endswith("_token") and _content(v)}
    return tok


def _from_json(file: Path, settings: dict[str, Any], config: ModelConfig) -> Tokenizer:
    from tokenizers import Tokenizer as Fast

    try:
        fast = Fast.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise ValueError(f"{file} cannot be read ({_line(e)}); fetch it again") from None
    bos = _id(settings.get("bos_token"), fast.token_to_id, config.bos_token_id)
    wants_bos = settings.get("add_bos_token") is True

    def encode(text: str, special: bool) -> list[int]:
        ids = fast.encode(text, add_special_tokens=special).ids
        return [bos, *ids] if special and wants_bos and bos is not None and ids[:1] != [bos] else ids

    def decode(ids: Sequence[int]) -> str:
        return fast.decode(ids, skip_special_tokens=True)

    size = max(fast.get_vocab().values(), default=-1) + 1  # not the count: ids may have gaps
    return Tokenizer(encode, decode, size, bos, _eos(settings, fast.token_to_id, config))


def _from_sentencepiece(file: Path, settings: dict[str, Any], config: ModelConfig) -> Tokenizer:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.Load(str(file))
    except (RuntimeError, OSError) as e:
        raise ValueError(f"{file} is no sentencepiece model ({_line(e)}); fetch it again") from None
    added = {_content(v): int(i) for i, v in settings.get("added_tokens_decoder", {}).items()}
    control = {sp.IdToPiece(i): i for i in range(sp.GetPieceSize()) if sp.IsControl(i) or sp.IsUnknown(i)}
    special = {**control, **added}
    split = re.compile("(" + "|".join(re.escape(s) for s in sorted(special, key=len, reverse=True)) + ")")
    bos = sp.bos_id() if sp.bos_id() >= 0 else config.bos_token_id
    wants_bos = settings.get("add_bos_token", True) and bos is not None

    def encode(text: str, with_bos: bool) -> list[int]:
        ids = [bos] if with_bos and wants_bos else []
        for piece in filter(None, split.split(text)):
            ids += [special[piece]] if piece in special else sp.EncodeAsIds(piece)
        return ids

    def decode(ids: Sequence[int]) -> str:
        hidden = set(special.values())
        return sp.DecodeIds([i for i in ids if i not in hidden and i < sp.GetPieceSize()])

    def find(piece: str) -> int | None:
        return special.get(piece, sp.PieceToId(piece) if sp.PieceToId(piece) != sp.unk_id() else None)

    eos = _eos(settings, find, config) or ((sp.eos_id(),) if sp.eos_id() >= 0 else ())
    return Tokenizer(encode, decode, max([sp.GetPieceSize(), *(i + 1 for i in added.values())]), bos, eos)


def byte_level() -> Tokenizer:
    """A tokenizer without a vocabulary file, for random weights: one token per byte of UTF-8."""
    return Tokenizer(
        lambda text, special: list(text.encode()),
        lambda ids: bytes(i % 256 for i in ids).decode(errors="replace"),
        256,
        None,
        (),
    )


def _template(path: Path, settings: dict[str, Any]) -> str | None:
    file, value = path / "chat_template.jinja", settings.get("chat_template")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{file} cannot be read ({_line(e)}); fetch it again") from None
    if isinstance(value, list):  # several named ones
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(value, str | None):
        raise ValueError(f"{path / 'tokenizer_config.json'}: chat_template must be a text, or a list of named ones")
    return value


def _content(token: Any) -> str:
    """A token as tokenizer_config.json gives it: a string, or an object with `content`."""
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _id(token: Any, find: Callable[[str], int | None], default: int | None) -> int | None:
    found = find(_content(token)) if _content(token) else None
    return default if found is None else found


def _eos(settings: dict[str, Any], find: Callable[[str], int | None], config: ModelConfig) -> tuple[int, ...]:
    """Every id that ends a text: the config's, and the tokenizer's own."""
    own = _id(settings.get("eos_token"), find, None)
    return tuple(dict.fromkeys([*config.eos_token_id, *([] if own is None else [own])]))


def _line(e: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(e).splitlines()), type(e).__name__)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)
