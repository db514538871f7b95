"""Chat templates: the bytes that transformers makes, and strangers' templates that do harm or never end."""

from __future__ import annotations

import ast
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from small_model import make_seven

from llmcli.data.chat_template import ChatTemplate, open_template
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

# The way published models write them, in their whitespace too.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = """{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""
THINKING = """{%- set ns = namespace(last=messages|length - 1, thoughts='') %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not message.content.startswith('<tool>') %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
  {% for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {% generation %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
        {%- if message.reasoning_content is defined %}{{ message.reasoning_content | tojson }}{% endif %}
    {%- endif %}
  {% endfor %}
{{- dict(a=1, b=[ns.last]) | tojson(indent=2) if add_generation_prompt }}
"""
NAMES = ["CHATML", "LLAMA2", "LLAMA3", "LLAMA31", "MISTRAL", "ZEPHYR", "GEMMA", "PHI3", "THINKING"]
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": '  What is <b> & "é"? \n'},
    {"role": "assistant", "content": "<think>\nhm</think>\n\nA tag – 春.  "},
    {"role": "user", "content": "And {{ 1 + 1 }}?"},
]
CHATS = {
    "one": TURNS[:1],
    "three": TURNS,
    "system": [{"role": "system", "content": "Be brief.\n"}, *TURNS],
    "answered": TURNS[:2],
    "wrong order": [TURNS[1], TURNS[0]],
    "thoughts": [{**TURNS[0], "reasoning": "why?"}, *TURNS[1:]],
}


def rendered(text: str, messages: list[dict[str, Any]], **details: Any) -> str:
    with ChatTemplate(text, TOKENS) as template:
        return template.render(messages, **details)


@pytest.fixture(scope="module")
def templates() -> Iterator[dict[str, ChatTemplate]]:
    made = {name: ChatTemplate(globals()[name], TOKENS) for name in NAMES}
    yield made
    for template in made.values():
        template.close()


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_transformers(name: str, prompt: bool, templates: dict[str, ChatTemplate]) -> None:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    for messages in CHATS.values():
        details = {"chat_template": globals()[name], "add_generation_prompt": prompt, **TOKENS}
        try:
            (expected,), _ = render_jinja_template([messages], **details)
        except TemplateError as error:
            with pytest.raises(DataError, match=re.escape(str(error))):
                templates[name].render(messages, add_generation_prompt=prompt)
        else:
            assert templates[name].render(messages, add_generation_prompt=prompt) == expected


