"""The Modelfile: a template that renders like the model's own or none, stop texts, sampling defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.backends.gguf.ollama.go_template import render
from exporter.backends.gguf.ollama.modelfile import modelfile
from exporter.backends.gguf.ollama.template import OllamaTemplate, ollama_template, ollama_values
from exporter.inputs.chat_template import chat_renderer
from exporter.inputs.tokenizer import TokenizerFiles
from exporter.merge.model import MergedModel
from exporter.pipeline.plan import make_plan
from exporter.recipe import Execution
from tests.exports import recipe
from tests.folders import copy, edit_json
from tests.merged import merged_model

Make = Callable[..., Path]

TURN = "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n'"
PLAIN = (
    "{%- for message in messages %}{{ " + TURN + " }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# In the manner of Qwen2.5: a default system prompt, tools in it, calls and results in tags.
TOOLS = r"""
{%- set first = messages[0].role == 'system' %}
{%- set system = messages[0].content if first else SYSTEM %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}{% if system %}{{ system + '\n\n' }}{% endif %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif system %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(asked=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}THOUGHT{{ message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{ '\n' }}{% endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- elif not (loop.first and first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}PROMPT{% endif %}
"""
THOUGHT = (
    "{% set thought = message.reasoning_content or '' %}{% if loop.index0 > ns.asked and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
)
UNTHINKING = "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"


def template(thought: str = "", prompt: str = "", system: str = "''") -> str:
    return TOOLS.strip().replace("THOUGHT", thought).replace("PROMPT", prompt).replace("SYSTEM", system)


def tokenizer(folder: Path, source: str) -> TokenizerFiles:
    file = folder / "chat_template.jinja"
    file.write_text(source, encoding="utf-8")
    return TokenizerFiles({file.name: file}, "base")


def ollama(folder: Path, source: str) -> OllamaTemplate | None:
    return ollama_template(tokenizer(folder, source))


@pytest.mark.parametrize(
    ("source", "tools", "thinking"),
    [
        (PLAIN, False, False),
        (template(), True, False),
        (template(system="'You are Qwen. Say \"hi\", {{ braces }},\\n\u200b \\\\ and \\'\\'\\'.'"), True, False),
        (template(THOUGHT, UNTHINKING), True, True),
        (template(THOUGHT, "{{ '<think>\\n' }}"), True, True),
    ],
)
def test_templates_of_the_kinds_of_qwen(tmp_path: Path, source: str, tools: bool, thinking: bool) -> None:
    found = ollama(tmp_path, source)
    assert found is not None
    assert (found.tools, found.thinking, found.missing) == (tools, thinking, ())
    # Ollama tells by these what a model can do.
    assert (".Tools" in found.text, ".Thinking" in found.text) == (tools, thinking)


def test_a_conversation_that_was_not_compared(tmp_path: Path) -> None:
    source = template(THOUGHT, UNTHINKING, "'Be brief.'")
    found = ollama(tmp_path, source)
    assert found is not None
    call = {"function": {"name": "f", "arguments": {"x": [1, "<&>", None], "y": {"z": "\u5317"}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "array"}}}}}
    conversation: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "One."},
            {"role": "user", "content": "<|im_start|> and {{ .Content }}"},
            {"role": "assistant", "content": "Now.", "tool_calls": [call] * 3, "reasoning_content": "a\n\nb"},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": ""},
            {"role": "tool", "content": "3\n"},
            {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "c"},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "So."},
        ],
        "tools": [tool] * 2,
    }
    for end in range(1, len(conversation["messages"]) + 1):
        for think in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            cut = conversation | {"messages": conversation["messages"][:end]} | think
            expected = chat_renderer(tokenizer(tmp_path, source))(add_generation_prompt=True, **cut)
            assert render(found.text, ollama_values(**cut)) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}[INST]{{ message.content }}[/INST]{% endfor %}",
        PLAIN.replace("message.content", "message.content | trim"),
        PLAIN.replace("<|im_end|>\\n", "<|im_end|>"),
        "{{ raise_exception('no') }}",
        "{% for message in %}",
    ],
)
def test_a_template_that_is_not_known_is_left_out(tmp_path: Path, source: str) -> None:
    assert ollama(tmp_path, source) is None


def test_what_a_template_takes_in_another_form_is_said(tmp_path: Path) -> None:
    found = ollama(tmp_path, template().replace("# Tools", "# Functions"))
    assert found is not None
    assert (found.tools, found.missing) == (False, ("tools",))
    found = ollama(tmp_path, template(THOUGHT.replace("think>", "thought>")))
    assert found is None  # what it makes of an answer without a thought would be wrong already
    thought = "{% if message.reasoning_content %}{{ '[' + message.reasoning_content + ']' }}{% endif %}"
    found = ollama(tmp_path, template(thought))
    assert found is not None
    assert (found.tools, found.thinking, found.missing) == (True, False, ("thinking",))


# --- the document --------------------------------------------------------------------------------------------------


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands as Ollama's reader (parser/parser.go) takes them, by its rules alone."""
    commands, at = [], 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] == "#":
            at = text.index("\n", at)
        else:
            name, at = text[at:].split(None, 1)[0], text.index(" ", at) + 1
            if name == "PARAMETER":
                name, at = text[at:].split(None, 1)[0], text.index(" ", at) + 1
            value = ""
            while at < len(text):
                if text[at] in "\r\n" and _whole(value.strip()):
                    break
                value += text[at] if text[at].isprintable() or text[at] in "\t\r\n" else ""
                # A blank ends nothing, but a closing quote before it counts only at the end of the line.
                at += 1
            value = value.strip()
            mark = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
            commands.append((name, value[len(mark) : len(value) - len(mark)]))
    return commands


def _whole(value: str) -> bool:
    if value.startswith('"""'):
        return len(value) >= 6 and value.endswith('"""')
    return not value.startswith('"') or (len(value) >= 2 and value.endswith('"'))


def commands_of(model: MergedModel) -> list[tuple[str, str]]:
    return read_modelfile(modelfile(model).content("model-Q8_0.gguf").decode())


def model_with(base: Path, folder: Path, source: str | None = None, **generation: Any) -> MergedModel:
    copied = copy(base, folder)
    if source is not None:
        (copied / "chat_template.jinja").write_text(source, encoding="utf-8")
    if generation:
        edit_json(copied / "generation_config.json", **generation)
    return merged_model(copied)


def test_what_it_says(make_base: Make, tmp_path: Path) -> None:
    model = model_with(
        make_base(), tmp_path / "base", template(THOUGHT, UNTHINKING), do_sample=True, temperature=0.6, top_k=20.0,
        top_p=0.95, min_p=0, repetition_penalty=1.05, max_new_tokens=7, eos_token_id=[0, 2],
    )  # fmt: skip
    found = ollama_template(model.tokenizer)
    assert found is not None
    commands = commands_of(model)
    assert commands[:2] == [("FROM", "./model-Q8_0.gguf"), ("TEMPLATE", found.text)]
    stops = [value for name, value in commands if name == "stop"]
    assert set(stops) == {
        text for text, token in model.tokenizer.added_tokens.items() if token in (0, 2) or text == "<|im_end|>"
    }
    assert dict(commands[2:]) | {"stop": ""} == {
        "stop": "", "temperature": "0.6", "top_p": "0.95", "top_k": "20", "min_p": "0.0", "repeat_penalty": "1.05",
    }  # fmt: skip
    assert modelfile(model).notes == ()


def test_greedy_where_the_model_says_so(make_base: Make, tmp_path: Path) -> None:
    model = model_with(make_base(), tmp_path / "base", do_sample=False, temperature=0.6)
    assert [command for command in commands_of(model) if command[0] != "stop"][2:] == [("temperature", "0")]


def test_no_template_is_said_in_the_file_and_in_the_plan(make_base: Make, tmp_path: Path) -> None:
    base = copy(make_base(), tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    plan = make_plan(recipe(base, (), tmp_path / "out", format="gguf", quant="Q8_0"), Execution(device="cpu"))
    (artifact,) = plan.artifacts
    text = artifact.documents["Modelfile"].decode()
    assert [name for name, _ in read_modelfile(text)] == ["FROM", "stop"]
    assert "# No TEMPLATE" in text
    assert any("has no TEMPLATE" in note for note in artifact.notes)
    (base / "chat_template.jinja").unlink()
    edit_json(base / "tokenizer_config.json", chat_template=None)
    plan = make_plan(recipe(base, (), tmp_path / "out", format="gguf", quant="Q8_0"), Execution(device="cpu"))
    assert "has no chat template" in plan.artifacts[0].documents["Modelfile"].decode()
    assert not any("TEMPLATE" in note for note in plan.artifacts[0].notes)


def test_each_of_several_files_has_one(make_base: Make, tmp_path: Path) -> None:
    plan = make_plan(recipe(make_base(), (), tmp_path / "out", format="gguf", quant=("F16", "Q8_0")), Execution())
    documents = [dict(artifact.documents) for artifact in plan.artifacts]
    assert [list(each) for each in documents] == [["Modelfile.F16"], ["Modelfile.Q8_0"]]
    for artifact, each in zip(plan.artifacts, documents, strict=True):
        (content,) = each.values()
        assert read_modelfile(content.decode())[0] == ("FROM", f"./{artifact.entry}")
