"""The chat template in Ollama's language: written for Qwen's kinds, and kept only where it says what the model's says.

Ollama takes Go templates (docs.ollama.com/template) over `.Messages`, `.Tools`, `.Think` and `.IsThinkSet`. What they
know is told by their fields: with `.Tools` a model takes tools, with `.Thinking` it thinks, and the texts around
`.Thinking` and `.ToolCalls` are what Ollama looks for in answers (thinking/template.go, tools/template.go), so they
stand next to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.backends.gguf.ollama.go_template import Json, quoted, render
from exporter.inputs.chat_template import chat_renderer
from exporter.inputs.tokenizer import TokenizerFiles

_Conversation = Mapping[str, Any]

_SYSTEM = {"role": "system", "content": 'You answer in "one" word.'}
_USER = {"role": "user", "content": "  What's 2 < 3 & {{ 4 }}?\n\nSay yes.\n"}
_ASSISTANT = {"role": "assistant", "content": "Yes."}
_AGAIN = {"role": "user", "content": "Sure?"}
_CALLS = [
    {"type": "function", "function": {"name": "weather", "arguments": {"place": place, "days": 2}}}
    for place in ("K\u00f6ln", "<here>")
]
_CALL = {"role": "assistant", "content": "", "tool_calls": _CALLS[:1]}
_RESULT = {"role": "tool", "content": '{"t": 21}'}
_REASONING = {"reasoning_content": "Two is less."}
_TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Today's.", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object"}}},
]

_PLAIN: tuple[_Conversation, ...] = (
    {"messages": [_USER]},
    {"messages": [_SYSTEM, _USER]},
    {"messages": [_SYSTEM, _USER, _ASSISTANT, _AGAIN]},
    {"messages": [_USER, _ASSISTANT, _SYSTEM, _AGAIN]},
    {"messages": [_USER, _ASSISTANT]},
    {"messages": [_USER], "enable_thinking": True},
    {"messages": [_SYSTEM, _USER], "enable_thinking": False},
)
_WITH_TOOLS: tuple[_Conversation, ...] = (
    {"messages": [_USER], "tools": _TOOLS},
    {"messages": [_SYSTEM, _USER], "tools": _TOOLS[:1]},
    {"messages": [_USER, _CALL, _RESULT], "tools": _TOOLS},
    {
        "messages": [_USER, _ASSISTANT | {"tool_calls": _CALLS}, _RESULT, _RESULT, _ASSISTANT, _AGAIN],
        "tools": _TOOLS,
        "enable_thinking": False,
    },
)
_WITH_THINKING: tuple[_Conversation, ...] = (
    {"messages": [_USER, _ASSISTANT | _REASONING, _AGAIN]},
    {"messages": [_USER, _ASSISTANT | _REASONING], "enable_thinking": True},
)
_WITH_BOTH: tuple[_Conversation, ...] = (
    {"messages": [_USER, _CALL | _REASONING, _RESULT], "tools": _TOOLS},
    {"messages": [_USER, _CALL | _REASONING, _RESULT, _CALL, _RESULT, _ASSISTANT], "tools": _TOOLS},
)

_START, _END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class OllamaTemplate:
    """A template that says what the model's own says.

    Attributes:
        text: the template.
        tools: whether it takes tools.
        thinking: whether it takes what the model thought.
        missing: what the model's own template takes and this does not: `tools`, `thinking`.
    """

    text: str
    tools: bool
    thinking: bool
    missing: tuple[str, ...] = ()


def ollama_template(tokenizer: TokenizerFiles) -> OllamaTemplate | None:
    """The model's chat template in Ollama's language; None if it has none, or one that no template here renders like.

    The richest of four templates is taken that gives the same text for every conversation of its kind. The spelling of
    JSON is left out of that: Ollama writes tools and arguments without spaces and in an order of its own.
    """
    source = chat_renderer(tokenizer)
    given = _given(source)
    if given is None:
        return None
    for tools, thinking in ((True, True), (True, False), (False, True), (False, False)):
        text = _template(given, tools=tools, thinking=thinking)
        if all(_alike(text, source, conversation) for conversation in _conversations(tools, thinking)):
            takes = {"tools": _matters(source, _WITH_TOOLS[0], "tools"), "thinking": _thinks(source)}
            has = {"tools": tools, "thinking": thinking}
            return OllamaTemplate(text, tools, thinking, tuple(key for key in takes if takes[key] and not has[key]))
    return None


@dataclass(frozen=True)
class _Given:
    """What differs between templates of the kind: the default system prompt, and what an answer begins with."""

    system: str
    prompt: str
    prompt_unthinking: str


def _given(source: Callable[..., str | None]) -> _Given | None:
    alone = source(messages=[_USER], add_generation_prompt=False)
    asked = source(messages=[_USER], add_generation_prompt=True)
    unthinking = source(messages=[_USER], add_generation_prompt=True, enable_thinking=False)
    if alone is None or asked is None or unthinking is None:
        return None
    if not asked.startswith(alone) or not unthinking.startswith(alone) or f"{_START}user\n" not in alone:
        return None
    system = alone.partition(f"{_START}user\n")[0].removeprefix(f"{_START}system\n").removesuffix(f"{_END}\n")
    return _Given(system, asked[len(alone) :], unthinking[len(alone) :])


def _conversations(tools: bool, thinking: bool) -> Iterator[_Conversation]:
    yield from _PLAIN
    yield from _WITH_TOOLS if tools else ()
    yield from _WITH_THINKING if thinking else ()
    yield from _WITH_BOTH if tools and thinking else ()


def _alike(text: str, source: Callable[..., str | None], conversation: _Conversation) -> bool:
    """Whether both say the same of a conversation, or the model's own refuses it."""
    expected = source(add_generation_prompt=True, **conversation)
    return expected is None or expected == render(text, ollama_values(**conversation))


