"""Chat turns go through the tokenizer's template in the form that it takes, and its failures are one line."""

import json
import resource
import threading

import pytest
from transformers import PreTrainedTokenizerFast

from lillama.corpus import chat
from lillama.corpus.bounded import within_memory
from lillama.corpus.chat import chat_template
from lillama.corpus.documents import documents
from lillama.corpus.sources import Source
from lillama.errors import DataError

TEXT_ONLY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS_ONLY = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p['text'] if p['type'] == 'text' else 'IMAGE' }}{% endfor %}{% endif %}{% endfor %}"
)
PRINTS = "{{ messages[0].content | tojson }}"
AS_TEXT = [{"role": "user", "content": "Hi there"}]
AS_PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there", "image": None}]}
]


def written(tokenizer: PreTrainedTokenizerFast, template: object, turns: list) -> str:
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    own.chat_template = template
    return chat_template(own, "here").write(turns, "here")


@pytest.mark.parametrize("template", [TEXT_ONLY, PARTS_ONLY, BOTH])
@pytest.mark.parametrize("turns", [AS_TEXT, AS_PARTS])
def test_content_reaches_the_template_in_the_form_that_it_takes(tokenizer, template, turns):
    assert written(tokenizer, template, turns) == "<user>Hi there"


@pytest.mark.parametrize(
    ("template", "takes"),
    [(TEXT_ONLY, (True, False)), (PARTS_ONLY, (False, True)), (BOTH, (True, True)), (PRINTS, (True, False))],
)
def test_forms_are_found_by_trying(tokenizer, template, takes):
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    found = chat_template(own, "here")
    assert (found.takes_text, found.takes_parts) == takes


def test_a_template_that_wants_more_than_one_turn_takes_text(tokenizer):
    template = "{{ messages[0].content }}{{ messages[1].content + '' }}"
    assert written(tokenizer, template, [*AS_PARTS, {"role": "user", "content": "!"}]) == "Hi there!"


def test_other_keys_of_a_turn_reach_the_template_unless_they_say_nothing(tokenizer):
    template = "{% for m in messages %}{{ m.content }}{{ m.keys() | sort | join(',') }};{% endfor %}"
    call = {"function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"from": "human", "value": "x", "tool_calls": []},
        {"role": "tool", "content": "y", "name": "f"},
    ]
    assert written(tokenizer, template, turns) == "content,role,tool_calls;xcontent,role;ycontent,name,role;"


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "turn 1: part 1 is of type 'image_url'",
        ),
        ([*AS_TEXT, {"role": "user", "content": ["a", {"type": "text"}]}], "turn 2: part 2 is without a text"),
        ([{"role": "user", "content": [3]}], "turn 1: part 1 is int"),
        ([{"role": "user", "content": {"a": 1}}], "a turn has role, content; it needs texts"),
        ([{"role": 3, "content": "x"}], "it needs texts `role`"),
        ([*AS_TEXT, "and so on"], "turn 2: is str; a turn is an object"),
        ([*AS_TEXT, None], "turn 2: is NoneType"),
    ],
)
def test_turns_that_are_none(tokenizer, turns, match):
    with pytest.raises(DataError, match=f"here, .*{match}"):
        written(tokenizer, BOTH, turns)


def test_parts_of_other_names(tokenizer):
    parts = ["a", {"text": "b"}, {"type": "input_text", "text": "c"}, {"type": "output_text", "text": "d"}]
    assert written(tokenizer, BOTH, [{"role": "user", "content": parts}]) == "<user>abcd"


FAILURES: dict[str, tuple[object, str]] = {
    "none": ("", "no chat template"),
    "none is the default": ({"tool_use": "x", "rag": "y"}, r"\(tool_use, rag\) none is called default"),
    "a number": (5, "is int; it must be text"),
    "the default is a number": ({"default": 5}, "is int; it must be text"),
    "a list": (["x"], "is list; it must be text"),
    "refuses": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "a type": ("{{ messages[0].content + 1 }}", "can only concatenate"),
    "a division": ("{{ 1 / 0 }}", "division by zero"),
    "unknown": ("{{ messages.a.b }}", "'list object' has no attribute 'a'"),
    "syntax": ("{% for %}", "refuses the turns"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    "escape": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
    "memory": ("{{ 'a' * 10 ** 15 }}", "fills the memory"),
    "much memory": ("{{ 'a' * 10 ** 10 }}", "fills the memory"),
    "wide": ("{{ 'a'.center(10 ** 10) }}", "fills the memory"),
    "format": ("{{ '%9999999999d' % 1 }}", "fills the memory"),
    "power": ("{{ 9 ** 9 ** 9 }}", "raises to a power"),
    "another power": ("{{ messages[0].content | length ** (9 * 10 ** 8) }}", "raises to a power"),
    "swells": ("{{ 'a' * 2000000 }}", "writes 2000000 characters"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_templates_that_fail(tokenizer, failure):
    template, match = FAILURES[failure]
    with pytest.raises(DataError, match=match) as caught:
        written(tokenizer, template, AS_TEXT)
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)


def test_several_templates_with_a_default(tokenizer):
    assert written(tokenizer, {"default": TEXT_ONLY, "rag": "x"}, AS_TEXT) == "<user>Hi there"


def test_a_template_that_does_not_end_is_stopped(tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"here: the chat template .* has computed for 0\.1 s and does not end"):
        written(tokenizer, endless, AS_TEXT)


def test_bounds_of_memory_end_with_their_context():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), within_memory(1 << 26):
        assert len(b"x" * (1 << 20)) == 1 << 20
        assert not b"x" * (1 << 28)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_arguments_by_name_are_no_power(tokenizer):
    template = "{% set x = namespace(**{'a': 2}) %}{{ x.a ** 2 }}"
    with pytest.raises(DataError, match="raises to a power"):
        written(tokenizer, template, AS_TEXT)
    assert written(tokenizer, template.replace("x.a ** 2", "x.a * 2 ** 2"), AS_TEXT) == "8"


def test_other_threads_write_too(tokenizer):
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(written(tokenizer, BOTH, AS_PARTS)))
    thread.start()
    thread.join()
    assert found == ["<user>Hi there"]


def test_halves_of_surrogate_pairs_are_refused_where_they_stand(tmp_path, chat_tokenizer):
    path = tmp_path / "a.jsonl"
    for row, field in (
        ({"text": "x\ud83d"}, "text"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages"),
        ({"messages": [{"role": "\udc00", "content": "x"}]}, "messages"),
    ):
        path.write_text('{"text": "fine"}\n' + json.dumps(row))
        with pytest.raises(DataError, match=rf"a\.jsonl, line 2, field '{field}': character \d+ is \\ud"):
            list(documents(Source(str(path)), chat_tokenizer))
