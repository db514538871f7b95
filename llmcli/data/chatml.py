"""ChatML: the chat template for a model that has none, and its two tokens.

Invariant: adding it changes no id that the tokenizer had: the new tokens stand behind the vocabulary.

Source: the form is OpenAI's (github.com/openai/openai-python, v0.28, chatml.md); calls of tools stand between
<tool_call> tags, as NousResearch's Hermes models write them.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from llmcli.data.tokenizer_files import added_token

if TYPE_CHECKING:
    from llmcli.data.tokenizer import TextTokenizer

BEGIN, END = "<|im_start|>", "<|im_end|>"
TOKENS = (BEGIN, END)
TEMPLATE = r"""{%- set first = messages[0] if messages and messages[0].role == 'system' else none %}
{%- if first or tools %}
{{- '<|im_start|>system\n' }}
{%- if first %}{{- first.content }}{%- endif %}
{%- if tools %}
{{- '\n\n' if first else '' }}{{- 'Tools:\n' }}
{%- for tool in tools %}{{- (tool.function or tool) | tojson }}{{- '\n' }}{%- endfor %}
{{- 'A call: <tool_call>{"name": "...", "arguments": {...}}</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (first and loop.first) %}
{{- '<|im_start|>' + message.role + '\n' }}{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '\n' if message.content or not loop.first else '' }}
{{- '<tool_call>' }}{{- {'name': function.name, 'arguments': function.arguments} | tojson }}{{- '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


def with_chatml(tokenizer: TextTokenizer) -> TextTokenizer:
    """The tokenizer with the template, and with its tokens behind the vocabulary where it has them not."""
    from llmcli.data.tokenizer import TextTokenizer

    files = tokenizer.files
    content: dict[str, Any] = json.loads(files.text)
    added = content.get("added_tokens") or []
    next_id = tokenizer.vocab_size
    for token in TOKENS:
        identity = tokenizer.id_of(token)
        if identity in tokenizer.special_ids:
            continue
        if identity is None:
            identity, next_id = next_id, next_id + 1
        added = [each for each in added if each["content"] != token] + [added_token(identity, token)]
    content["added_tokens"] = sorted(added, key=lambda each: int(each["id"]))
    text = json.dumps(content, ensure_ascii=False)
    config = {name: value for name, value in files.config.items() if name != "chat_template"}
    return TextTokenizer(dataclasses.replace(files, text=text, content=content, config=config, chat_template=TEMPLATE))
