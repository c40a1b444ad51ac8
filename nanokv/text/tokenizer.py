"""Convert text to token ids and back, and render the model's chat template.

One class serves tokenizer.json (the tokenizers library) and tokenizer.model (sentencepiece). Tokens that other files of
the directory add to either are added as transformers adds them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import punctuation
from typing import Any

from nanokv.files import is_there, quoted, read_json, reason
from nanokv.model.config import MAX_NUMBER, ModelConfig
from nanokv.text.template import Renderer

PREFIX = "\ue000"  # a private-use character: no vocabulary merges it with the text after it
MAX_TOKEN = 10_000  # characters of an added token
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
    vocab_size: int | None = None  # rows of the model's embedding; None: `size`
    renderer: Renderer = field(default_factory=Renderer, repr=False)  # of the template
    added: dict[int, str] = field(default_factory=dict)  # added tokens, of which some may have no row

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text. `special` adds the BOS token that the model expects, but never a second one.

        ValueError if the text is not UTF-8, or holds a token that the model does not know.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:  # Python reads an argument that is not UTF-8 as surrogates
            raise ValueError(f"the text is not UTF-8 (character {e.start + 1}); convert it first") from None
        with _library("this model's tokenizer cannot encode the text"):
            ids = self.encode_plain(text, special)
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            token = quoted(self.added.get(max(ids), f"token {max(ids)}"))
            raise ValueError(f"the text holds {token}, a token for which this model has no embedding; leave it out")
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
        with _library("this model's tokenizer cannot decode its tokens"):
            return self.decode_ids(list(ids))

    def kinds(self, n: int) -> list[int]:
        """What the tokens 0 … n−1 are: 1 a special token, 2 punctuation alone, 0 anything else."""
        special, found = {*self.hidden.values(), *self.added, *self.eos, self.bos}, []
        for i in range(n):
            text = self.decode([i]).strip() if i < self.size and i not in special else ""
            found.append(1 if i in special else 2 if text and all(c in punctuation for c in text) else 0)
        return found

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation. `add_generation_prompt` adds the text that precedes the assistant's answer."""
        if self.template is None:
            raise ValueError(
                "this model has no chat template; leave out --chat, --system and --interactive, or use its instruct variant"
            )
        return self.renderer.render(self.template, messages, self.specials, add_generation_prompt)

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


@contextmanager
def _library(what: str, then: str = "") -> Iterator[None]:
    """Raise whatever a library raises as a ValueError. A panic of the tokenizers library is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise ValueError(f"{what} ({reason(e)}){then}") from None


def from_dir(path: Path, config: ModelConfig) -> Tokenizer:
    """Load the tokenizer of a model directory. ValueError if there is none or it cannot be read."""
    settings = _read_settings(path)
    added = _added_tokens(path, settings)
    if is_there(path / "tokenizer.json"):
        tok, base = _from_json(path / "tokenizer.json", settings, added, config)
    elif is_there(path / "tokenizer.model"):
        tok, base = _from_sentencepiece(path / "tokenizer.model", settings, added, config)
    else:
        raise ValueError(f"{path} has neither tokenizer.json nor tokenizer.model; fetch the model again")
    if base > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {base} tokens, the model {config.vocab_size}; they belong to different models"
        )
    tok.vocab_size = config.vocab_size
    tok.template = _template(path, settings)
    extra = settings.get("extra_special_tokens")
    named = {**(extra if isinstance(extra, dict) else {}), **settings}
    tok.specials = {k: _content(v) for k, v in named.items() if k.endswith("_token") and _content(v)}
    return tok


def _read_settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, checked as far as this module reads it, and the special tokens of special_tokens_map.json where
    the first lacks them.
    """
    settings: dict[str, Any] = {}
    for file in (path / "tokenizer_config.json", path / "special_tokens_map.json"):
        found = read_json(file) if is_there(file) else {}
        for key in ("add_bos_token", "add_prefix_space", "legacy"):
            if found.get(key) not in (None, True, False):
                raise ValueError(f"{file}: {key} is {quoted(found[key])}; it must be true or false")
        lists = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
        tokens = [v for k, v in found.items() if k.endswith("_token") and not isinstance(v, bool | int | float)]
        for key in lists:
            value = found.get(key)
            if value is not None and not isinstance(value, dict if key == lists[0] else list | dict):
                raise ValueError(f"{file}: {key} is {quoted(value)}; it must hold tokens")
            tokens += value.values() if isinstance(value, dict) else value or []
        for token in tokens:
            content = token.get("content") if isinstance(token, dict) else token
            if token is not None and not (isinstance(content, str) and len(content) <= MAX_TOKEN):
                raise ValueError(
                    f"{file}: {quoted(token)} is no token; it must be a text or an object with its content"
                )
        settings = {**found, **settings}
    return settings


@dataclass(frozen=True)
class Added:
    """A token that is found in a text before the vocabulary is applied."""

    content: str
    id: int | None = None  # None: the next free id
    special: bool = True  # `decode` leaves it out
    flags: tuple[tuple[str, bool], ...] = ()  # of the tokenizers library: lstrip, rstrip, single_word, normalized


