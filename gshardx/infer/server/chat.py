"""From chat messages to the tokens of a prompt, by the model's chat template.

A template is the operator's, messages are anybody's: special tokens that the template writes become special tokens,
the same text in a message stays text. So that this can be told apart after rendering, in messages each character that
a special token is made of is hidden behind a private-use one meanwhile.
"""

import datetime
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import tokenizers

from gshardx.data.tokenizer import Tokenizer
from gshardx.errors import BadInput

DEFAULT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For models that were never trained on chats."""
ROLES = ("system", "developer", "user", "assistant", "tool")
"""No others: templates put a role between the halves of a special token."""
_FIELDS = ("name", "reasoning_content")
"""Of a message, if it has them, beside role and content; texts."""
_FIRST_STAND_IN = 0x100000
"""Of the private-use characters; from here on they are nearly unused."""


def load_template(run: Path, given: Path | None) -> "ChatTemplate":
    """The template in ``given``, or else the run's own: chat_template.jinja, or that of tokenizer_config.json; or else
    :data:`DEFAULT`.

    Raises:
        BadInput: a file that can't be read, or is no template.
    """
    config_path = run / "tokenizer_config.json"
    config = _config(config_path) if config_path.exists() else {}
    tokens = {name: text for name, value in config.items() if name.endswith("_token") and (text := _content(value))}
    own = run / "chat_template.jinja"
    path = given or (own if own.exists() else None)
    if path is not None:
        return ChatTemplate(_read(path), str(path), tokens)
    if found := _of_config(config.get("chat_template")):
        return ChatTemplate(found, f"{config_path}, chat_template", tokens)
    return ChatTemplate(DEFAULT, "the default chat template", tokens)


class ChatTemplate:
    """A Jinja template as the transformers library renders it.

    Args:
        source: the template.
        name: what errors call it.
        tokens: texts of special tokens, by their names in templates, such as ``bos_token``.

    Raises:
        BadInput: it is no template.
    """

    def __init__(self, source: str, name: str, tokens: Mapping[str, str]) -> None:
        self.source, self._name, self._tokens = source, name, dict(tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BadInput(f"{name}: line {error.lineno}: {_line(error)}; mend the template") from error

    def encode(self, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> np.ndarray:
        """Tokens of the prompt that asks for the next message of the assistant, int32.

        No text of a message becomes a special token; tokens that the tokenizer has added, but does not call special,
        such as often ``<think>``, are found wherever they are written. Where no message has a special token's text,
        this is the same as to render the template and encode the result.

        Args:
            messages: as in OpenAI's API: ``role``, and ``content``, a text or a list of text parts.

        Raises:
            BadInput: a message of another form, or the template refuses them.
        """
        reader = _reader(tokenizer)
        hidden = self._rendered(messages, reader.veil)
        text = hidden.translate(reader.veil.show)
        found = reader.inner.encode_batch([text], add_special_tokens=False)[0]  # encode holds up all threads
        own = [
            (place, *span)
            for place, (token, span) in enumerate(zip(found.ids, found.offsets, strict=True))
            if token in reader.special and hidden[slice(*span)].strip() == reader.special[token]
        ]
        tokens: list[int] = []
        since, since_char = 0, 0
        for place, first, last in [*own, (len(found.ids), len(text), len(text))]:
            between = found.ids[since:place]
            users = not reader.special.keys().isdisjoint(between)
            tokens += tokenizer.encode(text[since_char:first]).tolist() if users else between
            tokens += found.ids[place : place + 1]
            since, since_char = place + 1, last
        return np.asarray(tokens, np.int32)

    def _rendered(self, messages: list[dict[str, Any]], veil: "_Veil") -> str:
        """With what users wrote hidden."""
        if not messages:
            raise BadInput("messages: none; give one or more")
        checked = [_checked(message, f"messages[{place}]", veil) for place, message in enumerate(messages)]
        known = {"messages": checked, "add_generation_prompt": True, "tools": None, "documents": None}
        try:
            return "".join([self._template.render(self._tokens | known)])  # a plain str
        except Exception as error:  # a template may do anything
            raise BadInput(f"messages: {self._name} refuses them: {_line(error).translate(veil.show)}") from error


class _Veil(NamedTuple):
    """Characters of special tokens, and what stands for them, each way."""

    hide: dict[int, int]
    show: dict[int, int]


class _Reader(NamedTuple):
    """A tokenizer that finds special tokens in a text.

    special: their texts by id.
    """

    inner: tokenizers.Tokenizer
    special: dict[int, str]
    veil: _Veil


@functools.lru_cache(4)
def _reader(tokenizer: Tokenizer) -> _Reader:
    inner = tokenizers.Tokenizer.from_str(tokenizer.text)
    special = {token: one.content for token, one in inner.get_added_tokens_decoder().items() if one.special}
    # Templates trim whitespace and quote JSON: that must work on hidden texts too.
    characters = sorted({char for text in special.values() for char in text if not (char.isspace() or char in '"\\')})
    hide = {ord(char): _FIRST_STAND_IN + place for place, char in enumerate(characters)}
    return _Reader(inner, special, _Veil(hide, {stand_in: char for char, stand_in in hide.items()}))


def _looking(name: str) -> Any:
    """A method of str that compares a hidden text with others."""

    def method(self: "_Hidden", *given: Any) -> Any:
        shown = [one.translate(self._veil.show) if isinstance(one, str) else one for one in given]
        return getattr(self._shown, name)(*shown)

    return method


def _cutting(name: str) -> Any:
    """A method of str that returns a part of a hidden text, or several in order, with what they were cut at between."""

    def method(self: "_Hidden", *given: Any, **named: Any) -> Any:
        shown = self._shown
        found = getattr(shown, name)(*given, **named)
        separator = given[0] if given else named.get("sep")
        gap = len(separator) if name in ("split", "rsplit") and separator is not None else 0
        parts, place = [], 0
        for part in [found] if isinstance(found, str) else found:
            place = shown.index(part, place)
            parts.append(self[place : place + len(part)])
            place += len(part) + gap
        return parts[0] if isinstance(found, str) else parts

    return method


class _Hidden(str):
    """A text with hidden characters that lets a template see what it says, as in ``content.split('</think>')``.

    Whatever else a template does with it, its characters stay hidden.
    """

    _veil: _Veil

    def __new__(cls, hidden: str, veil: _Veil) -> "_Hidden":
        made = super().__new__(cls, hidden)
        made._veil = veil
        return made

    @property
    def _shown(self) -> str:
        return self.translate(self._veil.show)

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(self._shown)

    def __getitem__(self, place: Any) -> "_Hidden":
        return _Hidden(super().__getitem__(place), self._veil)

    def __add__(self, other: str) -> "_Hidden":
        return _Hidden(super().__add__(other), self._veil)

    def __radd__(self, other: str) -> "_Hidden":
        return _Hidden(str.__add__(other, self), self._veil)

    def replace(self, old: str, new: str, count: Any = -1) -> "_Hidden":
        return _Hidden(str.join(new, self.split(old, count)), self._veil)

    __contains__: Any = _looking("__contains__")
    __eq__: Any = _looking("__eq__")
    __ne__: Any = _looking("__ne__")
    count: Any = _looking("count")
    endswith: Any = _looking("endswith")
    find: Any = _looking("find")
    rfind: Any = _looking("rfind")
    startswith: Any = _looking("startswith")
    lstrip: Any = _cutting("lstrip")
    partition: Any = _cutting("partition")
    rpartition: Any = _cutting("rpartition")
    rsplit: Any = _cutting("rsplit")
    rstrip: Any = _cutting("rstrip")
    split: Any = _cutting("split")
    splitlines: Any = _cutting("splitlines")
    strip: Any = _cutting("strip")


def _joined(texts: Iterable[str]) -> str:
    """What a template or one of its macros has written."""
    parts = list(texts)
    veil = next((part._veil for part in parts if isinstance(part, _Hidden)), None)
    text = "".join(parts)
    return text if veil is None else _Hidden(text, veil)


def _checked(message: Any, where: str, veil: _Veil) -> dict[str, str]:
    """A message as templates see it."""
    if not isinstance(message, dict):
        raise BadInput(f'{where}: not an object; give {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role not in ROLES:
        raise BadInput(f"{where}.role: must be one of {', '.join(ROLES)}")
    seen = {"role": role, "content": _hidden(_text(message.get("content"), where), f"{where}.content", veil)}
    for name, value in message.items():
        if name in seen or not value:
            continue
        if name not in _FIELDS or not isinstance(value, str):
            raise BadInput(f"{where}: has {str(name)[:40]!r}, which is not supported; leave it out")
        seen[name] = _hidden(value, f"{where}.{name}", veil)
    return seen


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadInput(f"{where}.content: not a text; give one, or a list of text parts")
    for place, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise BadInput(f"{where}.content[{place}]: not a text part; this model reads nothing but text")
    return "".join(part["text"] for part in content)


def _hidden(text: str, where: str, veil: _Veil) -> _Hidden:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: not Unicode ({error.reason}); give UTF-8") from error
    return _Hidden(text.translate(dict.fromkeys(veil.show)).translate(veil.hide), veil)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what a model is trained on; nothing to do here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    concat = staticmethod(_joined)


def _environment() -> jinja2.Environment:
    """With what templates of public models expect."""
    extensions = [_Generation, jinja2.ext.loopcontrols]
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8; give a chat template") from error


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path))
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: not JSON ({error}); restore or remove it") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path}: not an object; restore or remove it")
    return found


def _content(token: Any) -> str | None:
    """Of a token as tokenizer_config.json has it: a text, or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _of_config(template: Any) -> str | None:
    """A template, or of a list of named ones the default."""
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
