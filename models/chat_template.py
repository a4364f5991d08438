"""Chat templates: Jinja programs that come with a model and write a conversation as its prompt."""

from __future__ import annotations

import datetime
import functools
import json
import traceback
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox


class _Generation(jinja2.ext.Extension):
    """Writes what lies between `{% generation %}` and `{% endgeneration %}`: the marks are for training only."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Runs a template.

    Args:
      template: its source.
      variables: what it may read, by name.

    Raises:
      ValueError: it cannot be read, or fails; the message says where and why.
    """
    try:
        return _compiled(template).render(variables)
    except Exception as error:  # whatever a program from a file may raise, from TypeError to its own refusal
        line = _line_of(error)
        where = repr(template if len(template) <= 40 else f"{template[:37]}...") + (f", line {line}," if line else "")
        own = isinstance(error, jinja2.TemplateError)
        cause = error.message if isinstance(error, jinja2.TemplateSyntaxError) else str(error)
        cause = " ".join((cause or "").split())
        cause = cause if own and cause else f"{type(error).__name__}{': ' * bool(cause)}{cause}"
        raise ValueError(f"The chat template {where} cannot render these messages: {cause}") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _line_of(error: Exception) -> int | None:
    """Returns the line of the template that failed; Jinja puts it into tracebacks."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None)


def _environment() -> jinja2.Environment:
    """Templates come from downloaded files: the sandbox lets them format text and nothing else."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Templates write JSON for the model, not for a web page: no HTML escapes.
        separators = tuple(separators) if separators is not None else None
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
