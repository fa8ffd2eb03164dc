"""Rendering equals transformers' apply_chat_template; what cannot be rendered is an error that names the field."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import vocabularies

from tandem.server.text.template import ChatTemplate
from tandem.server.text.text import Text, TextError

CHATML_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "Tools:\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\\n" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last == messages|length - 1 %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{% continue %}{% endif %}
    {%- if message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
            {{- '<think>' + message.reasoning_content + '</think>' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}</tool_call>' }}
            {%- for key, value in call.arguments | dictsort %}{{- key ~ '=' ~ value ~ ';' }}{%- endfor %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
{%- endif %}
"""

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}\
{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if loop.index0 == 0 and system %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {%- if message['role'] == 'user' -%}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else -%}
        {{ ' '  + content.strip() + ' ' + eos_token }}
    {%- endif -%}
{% endfor %}
"""

GENERATION = """\
{{ bos_token }}{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '[A]' }}{% generation %}{{ m.content }}{{ '[/A]' }}{% endgeneration %}
{% else %}
[{{ m.role | upper }}]{{ m.content }}{{ m.name | default('') }}
{% endif %}{% endfor %}
{% if documents %}{% for d in documents %}<{{ d.title }}: {{ d.text }}>{% endfor %}{% endif %}
{% if add_generation_prompt %}[A]{% endif %}
"""

PARTS = """\
{% macro body(content) %}{% if content is string %}{{ content }}{% else %}\
{% for part in content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}
{% for m in messages %}<{{ m.role }}>{{ body(m.content) }}</{{ m.role }}>
{%- if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ {'ü': '<&>"'} | tojson(indent=2) }}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""

DEVELOPER = "{% for m in messages %}{{ 'D' if m.role == 'developer' else m.role }}: {{ m.content }};{% endfor %}"

TURNS = """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}
"""

TEMPLATES = {
    "turns": TURNS,
    "chatml": CHATML_TOOLS,
    "llama2": LLAMA_2,
    "generation": GENERATION,
    "parts": PARTS,
    "developer": DEVELOPER,
}

