"""Conversations as text: the chat template, set up as transformers does, which itself would take seconds to import."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from exporter.inputs.tokenizer import TokenizerFiles

if TYPE_CHECKING:
    from jinja2 import Template


# Marks the assistant's words for training and renders as nothing; only transformers and llama-cpp-python know the tag.
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def chat_renderer(tokenizer: TokenizerFiles) -> Callable[..., str | None]:
    """Renders conversations by the chat template; what it is given goes to the template by name.

    The renderer returns None where there is no template, or the template refuses or cannot be read.
    """
    from jinja2 import TemplateError

    try:
        template = _compile(tokenizer.chat_template)
    except TemplateError:
        template = None

    def render(**values: Any) -> str | None:
        if template is None:
            return None
        try:
            return template.render(**tokenizer.special_tokens | values)
        except (TemplateError, TypeError, KeyError, ValueError):
            return None

    return render


# Compiling takes longer than everything that is rendered in a plan.
@lru_cache(maxsize=8)
def _compile(source: str | None) -> Template | None:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if source is None:
        return None

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        # jinja's own escapes <, > and &; transformers' does not.
        return json.dumps(value, **{"ensure_ascii": False} | options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda _format: ""}
    return environment.from_string(_GENERATION_TAG.sub("", source))
