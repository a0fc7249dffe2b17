"""Chat templates: `transformers` judges the text, and no template may take more than it is given."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tokenizer_svc import chat
from tokenizer_svc.chat import ChatTemplate
from weft.errors import InvalidRequest, SettingsError
from weft.messages import ChatMessage, ChatPrompt
from weft.model_folder import BUNDLED

TALES = BUNDLED / "tales-1m"
NOW = datetime(2026, 3, 9, 14, 5, 7).timestamp()

# Written here in the manner of well-known families.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "instruct with system folded in": """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}
            {{- ' [INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "dated header with macros": """
{%- macro header(role) -%}
<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{{- bos_token }}
{{- header('system') }}
Cutting Knowledge Date: December 2023
Today Date: {{ date_string }}
{%- if tools is not none %}Tools: {{ tools | tojson }}{% endif %}
<|eot_id|>
{%- for message in messages if message.role != 'system' %}
    {{- header(message.role) ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
""",
    "blocks on their own lines": """
{% set ns = namespace(turns=0, last='') %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set ns.turns = ns.turns + 1 %}
    {% set ns.last = message.content %}
    {% if ns.turns > 4 %}
        {% break %}
    {% endif %}
### {{ message.role | capitalize }} ({{ loop.index }}/{{ loop.length }}):
{{ message.content | replace('\r', '') | trim }}

{% endfor %}
### Turns: {{ ns.turns }}, last: {{ ns.last | upper | truncate(12) }}
""",
    "json": """
{{- messages | tojson }}
{{ messages[0] | tojson(indent=2) }}
{{ {'z': 1, 'a': ['<b>', "it's", 'ü']} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}
""",
    "generation marked": (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{% generation %}{% set inner = 1 %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message.role }}: {{ message.content }}\n{% endif %}{% endfor %}"
    ),
    "a bit of everything": (
        "{{ dict(a=1).items() | list }}{{ dict.fromkeys(['x', 'y'], 0) }}{{ range(3) | join('-') }}"
        "{{ '%s has %d' % ('it', 3) }}{{ '{:>6}|{:.2f}'.format('ab', 1.5) }}{{ 2 ** 10 + 3 % 2 }}{{ 'ab' * 3 }}"
        "{{ messages | map(attribute='role') | unique | sort | join(', ') }}{{ [1] + [2] }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ missing }}"
        "{{ messages[-1]['content'].split(' ')[0].strip().startswith('T') }}{{ unk_token is defined }}"
        "{{ 'a\nb' | indent(2) }}{{ 'x' | center(5) }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ none ~ 1 ~ true }}"
        "{% filter upper %}abc{% endfilter %}{% set block %}kept {{ bos_token }}{% endset %}{{ block }}"
        "{{ messages[0].name if 'name' in messages[0] else 'nameless' }}{{ cycler('a', 'b').next() }}"
    ),
}
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one question": [{"role": "user", "content": "Tell me a tale  about {{ a fox }} & <others>\n"}],
    "system and turns": [
        {"role": "system", "content": "  Be brief. "},
        {"role": "user", "content": "Tell me", "name": "Ann"},
        {"role": "assistant", "content": "No.\n"},
        {"role": "user", "content": "ünïcode 🦊 {% raw %}"},
    ],
}


def prompt_of(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> ChatPrompt:
    return ChatPrompt([ChatMessage(**message) for message in messages], add_generation_prompt, NOW)


def template_of(source: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens)


def make_folder(path: Path, *, config: dict[str, Any] | None = None, files: dict[str, str] | None = None) -> Path:
    """A tokenizer's folder as `transformers` reads it."""
    path.mkdir(parents=True)
    shutil.copy(TALES / "tokenizer.json", path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    (path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    for name, text in (files or {}).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text, "utf-8")
    return path


@pytest.fixture(scope="module")
def judge() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TALES)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_text_is_that_of_transformers(
    source: str, messages: list[dict[str, str]], judge: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromtimestamp(NOW, tz)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    template = ChatTemplate(
        source, chat.special_tokens(TALES, json.loads((TALES / "tokenizer_config.json").read_text()))
    )
    for add in (True, False):
        expected = judge.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=add)
        assert template.render(prompt_of(messages, add)) == expected


ADDED = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
DECODER = {"0": {"content": "<|bos|>", "special": True}}
OLD_MAP = {"special_tokens_map.json": '{"bos_token": "<|eos|>"}'}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"chat_template": "one {{ bos_token }}", "bos_token": "<|bos|>"}, {}),
        ({"chat_template": "config"}, {"chat_template.jinja": "file\n"}),
        ({"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]}, {}),
        ({}, {"chat_template.jinja": "main", "additional_chat_templates/rag.jinja": "rag"}),
        ({"chat_template": "{{ bos_token }}|{{ sep_token }}|", "bos_token": {"content": "<|bos|>", **ADDED}}, {}),
        ({"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": None, "eos_token": "<|end|>"}, {}),
        ({"chat_template": "{{ bos_token }}", "bos_token": "<|bos|>"}, OLD_MAP),
        ({"chat_template": "{{ bos_token }}", "bos_token": "<|bos|>", "added_tokens_decoder": DECODER}, OLD_MAP),
        ({"chat_template": "{{ image_token }}", "image_token": "<|pad|>"}, {}),
    ],
)
def test_template_and_tokens_are_found_where_transformers_finds_them(
    config: dict[str, Any], files: dict[str, str], tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", config=config, files=files)
    template = chat.load(folder)
    assert template is not None
    judge = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = CONVERSATIONS["one question"]
    assert template.render(prompt_of(messages)) == judge.apply_chat_template(messages, tokenize=False)


def test_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert chat.load(make_folder(tmp_path / "base")) is None


def test_template_that_does_not_compile_is_named_with_its_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "broken", config={"chat_template": "{% for x in %}"})
    with pytest.raises(SettingsError, match="broken.*does not compile"):
        chat.load(folder)


def test_several_templates_without_a_default_are_an_error(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", files={"additional_chat_templates/rag.jinja": "rag"})
    with pytest.raises(SettingsError, match="rag, but no default"):
        chat.load(folder)


def test_refusal_of_a_template_reaches_the_client() -> None:
    template = template_of("{{ raise_exception('Only user and assistant roles are supported!') }}")
    with pytest.raises(InvalidRequest, match="Only user and assistant roles") as caught:
        template.render(prompt_of(CONVERSATIONS["one question"]))
    assert caught.value.param == "messages"


def test_template_that_fails_on_messages_is_the_requests_end_and_no_more() -> None:
    template = template_of("{{ messages[1]['content'] + 1 }}")
    for messages in CONVERSATIONS.values():
        with pytest.raises(InvalidRequest, match="chat template"):
            template.render(prompt_of(messages))


def again(expression: str) -> str:
    """A string that becomes the expression forty times."""
    return "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = " + expression + " %}{% endfor %}"


HUGE = {
    "string times number": "{{ 'ab' * 10 ** 9 }}",
    "list times number": "{{ ([0] * 10 ** 10) | length }}",
    "number on the left": "{{ 10 ** 9 * 'ab' }}",
    "power": "{{ 10 ** (10 ** 6) }}",
    "number by itself": "{% set ns = namespace(n=3) %}{% for i in range(40) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "doubling with plus": again("ns.s + ns.s"),
    "doubling with tilde": again("ns.s ~ ns.s"),
    "doubling with join": again("[ns.s, ns.s] | join"),
    "doubling with method join": again("''.join([ns.s, ns.s])"),
    "doubling with blocks": (
        "{% set ns = namespace(s='x') %}{% for i in range(40) %}"
        "{% set twice %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = twice %}{% endfor %}"
    ),
    "doubling with format": again("'%s%s' % (ns.s, ns.s)"),
    "percent width": "{{ '%1000000000d' % 1 }}",
    "named percent width": "{{ '%(n)1000000000d' % {'n': 1} }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "nested format width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "padding": "{{ 'x'.ljust(10 ** 9) }}",
    "centre filter": "{{ 'x' | center(10 ** 9) }}",
    "tabs": "{{ ('\t' * 10 ** 6).expandtabs(10 ** 4) }}",
    "replace": "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "replace filter": "{{ ('a' * 10 ** 6) | replace('', 'b' * 10 ** 6) }}",
    "indent": "{{ ('\n' * 10 ** 6) | indent(9999) }}",
    "json": "{{ [1] | tojson(indent=10 ** 9) }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list | length }}",
    "range": "{{ range(10 ** 9) | list | length }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(10 ** 6) }}",
    "date": "{{ strftime_now('%c' * 9999) }}",
}


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_template_cannot_make_much_out_of_little(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        template_of(source).render(prompt_of(CONVERSATIONS["one question"]))


ESCAPES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "item": "{{ ''['__class__']['__mro__'] }}",
    "attribute filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mutation": "{{ messages.append(1) }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "namespace item": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "include": "{% include 'etc/passwd' %}",
}


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES)
def test_template_stays_in_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        template_of(source).render(prompt_of(CONVERSATIONS["one question"]))
