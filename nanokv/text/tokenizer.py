"""Convert text to token ids and back, and render the model's chat template.

One class serves tokenizer.json (the tokenizers library) and tokenizer.model (sentencepiece). Tokens that other files of
the directory add to either are added as transformers adds them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanokv.model.config import ModelConfig, read_json
from nanokv.text.template import render

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
    unknown: dict[int, str] = field(default_factory=dict)  # added tokens for which the model has no embedding

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text. `special` adds the BOS token that the model expects, but never a second one.

        ValueError if the text is not UTF-8, or holds a token that the model does not know.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:  # Python reads an argument that is not UTF-8 as surrogates
            raise ValueError(f"the text is not UTF-8 (character {e.start + 1}); convert it first") from None
        ids = self.encode_plain(text, special)
        if self.unknown and (unknown := next((self.unknown[i] for i in ids if i in self.unknown), None)):
            raise ValueError(f"the text holds {unknown!r}, a token for which this model has no embedding; leave it out")
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
        return render(self.template, messages, self.specials, add_generation_prompt)

    def turn_end(self) -> str:
        """The special token with which the chat template ends an assistant's message. Empty if there is none."""
        mark = "\u241fan answer\u241f"
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": mark}]
        try:
            _, _, rest = self.chat(messages, add_generation_prompt=False).partition(mark)
        except ValueError:  # no template, or one that takes no such conversation
            return ""
        found = [t for t in self.hidden if rest.startswith(t)]
        return max(found, key=len, default="")


def from_dir(path: Path, config: ModelConfig) -> Tokenizer:
    """Load the tokenizer of a model directory. ValueError if there is none or it cannot be read."""
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    added = _added_tokens(path, settings)
    if (path / "tokenizer.json").is_file():
        tok, base = _from_json(path / "tokenizer.json", settings, added, config)
    elif (path / "tokenizer.model").is_file():
        tok, base = _from_sentencepiece(path / "tokenizer.model", settings, added, config)
    else:
        raise ValueError(f"{path} has neither tokenizer.json nor tokenizer.model; fetch the model again")
    if base > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {base} tokens, the model {config.vocab_size}; they belong to different models"
        )
    tok.unknown = {i: content for i, content in tok.unknown.items() if i >= config.vocab_size}
    tok.template = _template(path, settings)
    extra = settings.get("extra_special_tokens")
    named = {**(extra if isinstance(extra, dict) else {}), **settings}
    tok.specials = {k: _content(v) for k, v in named.items() if k.endswith("_token") and _content(v)}
    return tok


@dataclass(frozen=True)
class Added:
    """A token that is found in a text before the vocabulary is applied."""

    content: str
    id: int | None = None  # None: the next free id
    special: bool = True  # `decode` leaves it out
    flags: tuple[tuple[str, bool], ...] = ()  # of the tokenizers library: lstrip, rstrip, single_word, normalized


