"""Prompts for the artifacts and the trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.inputs.tokenizer import TokenizerFiles, load_encoder
from exporter.merge.model import MergedModel
from exporter.tokens.embedded import embedded_beginning
from exporter.tokens.prompt_texts import ANSWER, QUESTION, SHORT

# Tokens of a greedy continuation.
MAX_NEW = 32
# Tokens of the long prompt. GPTQ models are known to fail on prompts that are not short.
LONG = 2000
# Characters that are enough for so many tokens of any Qwen's tokenizer.
_LONG_CHARACTERS = 16_000


@dataclass(frozen=True)
class Prompt:
    """A beginning that artifacts continue.

    Attributes:
        name: `short`, `chat`, `long`, or `answered`: a conversation up to the last word of an answer.
        ids: its tokens.
    """

    name: str
    ids: tuple[int, ...]


def prompts_of(model: MergedModel) -> tuple[Prompt, ...]:
    """The prompts for the artifacts of a model.

    Raises:
        TokenizerError: its tokenizer cannot be loaded.
    """
    return tuple(prompts_from(model, Tokenizers(model.tokenizer)))


def prompts_from(model: MergedModel, tokenizers: Tokenizers) -> Iterator[Prompt]:
    """The prompts, one by one, each tokenized by the model's own tokenizer."""
    tokenizer = model.tokenizer
    positions = model.config.get("max_position_embeddings")
    room = LONG if not isinstance(positions, int) else max(1, min(LONG, positions - MAX_NEW))
    texts = {"short": SHORT}
    user = {"role": "user", "content": QUESTION}
    if (text := render(tokenizer, {"messages": [user]})) is not None:
        texts["chat"] = text
    answered = {"messages": [user, {"role": "assistant", "content": ANSWER}]}
    text = render(tokenizer, answered, add_generation_prompt=False)
    if text is not None and ANSWER in text:
        texts["answered"] = text[: text.rindex(ANSWER) + len(ANSWER)]
    texts["long"] = embedded_beginning()[:_LONG_CHARACTERS]
    for name, text in texts.items():
        yield Prompt(name, tuple(tokenizers.ids(text, special=True)[:room]))


def render(
    tokenizer: TokenizerFiles, conversation: Mapping[str, Any], *, add_generation_prompt: bool = True
) -> str | None:
    """Render a conversation with the source's chat template, as transformers does.

    Returns:
        None if there is no template, or it refuses the conversation.
    """
    template = tokenizer.chat_template
    if template is None:
        return None
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {key: value for key, value in conversation.items() if key != "messages"}
    try:
        rendered, _ = render_jinja_template(
            conversations=[conversation["messages"]],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens,
            **options,
        )
    except (TemplateError, TypeError, KeyError, ValueError):
        return None
    return str(rendered[0])


class Tokenizers:
    """The source's tokenizer, and variants of it that tell the cause of a difference.

    Args:
        files: the tokenizer's files.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._file = files.files["tokenizer.json"]
        self._loaded: dict[tuple[bool, frozenset[int]], Any] = {}

    def ids(
        self, text: str, *, special: bool, normalized: bool = True, more: frozenset[int] = frozenset()
    ) -> list[int]:
        """Token ids of a text, with no token added.

        Args:
            text: any text.
            special: whether a special token's text stands for the token.
            normalized: whether the tokenizer's normalizer (NFC in a Qwen) is applied.
            more: ids of ordinary tokens to parse as special ones.
        """
        loaded = self._loaded.get((normalized, more))
        if loaded is None:
            loaded = self._loaded[normalized, more] = self._load(normalized, more)
        loaded.encode_special_tokens = not special
        ids: list[int] = loaded.encode(text, add_special_tokens=False).ids
        return ids

    def _load(self, normalized: bool, more: frozenset[int]) -> Any:
        from tokenizers import AddedToken, normalizers

        loaded = load_encoder(self._file)
        if not normalized:
            loaded.normalizer = normalizers.Sequence([])
        contents = [content for token in sorted(more) if (content := loaded.id_to_token(token))]
        loaded.add_special_tokens([AddedToken(content, normalized=False) for content in contents])
        return loaded
