"""Which tokens end an answer. Four sources name them; the plan shows where they disagree.

A model goes on for ever if its server does not stop on the token that ends its turn. transformers and vLLM stop
on `eos_token_id` of generation_config.json (of config.json where there is no such file), llama.cpp on the tokenizer's
eos and on tokens that it knows by their text. The model was trained to say what its chat template puts after an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import TokenizerError
from exporter.inputs.chat_template import chat_renderer
from exporter.inputs.checkpoint import read_json
from exporter.inputs.tokenizer import TokenizerFiles, token_content
from exporter.merge.model import MergedModel

GENERATION_CONFIG = "generation_config.json"
# Takes the place of an answer to find what the template puts after one.
_ANSWER = "An answer, complete."


@dataclass(frozen=True)
class StopTokens:
    """Ids of the tokens that end an answer, by source. A source that names none is empty.

    Attributes:
        config: `eos_token_id` of config.json.
        generation_config: `eos_token_id` of generation_config.json; None if there is no such file.
        tokenizer: the tokenizer's eos token.
        template: the token that the chat template puts after an answer.
    """

    config: tuple[int, ...]
    generation_config: tuple[int, ...] | None
    tokenizer: tuple[int, ...]
    template: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """All ids, each once. Those that the base's folder stops on come first."""
        named = (*(self.generation_config or ()), *self.config, *self.tokenizer, *self.template)
        return tuple(dict.fromkeys(named))

    @property
    def agree(self) -> bool:
        """Whether the base's folder stops on every token that any source names."""
        stops = self.config if self.generation_config is None else self.generation_config
        return set(self.all) <= set(stops)

    @property
    def end_of_turn(self) -> int | None:
        """The token with which the model was trained to end its turn, as far as the files say."""
        return next(iter((*self.template, *self.tokenizer, *self.all)), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the plan, if the sources disagree: what each says, and what the export does about it."""
        if self.agree:
            return ()
        named = {
            "config.json": self.config, GENERATION_CONFIG: self.generation_config or (), "tokenizer": self.tokenizer,
            "chat template": self.template,
        }  # fmt: skip
        said = ", ".join(f"{source} {' '.join(map(str, ids)) or 'none'}" for source, ids in named.items())
        return (
            f"the sources of end tokens disagree ({said}): generation_config.json of a model folder will "
            "name them all, a GGUF file the tokenizer's and the chat template's",
        )

    def as_json(self) -> dict[str, list[int]]:
        """For the manifest."""
        return {
            "config": list(self.config),
            "generation_config": list(self.generation_config or ()),
            "tokenizer": list(self.tokenizer),
            "template": list(self.template),
        }


def stop_tokens(model: MergedModel) -> StopTokens:
    """Read the four sources.

    Raises:
        TokenizerError: an eos id is not one of the vocabulary's.
    """
    tokenizer = model.tokenizer
    file = model.base.folder / GENERATION_CONFIG
    size = model.config.get("vocab_size")
    named = _ids(model.config, "config.json", size)
    generation = _ids(read_json(file), GENERATION_CONFIG, size) if file.is_file() else None
    eos = token_content(tokenizer.config.get("eos_token"))
    own = tokenizer.added_tokens.get(eos) if eos is not None else None
    ending = _end_of_turn(tokenizer)
    return StopTokens(named, generation, () if own is None else (own,), () if ending is None else (ending,))


def generation_document(model: MergedModel) -> dict[str, Any] | None:
    """generation_config.json with every stop token; None if the base's own file, or no file, is enough."""
    stops = stop_tokens(model)
    if stops.agree:
        return None
    file = model.base.folder / GENERATION_CONFIG
    settings = read_json(file) if file.is_file() else {}
    return {**settings, "eos_token_id": list(stops.all)}


def _ids(config: Mapping[str, Any], file: str, size: Any) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids: Sequence[Any] = () if value is None else value if isinstance(value, list) else (value,)
    for token in ids:
        if type(token) is not int or token < 0 or (isinstance(size, int) and token >= size):
            raise TokenizerError(
                f"{file}: eos_token_id",
                found=repr(value),
                expected=f"ids below {size}, the vocabulary's size",
                remedy="Correct it: no server would ever stop on this token.",
            )
    return tuple(dict.fromkeys(ids))


def _end_of_turn(tokenizer: TokenizerFiles) -> int | None:
    """The special token that the chat template puts right after an assistant's words; None if there is none."""
    messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}]
    text = chat_renderer(tokenizer)(messages=messages, add_generation_prompt=False)
    if text is None:
        return None
    after = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
    found = [content for content in tokenizer.added_tokens if content and after.startswith(content)]
    return tokenizer.added_tokens[max(found, key=len)] if found else None
