"""Chat templates as publishers write them, and edited ones, with the conversations that tests write by them."""

from __future__ import annotations

from typing import Any

# deepseek-community/Janus-Pro-1B, with the lines joined as its conversion script has them
PUBLISHED_JANUS = (
    "{%set seps=['\n\n','EOS']%}{%set i=0%}{%for message in messages%}"
    "{%if message['role']=='user' or message['role']=='User'%}<|User|>: {%else%}<|Assistant|>: {%endif%}"
    "{%for content in message['content']%}{%if content['type']=='image'%}"
    "{%if not loop.first%}{{'\n'}}{%endif%}<image_placeholder>{%if not loop.last%}{{'\n'}}{%endif%}"
    "{%elif content['type']=='text'%}{%set text=content['text']%}"
    "{%if loop.first%}{%set text=text.lstrip()%}{%endif%}{%if loop.last%}{%set text=text.rstrip()%}{%endif%}"
    "{%if not loop.first and message['content'][loop.index0-1]['type']=='text'%}{{' '+text}}"
    "{%else%}{{text}}{%endif%}{%endif%}{%endfor%}"
    "{%if not loop.last or add_generation_prompt%}{%if message['role']=='User' or message['role']=='user'%}"
    "{{seps[0]}}{%else%}{{seps[1]}}{%endif%}{%endif%}{%endfor%}"
    "{%if add_generation_prompt%}<|Assistant|>:{%endif%}"
)
CHATML = """
{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou paint.<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else 'IMAGE' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# the system's words inside the first question, and an end token after each answer
INSTRUCT = """
{{- bos_token -}}
{%- set told = namespace(words='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set told.words = '<<SYS>>' + message['content'][0]['text'] + '<</SYS>> ' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + told.words -}}{%- set told.words = '' -%}
{%- for part in message['content'] -%}
{{- part['text'] | trim if part['type'] == 'text' else 'IMAGE' + ' - ' -}}
{%- endfor -%}
{{- ' [/INST]' -}}
{%- else -%}
{{- ' ' + (message['content'][0]['text'] | trim) + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
# other roles, separators and words of the system's, and nothing between the turns that ends an answer
EDITED = """
{{- 'The talk of a painter.\n' -}}
{%- for message in messages -%}
{{- {'user': 'Guest> ', 'assistant': 'Painter> ', 'system': 'Rule> '}[message['role']] -}}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else ('' if loop.first else '; ') + 'IMAGE' + ' ~ ' -}}
{%- endfor -%}
{{- '\n--\n' -}}
{%- endfor -%}
{{- 'Painter>' if add_generation_prompt else '' -}}
"""
# content as one text, as tokenizers' templates without images have it
TEXTS_ONLY = """
{%- for message in messages -%}
{{- message['role'] + ': ' + message['content'] + '\n' -}}
{%- endfor -%}
{{- 'assistant:' if add_generation_prompt else '' -}}
"""
HOSTILE = {
    "an endless loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}x",
    "much memory": "{{ 'a' * 10 ** 10 }}",
    "a long text": "{{ 'a' * 10 ** 6 }}",
    "a range without end": "{% for i in range(10 ** 9) %}a{% endfor %}",
    "a huge power": "{{ 10 ** 10 ** 10 }}",
    "a wide format": "{{ '%0999999999d' % 1 }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "another file": "{% include '/etc/passwd' %}",
    "a fault": "{{ raise_exception('no turns \n here') }}",
    "bad syntax": "{% for message in messages %}",
    "no words": "hello",
}


def turn(role: str, *parts: str | None) -> dict[str, Any]:
    """A message of texts, and of images where a part is None."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


SYSTEM = turn("system", "Be brief.")
CONVERSATIONS = {
    "one turn": [turn("user", "what is this?")],
    "one image": [turn("user", None, "what is this?")],
    "three images": [turn("user", None, None, None, "a red apple: what \n\nis it?")],
    "a system's message": [SYSTEM, turn("user", "what is this?")],
    "several turns": [
        turn("user", "what?"),
        turn("assistant", "it is a red apple"),
        turn("user", "what is on it?"),
        turn("assistant", "a blue"),
        turn("user", "a?"),
    ],
    "all of it": [
        SYSTEM,
        turn("user", None, None, "what are these?"),
        turn("assistant", "two apples.\n\nRed ones"),
        turn("user", "and these?"),
        turn("assistant", "it is: a background"),
        turn("user", None, "and this?"),
    ],
}