def _matters(source: Callable[..., str | None], conversation: _Conversation, key: str) -> bool:
    without = {name: value for name, value in conversation.items() if name != key}
    return source(add_generation_prompt=True, **conversation) != source(add_generation_prompt=True, **without)


def _thinks(source: Callable[..., str | None]) -> bool:
    plain = source(messages=[_USER, _ASSISTANT], add_generation_prompt=True)
    return _matters(source, _PLAIN[-1], "enable_thinking") or plain != source(
        messages=[_USER, _ASSISTANT | _REASONING], add_generation_prompt=True
    )


def ollama_values(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    enable_thinking: bool | None = None,
    to_json: Callable[[Any], str] = lambda value: json.dumps(value, ensure_ascii=False),
) -> dict[str, Any]:
    """What Ollama gives a template for a conversation (template/template.go, `Execute`).

    Args:
        messages: as transformers takes them.
        tools: likewise.
        enable_thinking: the request's `think`; None if it says nothing.
        to_json: how JSON is spelled.
    """
    return {
        "System": "\n\n".join(message["content"] for message in messages if message["role"] == "system"),
        "Messages": [
            {
                "Role": message["role"],
                "Content": message["content"],
                "Thinking": message.get("reasoning_content", ""),
                "ToolCalls": [
                    {
                        "Function": {
                            "Name": call["function"]["name"],
                            "Arguments": Json(to_json(call["function"]["arguments"])),
                        }
                    }
                    for call in message.get("tool_calls", ())
                ],
            }
            for message in messages
        ],
        "Tools": [{"Function": Json(to_json(tool["function"]))} for tool in tools],
        "Think": bool(enable_thinking),
        "IsThinkSet": enable_thinking is not None,
    }


# What Qwen2.5 and Qwen3 say of tools, to the letter.
_TOOLS_TEXT = """\
{{- if .Tools }}<|im_start|>system
{{ if $system }}{{ $system }}

{{ end }}# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{{- range .Tools }}
{"type": "function", "function": {{ .Function }}}
{{- end }}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{{ else if $system }}"""
_TOOL_RESULT = """\
{{- if and (eq $previous "tool") (ne .Role "tool") }}<|im_end|>
{{ end }}
{{- if eq .Role "tool" }}
{{- if ne $previous "tool" }}<|im_start|>user{{ end }}
<tool_response>
{{ .Content }}
</tool_response>
{{- else if eq .Role "assistant" }}"""
_THOUGHT = """\
{{ if and (gt $i $asked) (or $last .Thinking) }}<think>
{{ .Thinking }}
</think>

{{ end }}"""
_TOOL_CALLS = """\
{{ if and .Content $calls }}
{{ end }}
{{- if .ToolCalls }}{{ range $n, $_ := .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ if gt (len (slice $calls $n)) 1 }}
{{ end }}{{ end }}{{ end }}"""


def _template(given: _Given, *, tools: bool, thinking: bool) -> str:
    """ChatML as Qwen writes it. The first system message stands before all else, a later one where it is."""
    unthinking = ""
    if given.prompt_unthinking != given.prompt:
        unthinking = f"{{{{ if and .IsThinkSet (not .Think) }}}}{_text(given.prompt_unthinking)}{{{{ else }}}}"
    return "".join(
        [
            f"{{{{- $system := {quoted(given.system)} }}}}\n",
            "{{- $asked := -1 }}\n" if thinking else "",
            "{{- range $i, $_ := .Messages }}\n",
            '{{- if and (eq $i 0) (eq .Role "system") }}{{ $system = .Content }}{{ end }}\n',
            '{{- if eq .Role "user" }}{{ $asked = $i }}{{ end }}\n' if thinking else "",
            "{{- end }}\n",
            _TOOLS_TEXT if tools else "{{- if $system }}",
            "<|im_start|>system\n{{ $system }}<|im_end|>\n{{ end }}\n",
            '{{- $previous := "" }}\n' if tools else "",
            "{{- range $i, $_ := .Messages }}\n",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n" if thinking else "",
            "{{- $calls := .ToolCalls }}\n" if tools else "",
            _TOOL_RESULT if tools else '{{- if eq .Role "assistant" }}',
            "<|im_start|>assistant\n",
            _THOUGHT if thinking else "",
            "{{ .Content }}",
            _TOOL_CALLS if tools else "",
            "<|im_end|>\n",
            '{{ else if or (eq .Role "user") (and $i (eq .Role "system")) }}<|im_start|>{{ .Role }}\n',
            "{{ .Content }}<|im_end|>\n{{ end }}\n",
            "{{- $previous = .Role }}\n" if tools else "",
            '{{- end }}\n{{- if eq $previous "tool" }}<|im_end|>\n{{ end }}' if tools else "{{- end }}",
            unthinking,
            _text(given.prompt),
            "{{ end }}" if unthinking else "",
        ]
    )


def _text(text: str) -> str:
    """Text as it stands in a template: itself, or a literal where template or Modelfile would read it otherwise."""
    plain = all(c.isprintable() or c == "\n" for c in text) and "{{" not in text and '"""' not in text
    return text if plain else f"{{{{ {quoted(text)} }}}}"
