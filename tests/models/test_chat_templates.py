"""Chat templates render as transformers renders them, and their faults are one sentence."""

import dataclasses
import re

import pytest

from models import tokenizer

MESSAGES = [{"role": "user", "content": "Grüß <b>"}, {"role": "assistant", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "now", "description": "Says the time"}}]


def chat(tiny, template: str, **more) -> str:
    read = dataclasses.replace(tokenizer.from_gguf(tiny.gguf_fields), chat_template=template)
    return read.chat(MESSAGES, **more)


# What transformers 5.24 renders: `_compile_jinja_template(template).render(messages=..., tools=..., documents=...)` of
# `transformers.utils.chat_template_utils`.
@pytest.mark.parametrize(
    "template, more, rendered",
    [
        (
            "{% for m in messages %}\n"
            "{{ m.role }}:\n"
            "{% if m.role == 'assistant' %}\n"
            "  {% generation %}\n"
            "{{ m.content }}<|im_end|>\n"
            "  {% endgeneration %}\n"
            "{% else %}\n"
            "{{ m.content }}\n"
            "{% endif %}\n"
            "{% endfor %}",
            {},
            "user:\nGrüß <b>\nassistant:\nHi<|im_end|>\n",
        ),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", {}, "21"),
        ("{%- generation -%}  a  {%- endgeneration -%}", {}, "a"),
        ("{{ messages[0] | tojson }}", {}, '{"role": "user", "content": "Grüß <b>"}'),
        (
            "{{ messages[0] | tojson(ensure_ascii=True, separators=(',', ':')) }}",
            {},
            '{"role":"user","content":"Gr\\u00fc\\u00df <b>"}',
        ),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, indent=1) }}", {}, '{\n "a": 2,\n "b": 1\n}'),
        ("{{ [1, 2] | tojson(ensure_ascii=False, separators=[', ', ': ']) }}", {}, "[1, 2]"),
        ("{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}", {}, ""),
        (
            "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
            {"enable_thinking": False},
            "<think></think>",
        ),
        ("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}|{{ tools is none }}", {}, "|True"),
        ("{{ tools | length }}: {{ tools[0].function.name }}", {"tools": TOOLS}, "1: now"),
        ("{{ documents is none }}{{ add_generation_prompt }}", {"add_generation_prompt": False}, "TrueFalse"),
        ("{{ bos_token }}{{ date }}", {"date": "27 Nov"}, "<|im_start|>27 Nov"),
    ],
)
def test_templates_render_as_in_transformers(tiny, template, more, rendered):
    assert chat(tiny, template, **more) == rendered


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[0].role + 1 }}", "'{{ messages[0].role + 1 }}', line 1, cannot render these messages: TypeError"),
        ("\n\n{{ none.x.y }}", "line 3, cannot render these messages: 'None' has no attribute 'x'"),
        ("{{ 1 // 0 }}", "cannot render these messages: ZeroDivisionError: "),
        ("{{ messages | tojson(sorted=1) }}", "cannot render these messages: TypeError: "),
        ("{{ nothing | tojson }}", "cannot render these messages: TypeError: "),
        ("\n{{ raise_exception('roles\n alternate') }}", "line 2, cannot render these messages: roles alternate"),
        ("{% for m in messages %}", "line 1, cannot render these messages: Unexpected end of template."),
        ("{% generation %}", "line 1, cannot render these messages: "),
        ("a" * 50 + "{{ x.y }}", "'" + "a" * 37 + "...', line 1, cannot render these messages: 'x' is undefined"),
        ("{{ messages.append(1) }}", "cannot render these messages: "),
        ("{{ ''.__class__.__mro__ }}", "cannot render these messages: "),
    ],
)
def test_a_fault_is_one_sentence_that_names_template_line_and_cause(tiny, template, message):
    with pytest.raises(ValueError, match=f"^The chat template .*{re.escape(message)}") as caught:
        chat(tiny, template)
    assert "\n" not in str(caught.value)


def test_variables_do_not_leak_into_the_next_conversation(tiny):
    template = "{{ enable_thinking is defined }}"
    assert (chat(tiny, template, enable_thinking=1), chat(tiny, template)) == ("True", "False")