USER = {"role": "user", "content": " Wie groß ist <b>3 & 4</b>? 你好 "}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"b": 4, "a": [1, "ü"], "c": None}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [USER, {"role": "assistant", "content": "7\n"}, {"role": "user", "content": "Sure?", "name": "x"}],
    "answered": [USER, {"role": "assistant", "content": "It is  ", "reasoning_content": "hm"}],
    "nulls": [USER, {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None, "audio": None}],
    "tools": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "assistant", "content": "5", "reasoning": "so"},
    ],
    "brackets": [{"role": "user", "content": "{{ 7*7 }} {% raw %} <|im_end|> </s>"}],
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "größer <als>", "parameters": {}}}]
OPTIONS: dict[str, dict[str, Any]] = {
    "open": {"add_generation_prompt": True},
    "closed": {"add_generation_prompt": False},
    "tools": {"add_generation_prompt": True, "tools": TOOLS},
    "continued": {"add_generation_prompt": False, "continue_final_message": True},
    "documents": {"add_generation_prompt": True, "documents": [{"title": "t", "text": "x"}]},
    "kwargs": {"add_generation_prompt": True, "kwargs": {"enable_thinking": False, "bos_token": "[B]"}},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_equals_transformers(tmp_path: Path, template: str, options: str) -> None:
    from transformers import AutoTokenizer

    path = vocabularies.llama(tmp_path, chat_template=TEMPLATES[template])
    reference, text = AutoTokenizer.from_pretrained(path), Text.load(path)
    given = OPTIONS[options]
    compared = 0
    for name, chat in CHATS.items():
        flat = {key: value for key, value in given.items() if key != "kwargs"} | given.get("kwargs", {})
        try:
            expected = reference.apply_chat_template(chat, tokenize=False, **flat)
        except Exception:  # the template does not take this chat: then nor do we
            with pytest.raises(TextError):
                text.render_text(chat, **given)
            continue
        assert text.render_text(chat, **given) == expected, name
        assert text.render(chat, **given) == reference.apply_chat_template(chat, return_dict=False, **flat), name
        compared += 1
    assert compared >= 3


def render(source: str, messages: Any, **options: Any) -> str:
    return ChatTemplate(source, "test").render(messages, {}, **options)


def test_developer_becomes_system_only_where_the_template_lacks_it() -> None:
    chat = [{"role": "developer", "content": "x"}]
    assert render(DEVELOPER, chat) == "D: x;"
    assert render("{% for m in messages %}{{ m.role }}{% endfor %}", chat) == "system"


def test_text_parts_are_joined_for_templates_that_want_a_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"
    assert render(PARTS, [{"role": "user", "content": parts}]).startswith("<user>ab</user>")


def test_arguments_as_json_text_reach_the_template_as_an_object() -> None:
    source = "{% set a = messages[0].tool_calls[0].function.arguments %}{{ a.x if a is mapping else 'text ' ~ a }}"
    for arguments, expected in (('{"x": "y"}', "y"), ("", ""), ("{broken", "text {broken"), ("[1]", "text [1]")):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        message = {"role": "assistant", "tool_calls": [call]}
        assert render(source, [message]) == expected
        assert call["function"]["arguments"] == arguments  # the caller's message is left alone


def test_unknown_message_keys_reach_the_template() -> None:
    assert render("{{ messages[0].mood }}", [{"role": "user", "content": "x", "mood": "calm"}]) == "calm"


def test_formatting_of_ordinary_widths() -> None:
    source = (
        "{{ '%05.1f|%s' % (2.25, 'x') }} {{ '{:>4}'.format(7) }} {{ '%-3s|' | format('a') }} {{ '50% of 1000000' }}"
    )
    assert render(source, [USER]) == "002.2|x    7 a  | 50% of 1000000"


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        (CHATML_TOOLS, True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", True),
        ("{% macro f() %}{{ tools }}{% endmacro %}{{ f() }}", True),
        (LLAMA_2, False),
        ("{# tools #}{{ 'tools' }}{{ messages[0].tools }}", False),
        ("{% macro f(tools) %}{{ tools }}{% endmacro %}{{ f([]) }}", False),
    ],
)
def test_whether_a_template_takes_tools(source: str, takes: bool) -> None:
    assert ChatTemplate(source, "test").takes_tools is takes


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}", [USER]) == time.strftime("%Y")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (7, "messages"),
        (["hello"], "messages[0]"),
        ([USER, None], "messages[1]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content"),
        ([USER, {"role": "user", "content": [{"type": "text", "text": "a"}, 3]}], "messages[1].content[1]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "messages[0].tool_calls[0]"),
    ],
)
def test_bad_messages_are_named(messages: Any, param: str) -> None:
    with pytest.raises(TextError) as raised:
        render("{{ messages }}", messages)
    assert raised.value.param == param


def test_continuing_needs_a_text_and_no_generation_prompt() -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    with pytest.raises(TextError, match="add_generation_prompt") as raised:
        render(source, [USER], continue_final_message=True)
    assert raised.value.param == "continue_final_message"
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert render(source, [{"role": "assistant", "content": "so "}], **options) == "[so "
    with pytest.raises(TextError, match="no text to continue") as raised:
        render(source, [USER, {"role": "assistant"}], **options)
    assert raised.value.param == "messages[1].content"
    with pytest.raises(TextError, match="as it is"):
        render("{% for m in messages %}{{ m.content | lower }}{% endfor %}", [USER], **options)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "chat_template"])
def test_template_kwargs_cannot_replace_fields(name: str) -> None:
    with pytest.raises(TextError) as raised:
        render("x", [USER], kwargs={name: 1})
    assert raised.value.param == f"chat_template_kwargs.{name}"


def test_a_template_s_own_complaint_is_passed_on() -> None:
    with pytest.raises(TextError, match="refuses these messages: no!"):
        render("{{ raise_exception('no!') }}", [USER])


def test_a_template_without_a_system_role_says_so(tmp_path: Path) -> None:
    """As Gemma 2's; the template writes BOS, and it is there once whoever else is asked to add it."""
    text = Text.load(vocabularies.llama(tmp_path, chat_template=TURNS))
    bos = text.token_id("<s>")
    for asked in (False, True):
        assert text.render([USER], add_special_tokens=asked).count(bos) == 1
    with pytest.raises(TextError, match="refuses these messages: System role not supported") as raised:
        text.render([{"role": "system", "content": "Be brief."}, USER])
    assert raised.value.param == "messages"


