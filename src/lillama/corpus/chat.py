"""Chat turns as one text, written with the tokenizer's own template, which may fail in any way."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from lillama.corpus.bounded import ended_within, within_memory
from lillama.errors import DataError
from lillama.model.tokenizer import explain_failures

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of the roles
OWN = ("role", "content", "from", "value")  # keys of a turn that are understood here; all others go to the template
TEXT_PARTS = ("text", "input_text", "output_text")
DIGITS = 4  # of numbers whose power is computed in no time
SECONDS, MEMORY = 5.0, 1 << 30  # of computing, and bytes, that a template may take for one conversation
SWELL, ROOM = 100, 1 << 20  # characters of the text for each that is said, and besides
ASKED = "What does a template do with this?"
LISTED = re.compile(r"""['"]type['"]\s*:""")  # in a text: a list of parts that was printed as it stands


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, and in which form it takes what is said.

    Attributes:
        tokenizer: whose template it is.
        takes_text: whether a turn's content may be a text.
        takes_parts: whether it may be a list of parts, `[{"type": "text", "text": ...}]`.
    """

    tokenizer: PreTrainedTokenizerBase
    takes_text: bool
    takes_parts: bool

    def write(self, turns: Sequence[Any], where: str) -> str:
        """Return turns (role and content, or ShareGPT's from and value) as text.

        Raises:
            DataError: a turn is none, or the template fails.
        """
        return _render(
            self.tokenizer, [self._message(turn, f"{where}, turn {n}") for n, turn in enumerate(turns, 1)], where
        )

    def _message(self, turn: Any, where: str) -> dict[str, Any]:
        """Return a turn as templates know it; what is null or empty is left out."""
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: is {type(turn).__name__}; a turn is an object with `role` and `content`")
        role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value") or ""
        if not isinstance(role, str) or not isinstance(content, str | list):
            raise DataError(f"{where}: a turn has {', '.join(turn)}; it needs texts `role` and `content`")
        more = {key: value for key, value in turn.items() if key not in OWN and value not in (None, "", [], {})}
        return {"role": ROLES.get(role, role), "content": self._content(content, where)} | more

    def _content(self, content: str | list[Any], where: str) -> str | list[dict[str, str]]:
        """Return what is said in the form that the template takes."""
        texts = [content] if isinstance(content, str) else [_text(part, n, where) for n, part in enumerate(content, 1)]
        as_text = not self.takes_parts or (self.takes_text and isinstance(content, str))
        return "".join(texts) if as_text else _parts(texts)


def chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> ChatTemplate:
    """Find a tokenizer's template, and by trying which form of content it takes.

    Raises:
        DataError: there is none, none of several is the default, it is no text, or it does not come to an end.
    """
    found: Any = tokenizer.chat_template
    if not found:
        raise DataError(
            f"{where}: holds chat turns, but the tokenizer has no chat template; "
            "set `chat_template` in its tokenizer_config.json, or give a source of plain text"
        )
    if isinstance(found, dict) and "default" not in found:
        raise DataError(
            f"{where}: holds chat turns, but of the tokenizer's chat templates ({', '.join(map(str, found))}) none is called "
            "default; name one so in its tokenizer_config.json, or give a source of plain text"
        )
    default = found["default"] if isinstance(found, dict) else found
    if not isinstance(default, str):
        raise DataError(f"{where}: the tokenizer's chat template is {type(default).__name__}; it must be text")
    if _raises_to_a_power(default):
        raise DataError(
            f"{where}: the tokenizer's chat template raises to a power (**), which may never end and no template needs; take "
            "it out"
        )
    text, parts = (_attempt(tokenizer, content, where) for content in (ASKED, _parts([ASKED])))
    printed = len(LISTED.findall(parts)) > len(LISTED.findall(text))
    return ChatTemplate(tokenizer, ASKED in text, ASKED in parts and not printed)


def _raises_to_a_power(template: str) -> bool:
    """Tell whether a template holds a power of more than two small numbers: no signal ends that of large ones.

    >>> [_raises_to_a_power(f"{{{{ {power} }}}}") for power in ("2**8", "f(**x)", "9**9**9", "9**x")]
    [False, False, True, True]
    """
    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(template) if kind != "whitespace"]
    except TemplateError:  # which is told when it is used
        return False
    powers = [place for place, token in enumerate(tokens) if token == ("operator", "**")]
    operands = ([tokens[place - 1], *tokens[place + 1 : place + 3]] for place in powers)
    return any(
        before[1] not in ("(", ",")  # of `f(**arguments)`
        and not (_is_small(before) and all(map(_is_small, after[:1])) and ("operator", "**") not in after)
        for before, *after in operands
    )


def _is_small(token: tuple[str, str]) -> bool:
    kind, text = token
    return kind == "integer" and len(text) <= DIGITS


def _attempt(tokenizer: PreTrainedTokenizerBase, content: str | list[dict[str, str]], where: str) -> str:
    """Return one turn as the template writes it; nothing where it fails, for it may want more turns."""
    try:
        return _render(tokenizer, [{"role": "user", "content": content}], where)
    except DataError as error:
        if isinstance(error.__cause__, TimeoutError):
            raise
        return ""


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str) -> str:
    """Return messages as the template writes them.

    Raises:
        DataError: it refuses them, fails, does not end, or writes far more than was said.
    """

    def explain(reason: str) -> DataError:
        return DataError(f"{where}: the chat template refuses the turns ({reason}); mend the template or the record")

    with explain_failures(explain), ended_within(SECONDS):
        try:
            with within_memory(MEMORY):
                text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
        except MemoryError:
            raise explain("it fills the memory") from None
    if len(text) > SWELL * sum(len(str(message["content"])) for message in messages) + ROOM:
        raise explain(f"it writes {len(text)} characters")
    return text


def _parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _text(part: Any, number: int, where: str) -> str:
    """Return the text of a part of a turn's content."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind, text = part.get("type") or "text", part.get("text")
        if kind in TEXT_PARTS and isinstance(text, str):
            return text
        told = f"of type {kind!r}" if kind not in TEXT_PARTS else "without a text"
    else:
        told = type(part).__name__
    raise DataError(
        f"{where}: part {number} is {told}; calibration reads parts of text alone: leave the record out, or keep its text"
    )