def _added_tokens(path: Path, settings: dict[str, Any]) -> list[Added]:
    """The tokens that tokenizer_config.json, added_tokens.json and special_tokens_map.json add, by id where they have one.

    The special tokens of special_tokens_map.json become part of `settings` where that lacks them.
    """
    maps = {name: path / f"{name}.json" for name in ("added_tokens", "special_tokens_map")}
    files = {name: read_json(file) if file.is_file() else {} for name, file in maps.items()}
    for key, value in files["special_tokens_map"].items():
        settings.setdefault(key, value)
    found: dict[str, Added] = {}
    names = ("lstrip", "rstrip", "single_word", "normalized")
    for i, token in _items(settings.get("added_tokens_decoder")):
        flags = tuple((k, token[k]) for k in names if k in token) if isinstance(token, dict) else ()
        special = bool(token.get("special", False)) if isinstance(token, dict) else False
        found[_content(token)] = Added(_content(token), int(i), special, flags)
    for content, i in _items(files["added_tokens"]):
        found.setdefault(content, Added(content, int(i), False))
    special = [v for k, v in settings.items() if k.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key) or []
        special += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    for token in special:
        if isinstance(token, str | dict) and (content := _content(token)):
            before = found.get(content, Added(content))
            found[content] = Added(content, before.id, True, before.flags)
    return sorted(found.values(), key=lambda token: (token.id is None, token.id))


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _from_json(file: Path, settings: dict[str, Any], added: list[Added], config: ModelConfig) -> tuple[Tokenizer, int]:
    """The tokenizer, and the size of its vocabulary without added tokens."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    try:
        fast = Fast.from_str(file.read_text(encoding="utf-8-sig"))
        base = max(fast.get_vocab(with_added_tokens=False).values(), default=-1) + 1  # ids may have gaps
        there = {token.content: token.special for token in fast.get_added_tokens_decoder().values()}
        new = []
        for token in added:
            is_known = fast.token_to_id(token.content) is not None
            if token.flags or not is_known or (token.special and not there.get(token.content)):
                flags = {"normalized": not token.special} | dict(token.flags)
                new.append(AddedToken(token.content, special=token.special, **flags))
        fast.add_tokens(new)
    except Exception as e:  # the library raises bare Exception
        raise ValueError(f"{file} cannot be read ({_first_line(e)}); fetch it again") from None
    for token in added:
        if token.id is not None and fast.token_to_id(token.content) != token.id:
            raise ValueError(
                f"{file.parent} gives token {token.content!r} the id {token.id}, and {file.name} puts "
                f"{fast.token_to_id(token.content)} there; fetch both files again"
            )
    fast.no_truncation()  # what a file says about clipping and padding is of training, and no prompt is ever clipped
    fast.no_padding()
    bos = _id(settings.get("bos_token"), fast.token_to_id, config.bos_token_id)
    wants_bos = settings.get("add_bos_token") is True

    def encode(text: str, special: bool) -> list[int]:
        ids = fast.encode(text, add_special_tokens=special).ids
        return [bos, *ids] if special and wants_bos and bos is not None and ids[:1] != [bos] else ids

    def decode(ids: Sequence[int]) -> str:
        return fast.decode(ids, skip_special_tokens=True)

    size = max(fast.get_vocab().values(), default=-1) + 1
    tokens = fast.get_added_tokens_decoder()
    hidden = {token.content: i for i, token in tokens.items() if token.special}
    unknown = {i: token.content for i, token in tokens.items()}
    eos = _eos(settings, fast.token_to_id, config)
    return Tokenizer(encode, decode, size, bos, eos, hidden=hidden, unknown=unknown), base


def _from_sentencepiece(
    file: Path, settings: dict[str, Any], added: list[Added], config: ModelConfig
) -> tuple[Tokenizer, int]:
    """The tokenizer, and the number of sentencepiece's own pieces."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.Load(str(file))
    except (RuntimeError, OSError) as e:
        raise ValueError(f"{file} is not a sentencepiece model ({_first_line(e)}); fetch it again") from None
    base = sp.GetPieceSize()
    ids = {sp.IdToPiece(i): i for i in range(base)}
    given, free = {}, base
    for token in added:
        i = token.id if token.id is not None else ids.get(token.content, free)
        given[token.content], free = i, max(free, i + 1)
    control = {sp.IdToPiece(i): i for i in range(base) if sp.IsControl(i) or sp.IsUnknown(i)}
    hidden = control | {t.content: given[t.content] for t in added if t.special}
    shown = {given[t.content]: t.content for t in added if not t.special}
    found = control | given
    flags = {token.content: dict(token.flags) for token in added}
    longest = sorted(found, key=len, reverse=True)
    split = re.compile("(" + "|".join(_pattern(s, flags.get(s, {})) for s in longest) + ")")
    # sentencepiece puts a space before every text. These settings want none at the start, or none behind an added token
    bare, follows = settings.get("add_prefix_space") is False, settings.get("legacy") is False
    prefix = sp.EncodeAsIds(PREFIX)
    bos = sp.bos_id() if sp.bos_id() >= 0 else config.bos_token_id
    wants_bos = settings.get("add_bos_token", True) and bos is not None
    hidden_ids = set(hidden.values())

    def encode(text: str, with_bos: bool) -> list[int]:
        ids = [bos] if with_bos and wants_bos else []
        at_start = True
        for i, piece in enumerate(split.split(text)):  # every second one is an added token
            if i % 2:
                ids.append(found[piece] if piece in found else found[piece.strip()])
            elif piece and (bare or (follows and not at_start)):
                ids += sp.EncodeAsIds(PREFIX + piece)[len(prefix) :]
            elif piece:
                ids += sp.EncodeAsIds(piece)
            at_start = False
        return ids

    def decode(ids: Sequence[int]) -> str:
        text, run = "", []
        for i in ids:
            if i in shown:
                text, run = text + sp.DecodeIds(run) + shown[i], []
            elif i not in hidden_ids and i < base:
                run.append(i)
        return text + sp.DecodeIds(run)

    def find(piece: str) -> int | None:
        return found.get(piece, ids.get(piece))

    eos = _eos(settings, find, config) or ((sp.eos_id(),) if sp.eos_id() >= 0 else ())
    size = max([base, *(i + 1 for i in given.values())])
    unknown = {i: content for content, i in given.items()}
    return Tokenizer(encode, decode, size, bos, eos, hidden=hidden, unknown=unknown), base


def _pattern(content: str, flags: dict[str, bool]) -> str:
    """A regular expression for an added token, with the spaces that its flags say it takes."""
    found = re.escape(content)
    if flags.get("single_word"):
        found = rf"(?<!\w){found}(?!\w)"
    return (r"\s*" if flags.get("lstrip") else "") + found + (r"\s*" if flags.get("rstrip") else "")


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
    if not file.is_file() and value is None:
        file = path / "additional_chat_templates" / "default.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{file} cannot be read ({_first_line(e)}); fetch it again") from None
    if isinstance(value, list):  # several named templates
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    if isinstance(value, dict):
        value = value.get("default", value)
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