def test_surrogates_in_messages_are_an_error(tmp_path: Path) -> None:
    text = Text.load(vocabularies.gpt2(tmp_path, chat_template="{{ messages[0].content }}"))
    with pytest.raises(TextError, match="surrogate") as raised:
        text.render([{"role": "user", "content": "\ud800"}])
    assert raised.value.param == "messages"


NESTED = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        NESTED,
        NESTED.replace("%}{%", "%}{% set x = 1 %}{%"),
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'x' * 10**10 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [0] * 10**10 }}",
        "{{ 9**9999 }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%0999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'x'.ljust(999999999) }}",
        "{{ 'x' | center(999999999) }}",
        "{{ 'x\ny' | indent(999999999) }}",
        "{{ [1] | tojson(indent=999999999) }}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set x = 'x' * 1000000 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ lipsum(100000) }}",
        "{{ raise_exception.__globals__.x }}",
    ],
)
def test_hostile_templates_end_in_an_error(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(TextError):
        render(source, [USER], seconds=0.2)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x", "{% include 'x' %}{% endif %}", "x" * (1 << 20) + "x", "{{" + "(" * 9999]
)
def test_what_is_no_template_is_an_error_at_start(source: str) -> None:
    with pytest.raises(TextError, match="chat template"):
        ChatTemplate(source, "test")


def test_long_conversations_render_in_time() -> None:
    chat = [USER, {"role": "assistant", "content": "x" * 100}] * 5000
    assert len(render(CHATML_TOOLS, chat)) > 900_000


def test_named_templates(tmp_path: Path) -> None:
    listed = [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T"},
        {"name": "rag", "template": "R"},
    ]
    path = vocabularies.gpt2(tmp_path, chat_template=listed)
    assert Text.load(path).render_text([USER]) == "D"
    assert Text.load(path).render_text([USER], tools=TOOLS) == "T"
    assert Text.load(path, "rag").render_text([USER], tools=TOOLS) == "R"
    without = Text.load(vocabularies.gpt2(tmp_path / "b", chat_template=listed[1:]))
    with pytest.raises(TextError, match=r"no default: .*--chat-template rag\|tool_use"):
        without.render_text([USER])


def test_template_files_win(tmp_path: Path) -> None:
    path = vocabularies.gpt2(tmp_path)
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Text.load(path).render_text([USER]) == "json"
    vocabularies.gpt2(tmp_path, chat_template="config")
    assert Text.load(path).render_text([USER]) == "config"
    (path / "chat_template.jinja").write_text("jinja {{ messages[0].role }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert Text.load(path).render_text([USER]) == "jinja user"
    assert Text.load(path).render_text([USER], tools=TOOLS) == "tools"
    (tmp_path / "mine.jinja").write_text("mine")
    assert Text.load(path, str(tmp_path / "mine.jinja")).render_text([USER], tools=TOOLS) == "mine"
    with pytest.raises(TextError, match=r"--chat-template nope: no such name \(alpaca, .*default, tool_use\)"):
        Text.load(path, "nope")


def test_no_template_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    text = Text.load(vocabularies.gpt2(tmp_path))
    assert not text.has_template
    with pytest.raises(TextError, match=r"--chat-template FILE\|NAME \(built in: alpaca, vicuna, chatml, plain\)"):
        text.render([USER])


BUILT_IN = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nhi\n\n### Response:\nyo</s>\n\n### Instruction:\nbye\n\n### Response:\n",
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: hi ASSISTANT: yo</s> USER: bye ASSISTANT:",
    "chatml": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "plain": "User: hi\nAssistant: yo\nUser: bye\nAssistant:",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(tmp_path: Path, name: str) -> None:
    chat = [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"), ("user", "bye"))]
    text = Text.load(vocabularies.llama(tmp_path), name)
    assert text.render_text(chat) == "<s>" + BUILT_IN[name]
    assert text.render(chat).count(1) == 1
    with_system = text.render_text([{"role": "system", "content": "Be kind."}, *chat])
    assert "Be kind." in with_system and "Below is" not in with_system and "curious" not in with_system
    assert text.render_text(chat[:2], add_generation_prompt=False, continue_final_message=True).endswith("yo")
    without_bos = Text.load(vocabularies.gpt2(tmp_path / "b"), name)
    assert without_bos.render_text(chat).replace("<|endoftext|>", "</s>") == BUILT_IN[name]