def _added_tokens(path: Path, settings: dict[str, Any]) -> list[Added]:
    """The tokens that tokenizer_config.json, added_tokens.json and special_tokens_map.json add, by id where they have one."""
    found: dict[str, Added] = {}
    names = ("lstrip", "rstrip", "single_word", "normalized")
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        values = token if isinstance(token, dict) else {}
        flags = tuple((k, values[k] is True) for k in names if k in values)
        content = _content(token)
        found[content] = Added(content, _token_id(i, path), values.get("special") is True, flags)
    file = path / "added_tokens.json"
    for content, i in (read_json(file) if is_there(file) else {}).items():
        if len(content) > MAX_TOKEN:
            raise ValueError(f"{file}: a token has {len(content)} characters; at most {MAX_TOKEN} are read")
        found.setdefault(content, Added(content, _token_id(i, path), False))
    special = [v for k, v in settings.items() if k.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key) or []
        special += value.values() if isinstance(value, dict) else value
    for content in filter(None, map(_content, special)):
        before = found.get(content, Added(content))
        found[content] = Added(content, before.id, True, before.flags)
    found.pop("", None)
    return sorted(found.values(), key=lambda token: (token.id is None, token.id or 0))


def _token_id(value: Any, path: Path) -> int:
    """An id, which the keys of added_tokens_decoder write as text."""
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10
    i = int(value) if digits else value
    if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < MAX_NUMBER:
        raise ValueError(f"{path} adds a token with the id {quoted(value)}; it must be a whole number")
    return i


def _from_json(file: Path, settings: dict[str, Any], added: list[Added], config: ModelConfig) -> tuple[Tokenizer, int]:
    """The tokenizer, and the size of its vocabulary without added tokens."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    with _library(f"{file} cannot be read", "; fetch it again"):
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
    for token in added:
        if token.id is not None and fast.token_to_id(token.content) != token.id:
            raise ValueError(
                f"{file.parent} gives token {quoted(token.content)} the id {token.id}, and {file.name} puts "
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
    contents = {i: token.content for i, token in tokens.items()}
    eos = _eos(settings, fast.token_to_id, config)
    return Tokenizer(encode, decode, size, bos, eos, hidden=hidden, added=contents), base


def _from_sentencepiece(
    file: Path, settings: dict[str, Any], added: list[Added], config: ModelConfig
) -> tuple[Tokenizer, int]:
    """The tokenizer, and the number of sentencepiece's own pieces."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor()
    with _library(f"{file} is not a sentencepiece model", "; fetch it again"):
        sp.Load(str(file))
    base = sp.GetPieceSize()
    ids = {sp.IdToPiece(i): i for i in range(base)}
    given, free = {}, base
    for token in added:
        i = token.id if token.id is not None else ids.get(token.content, free)
        given[token.content], free = i, max(free, i + 1)
    # an added token may give a control piece another name, but not an ordinary one
    named = {i: sp.IdToPiece(i) for i in range(base)}
    owners = {i: s for i, s in named.items() if not (sp.IsControl(i) or sp.IsUnknown(i) or sp.IsUnused(i))}
    for content, i in given.items():
        if owners.setdefault(i, content) != content:
            raise ValueError(
                f"{file.parent} gives token {quoted(content)} the id {i}, which is that of {quoted(owners[i])}; fetch the files again"
            )
    control = {sp.IdToPiece(i): i for i in range(base) if sp.IsControl(i) or sp.IsUnknown(i)}
    hidden = control | {t.content: given[t.content] for t in added if t.special}
    shown = {given[t.content]: t.content for t in added if not t.special}
    found = control | given
    flags = {token.content: dict(token.flags) for token in added}
    stripped = {content.strip(): i for content, i in found.items()}  # a pattern may take spaces around a token
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
                ids.append(found[piece] if piece in found else stripped[piece.strip()])
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
    contents = {i: content for content, i in given.items()}
    return Tokenizer(encode, decode, size, bos, eos, hidden=hidden, added=contents), base


def _pattern(content: str, flags: dict[str, bool]) -> str:
    """A regular expression for an added token, with the spaces that its flags say it takes."""
    found = re.escape(content)
    if flags.get("single_word"):
        found = rf"(?<!\w){found}(?!\w)"
    # where a run of spaces begins, and not anew at each of them
    return (r"(?<!\s)\s*" if flags.get("lstrip") else "") + found + (r"\s*" if flags.get("rstrip") else "")


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
    if not is_there(file) and value is None:
        file = path / "additional_chat_templates" / "default.jinja"
    if is_there(file):
        try:
            return file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{file} cannot be read ({reason(e)}); fetch it again") from None
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
    """The text of a token, which is stored as a string or as an object with `content`; empty for anything else."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _id(token: Any, find: Callable[[str], int | None], default: int | None) -> int | None:
    """Return the id of a token in tokenizer_config.json, or `default` if the vocabulary lacks it."""
    found = find(_content(token)) if _content(token) else None
    return default if found is None else found


def _eos(settings: dict[str, Any], find: Callable[[str], int | None], config: ModelConfig) -> tuple[int, ...]:
    """Return every id that ends a text: the model config's and the tokenizer's own."""
    own = _id(settings.get("eos_token"), find, None)
    return tuple(dict.fromkeys([*config.eos_token_id, *([] if own is None else [own])]))