ATTACKS = {
    "popen": "{{ lipsum.__globals__['os'].popen('touch X').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch X') }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format": "{{ '{0.__class__.__mro__}'.format('x')|length or nothing.at.all }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}).real.real.real }}",
    "mutation": "{{ messages.append(1) }}",
    "pop": "{{ messages[0].clear() }}",
    "namespace": "{% set n = namespace(__init__=1) %}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'x' %}",
    "self": "{{ self.__init__.__globals__ }}{{ self.__init__.__globals__.sys.exit() }}",
    "raise": "{{ raise_exception.__globals__.os.environ }}",
    "strftime": "{{ strftime_now.__globals__['datetime'] }}",
    "undefined": "{{ nothing.__init__.__globals__ }}",
    "extra mro": "{{ ().__class__.__base__.__subclasses__()[0]('x') }}",
    "generator": "{% set g = (messages|map('length')) %}{{ g.gi_frame.f_globals.x.y }}",
    "unicode": "{{ ''['__cl' ~ 'ass__']['__mro__'] }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "sum": "{{ [[].__class__]|sum(start='') }}",
    "map attribute": "{{ ['x']|map(attribute='__class__')|map(attribute='__mro__')|list|first|list }}",
    "groupby": "{{ ['x']|groupby('__class__.__mro__')|list|length and nothing.at.all }}",
    "percent": "{{ ('%s' % messages.__class__.__base__).x.y }}",
    "coroutine": "{{ raise_exception.__code__.co_consts }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__.x }}",
    "context": "{% set c = self._TemplateReference__context %}{{ c.environment.globals.x.y }}",
    "loop": "{% for a in [1] %}{{ loop.__class__.__init__.__globals__ }}{{ loop._iterator.__reduce__() }}{% endfor %}",
    "dict": "{{ dict.__call__.__globals__ }}",
    "setattr": "{% set messages.x = 1 %}",
    "from": "{% from '/etc/passwd' import x %}",
    "loads": "{{ (1).__reduce_ex__(2)[0].__globals__.os }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_reaches_nothing_beyond_its_messages(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        said = rendered(ATTACKS[name], TURNS[:1])
    except DataError as error:
        said = ""
        refusal = str(error)
    else:
        refusal = ""
    assert said in ("", "None", "0")
    assert "\n" not in refusal
    assert os.listdir(tmp_path) == []


BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{{ '' }}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "product": "{{ 'a' * 10**10 }}",
    "list": "{{ [1] * 10**10 }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "center": "{{ ''|center(10**10) }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "str.format": "{{ '{:>9999999999}'.format(1) }}",
    "macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "blocks": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "power": "{{ 3 ** (3 ** 30) }}",
    "output": "{% for i in range(99999) %}{{ 'abcdefgh' * 100 }}{% endfor %}",
    "wordwrap": "{{ ('a b ' * 10000000)|wordwrap(1)|wordwrap(2) }}",
    "json": "{{ range(99999)|list|tojson(indent=10**9) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_works_without_end_is_stopped(name: str) -> None:
    begun = time.process_time()
    with ChatTemplate(BOMBS[name]) as template:
        with pytest.raises(DataError) as caught:
            template.render(TURNS)
        assert "\n" not in str(caught.value)
        template.text = "{{ messages[0].role }}"
        assert template.render(TURNS) == "user"  # the next one is served
    assert time.process_time() - begun < 2  # the work is the child's


def test_the_child_may_not_take_much_memory_or_write() -> None:
    text = "{{ ('a' * 10 ** 6)|length }}"
    with ChatTemplate(text) as template:
        assert template.render([]) == "1000000"
        assert template._child is not None
        limits = Path(f"/proc/{template._child.pid}/limits")
        if limits.exists():
            found = {line[:26].strip(): line[26:].split()[1] for line in limits.read_text().splitlines()[1:]}
            assert (found["Max file size"], found["Max processes"]) == ("0", "0")
            assert int(found["Max data size"]) <= 256 << 20


def test_a_template_of_a_megabyte_is_refused_unread() -> None:
    with pytest.raises(DataError, match="10,485,760 characters"):
        ChatTemplate("a" * (10 << 20))


def test_a_wrong_template_is_told_with_its_line() -> None:
    with ChatTemplate("{{ 1 }}\n{% if %}", where="t.jinja") as template:  # noqa: SIM117
        with pytest.raises(DataError, match=r"t\.jinja:2: is not a Jinja template: ") as caught:
            template.render([])
    assert "\n" not in str(caught.value)


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    folder = make_seven(tmp_path / "t")
    with pytest.raises(DataError, match=r"no chat template.*--template FILE"):
        open_template(load_tokenizer(folder))
    several = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ eos_token }}|{{ bos_token }}"},
    ]
    content = {"eos_token": "<|endoftext|>", "bos_token": None, "chat_template": several}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    with open_template(load_tokenizer(folder)) as template:
        assert template.render([]) == "<|endoftext|>|"
    (folder / "chat_template.jinja").write_text("own")
    with open_template(load_tokenizer(folder)) as template:
        assert template.render([]) == "own"
    (tmp_path / "given.jinja").write_text("given")
    with open_template(load_tokenizer(folder), tmp_path / "given.jinja") as template:
        assert template.render([]) == "given"


def test_one_place_renders() -> None:
    for path in (ROOT / "llmcli").rglob("*.py"):
        if path.name == "chat_template.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [item.name for item in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("jinja2")], path
