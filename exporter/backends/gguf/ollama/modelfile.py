"""Ollama's Modelfile for a GGUF file (docs.ollama.com/modelfile): template, stop texts and sampling defaults.

Its format has no escapes: a value in three quotes ends where three quotes are followed by a space or a line's end.
"""

from __future__ import annotations

from dataclasses import dataclass

from exporter.backends.gguf.ollama.template import OllamaTemplate, ollama_template
from exporter.inputs.checkpoint import read_json
from exporter.merge.model import MergedModel
from exporter.tokens.end_tokens import GENERATION_CONFIG, stop_tokens

MODELFILE = "Modelfile"
# Sampling defaults: key in generation_config.json → parameter and kind.
_SAMPLING: tuple[tuple[str, str, type[int] | type[float]], ...] = (
    ("temperature", "temperature", float),
    ("top_p", "top_p", float),
    ("top_k", "top_k", int),
    ("min_p", "min_p", float),
    ("repetition_penalty", "repeat_penalty", float),
)


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile but for the file that it is of.

    Attributes:
        body: everything after the line that names the file.
        notes: for the plan: what it could not say.
    """

    body: str
    notes: tuple[str, ...]

    def content(self, file: str) -> bytes:
        """The document for a GGUF file in the same folder."""
        return f"FROM ./{file}\n{self.body}".encode()


def modelfile(model: MergedModel) -> Modelfile:
    """What Ollama is told of a model.

    Raises:
        TokenizerError: an eos id is not one of the vocabulary's.
    """
    template = ollama_template(model.tokenizer)
    lines, notes = _template(template, written=model.tokenizer.chat_template is not None)
    return Modelfile("".join(f"{line}\n" for line in (*lines, *_stops(model), *_sampling(model))), notes)


def _template(template: OllamaTemplate | None, *, written: bool) -> tuple[list[str], tuple[str, ...]]:
    """The template, and what is to be said of it.

    Args:
        template: the template.
        written: whether the model has a chat template.
    """
    if template is None and not written:
        return ["# No TEMPLATE: the model has no chat template."], ()
    if template is None:
        note = "the Modelfile has no TEMPLATE: no template in Ollama's language renders like the model's own"
        return [
            "# No TEMPLATE: none that is known in Ollama's language renders like the model's own, which is in the GGUF",
            "# file. Ollama takes that one where it can, else one that looks like it, else none.",
        ], (note,)
    but = ", but for the spelling of JSON in tools and their arguments" if template.tools else ""
    lines = [f"# It renders like the model's own template{but}."]
    notes: tuple[str, ...] = ()
    if template.missing:
        missing = " and ".join(template.missing)
        lines.append(f"# Without {missing}, which the model's own template takes in another form.")
        notes = (f"the Modelfile's TEMPLATE is without {missing}, which the chat template takes in another form",)
    return [*lines, f'TEMPLATE """{template.text}"""'], notes


def _stops(model: MergedModel) -> list[str]:
    texts = {token: content for content, token in model.tokenizer.added_tokens.items()}
    named = [texts[token] for token in stop_tokens(model).all if token in texts]
    return [f"PARAMETER stop {quoted}" for text in named if (quoted := _quoted(text)) is not None]


def _quoted(text: str) -> str | None:
    """A value; None if the format cannot say it."""
    if not text.isprintable() or '"""' in text:
        return None
    return f'"{text}"' if '"' not in text else f'"""{text}"""'


def _sampling(model: MergedModel) -> list[str]:
    """Parameters from generation_config.json; greedy where it says not to sample."""
    file = model.base.folder / GENERATION_CONFIG
    config = read_json(file) if file.is_file() else {}
    if config.get("do_sample") is False:
        return ["PARAMETER temperature 0"]
    found = []
    for key, parameter, kind in _SAMPLING:
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"PARAMETER {parameter} {kind(value)!r}")
    return found
