"""Convert text to token ids and back, and render the model's chat template.

One class serves tokenizer.json (the tokenizers library) and tokenizer.model (sentencepiece). A chat template is a
program from the model's repository, so jinja2's sandbox runs it.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanokv.model.config import ModelConfig, read_json

PREFIX = "\ue000"  # a private-use character: no vocabulary merges it with the text after it
INCOMPLETE = "\ufffd"  # decoders return it for a character with missing bytes


@dataclass
class Tokenizer:
    """A tokenizer with its special ids and its chat template."""

    encode_plain: Callable[[str, bool], list[int]]  # (text, add special tokens) → ids
    decode_ids: Callable[[Sequence[int]], str]
    size: int  # the largest id + 1
    bos: int | None
    eos: tuple[int, ...]  # every id that ends a text
    template: str | None = None  # the chat template, in jinja2
    specials: dict[str, str] = field(default_factory=dict)  # name in a template, such as bos_token → special token
    hidden: dict[str, int] = field(default_factory=dict)  # special tokens, which `decode` leaves out → their ids

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text. `special` adds the BOS token that the model expects, but never a second one.

        ValueError if the text is not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:  # Python reads an argument that is not UTF-8 as surrogates
            raise ValueError(f"the text is not UTF-8 (character {e.start + 1}); convert it first") from None
        ids = self.encode_plain(text, special)
        return ids[1:] if special and len(ids) > 1 and ids[0] == ids[1] == self.bos else ids

    def encode_more(self, text: str) -> list[int]:
        """Return the ids of a text that continues another text.

        sentencepiece puts a space before every text. To avoid it, the text is encoded after PREFIX, and the ids of
        PREFIX are removed.
        """
        prefix = self.encode(PREFIX, special=False)
        both = self.encode(PREFIX + text, special=False)
        return both[len(prefix) :] if both[: len(prefix)] == prefix else self.encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return self.decode_ids(list(ids))

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation. `add_generation_prompt` adds the text that precedes the assistant's answer."""
        if self.template is None:
            raise ValueError(
                "this model has no chat template; leave out --chat, --system and --interactive, or use its instruct variant"
            )
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
        env.filters["tojson"] = _tojson
        try:
            template = env.from_string(self.template)
            return template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.specials,
            )
        except Exception as e:  # a template can raise any exception
            raise ValueError(f"the model's chat template refuses this conversation: {_first_line(e)}") from None


def from_dir(path: Path, config: ModelConfig) -> Tokenizer:
    """Load the tokenizer of a model directory. ValueError if there is none or it cannot be read."""
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
        raise ValueError(f"{file} cannot be read ({_first_line(e)}); fetch it again") from None
    fast.no_truncation()  # what a file says about clipping and padding is of training, and no prompt is ever clipped
    fast.no_padding()
    bos = _id(settings.get("bos_token"), fast.token_to_id, config.bos_token_id)
    wants_bos = settings.get("add_bos_token") is True

    def encode(text: str, special: bool) -> list[int]:
        ids = fast.encode(text, add_special_tokens=special).ids
        return [bos, *ids] if special and wants_bos and bos is not None and ids[:1] != [bos] else ids

    def decode(ids: Sequence[int]) -> str:
        return fast.decode(ids, skip_special_tokens=True)

    size = max(fast.get_vocab().values(), default=-1) + 1  # ids may have gaps, so this is not their number
    hidden = {token.content: i for i, token in fast.get_added_tokens_decoder().items() if token.special}
    return Tokenizer(encode, decode, size, bos, _eos(settings, fast.token_to_id, config), hidden=hidden)


def _from_sentencepiece(file: Path, settings: dict[str, Any], config: ModelConfig) -> Tokenizer:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.Load(str(file))
    except (RuntimeError, OSError) as e:
        raise ValueError(f"{file} is not a sentencepiece model ({_first_line(e)}); fetch it again") from None
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
    size = max([sp.GetPieceSize(), *(i + 1 for i in added.values())])
    return Tokenizer(encode, decode, size, bos, eos, hidden=special)


def byte_level() -> Tokenizer:
    """Build a tokenizer with one token per UTF-8 byte. Models with random weights use it."""
    return Tokenizer(
        lambda text, special: list(text.encode()),
        lambda ids: bytes(i % 256 for i in ids).decode(errors="replace"),
        256,
        None,
        (),
    )


def _template(path: Path, settings: dict[str, Any]) -> str | None:
    """Return the chat template from chat_template.jinja or tokenizer_config.json, or None."""
    file, value = path / "chat_template.jinja", settings.get("chat_template")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{file} cannot be read ({_first_line(e)}); fetch it again") from None
    if isinstance(value, list):  # several named templates
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(value, str | None):
        raise ValueError(
            f"{path / 'tokenizer_config.json'}: chat_template must be a string or a list of named templates"
        )
    return value


def _content(token: Any) -> str:
    """Return the text of a token. tokenizer_config.json stores it as a string or as an object with `content`."""
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _id(token: Any, find: Callable[[str], int | None], default: int | None) -> int | None:
    """Return the id of a token in tokenizer_config.json, or `default` if the vocabulary lacks it."""
    found = find(_content(token)) if _content(token) else None
    return default if found is None else found


def _eos(settings: dict[str, Any], find: Callable[[str], int | None], config: ModelConfig) -> tuple[int, ...]:
    """Return every id that ends a text: the model config's and the tokenizer's own."""
    own = _id(settings.get("eos_token"), find, None)
    return tuple(dict.fromkeys([*config.eos_token_id, *([] if own is None else [own])]))


def _first_line(e: Exception) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(e).splitlines()), type(e).__name__)


def _raise_exception(message: str) -> None:
    """The function of this name that chat templates call."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    """The jinja2 filter `tojson`, without HTML escapes."""
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)
