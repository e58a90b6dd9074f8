"""The chat template that is written for transformers' processors, for a conversation that has none of its own."""

from __future__ import annotations

import json
import re

from unimm.processing.processor import UniMMProcessor

_IN_PLACE = """{%- for part in parts -%}
{%- if part['type'] == 'image' -%}
{{- ('' if loop.first else BETWEEN) + PLACEHOLDER + ('' if loop.last else AFTER) -}}
{%- else -%}
{{- part['text'] | trim -}}
{%- endif -%}
{%- endfor -%}
"""
_IMAGES_FIRST = """{%- for part in parts if part['type'] == 'image' -%}
{{- ('' if loop.first else BETWEEN) + PLACEHOLDER + AFTER -}}
{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}
{{- part['text'] | trim -}}
{%- endfor -%}
"""
_TEMPLATE = """{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{{- {'user': USER, 'assistant': ANSWER}.get(message['role'], '') -}}
PARTS{{- {'system': SYSTEM_END, 'assistant': eos_token}.get(message['role'], '') -}}
{%- endfor -%}
{{- ASSISTANT if add_generation_prompt else '' -}}
"""


def chat_template(processor: UniMMProcessor, placeholder: str, system_end: str, images_first: bool) -> str:
    """Return a chat template for the turns of a processor: its own, or one that writes them as its fields say.

    Args:
        processor: whose conversation.
        placeholder: what transformers' processor puts an image for.
        system_end: what follows a system's message.
        images_first: whether the images of a turn come before its words, wherever they are given.
    """
    turn = processor.turns
    if turn.template is not None:
        return turn.template
    words = {
        "USER": turn.user,
        "ANSWER": processor.conversation.answer_opening(),
        "ASSISTANT": turn.assistant,
        "SYSTEM_END": system_end,
        "BETWEEN": turn.between_images,
        "AFTER": turn.after_image,
        "PLACEHOLDER": placeholder,
    }
    return _filled(_TEMPLATE.replace("PARTS", _IMAGES_FIRST if images_first else _IN_PLACE), words)


def _filled(text: str, words: dict[str, str]) -> str:
    """A template with names replaced by quoted words."""
    names = re.compile(rf"\b({'|'.join(words)})\b")
    return names.sub(lambda found: json.dumps(words[found[1]], ensure_ascii=False), text)
