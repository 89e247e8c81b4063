"""What is asked of every artifact of a model, and what the model's own files answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.embedded import embedded_beginning
from exporter.model import MergedModel
from exporter.stopping import StopTokens, stop_tokens
from exporter.tokenizer import TokenizerFiles, load_encoder
from exporter.verify.answers.texts import ANSWER, CONVERSATIONS, QUESTION, SHORT, TEXTS

# Tokens of a greedy continuation.
MAX_NEW = 32
# Tokens of the long prompt: what GPTQ is known to fail on is a prompt that is not short.
LONG = 2000
# Enough for so many tokens of any Qwen's tokenizer.
_LONG_CHARACTERS = 16_000


@dataclass(frozen=True)
class Prompt:
    """A beginning that artifacts go on with.

    Attributes:
        name: `short`, `chat`, `long`, or `answered`: a conversation up to the last word of an answer.
        ids: its tokens.
    """

    name: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """What every artifact of a model is asked.

    Attributes:
        texts: by name, what is tokenized.
        conversations: by name, what is rendered, as far as the source renders it.
        rendered: the source's rendering of each; empty for a model without a chat template.
        prompts: what is gone on with.
        stops: which tokens end an answer, by source.
    """

    texts: Mapping[str, str]
    conversations: Mapping[str, Mapping[str, Any]]
    rendered: Mapping[str, str]
    prompts: tuple[Prompt, ...]
    stops: StopTokens

    @property
    def n_ctx(self) -> int:
        """Tokens of the longest prompt and its continuation."""
        return max((len(prompt.ids) for prompt in self.prompts), default=1) + MAX_NEW


def make_question(model: MergedModel, tokenizers: Tokenizers, prompts: Sequence[Prompt] | None = None) -> Question:
    """Prepare what is asked, from the merged model's own files.

    Args:
        model: the merged model; its weights are not read.
        tokenizers: its tokenizer.
        prompts: what is gone on with, if not what this would make.

    Raises:
        TokenizerError: an eos id is not one of the vocabulary's.
    """
    tokenizer = model.tokenizer
    rendered = {
        name: text
        for name, conversation in CONVERSATIONS.items()
        if (text := render(tokenizer, conversation)) is not None
    }
    special = {f"special {token}": f"a {token} b{token}\n{token}{token}" for token in tokenizer.added_tokens}
    return Question(
        texts={**TEXTS, **special},
        conversations={name: CONVERSATIONS[name] for name in rendered},
        rendered=rendered,
        prompts=tuple(_prompts(model, tokenizers) if prompts is None else prompts),
        stops=stop_tokens(model),
    )


def prompts_of(model: MergedModel) -> tuple[Prompt, ...]:
    """What artifacts of a model go on with.

    Raises:
        TokenizerError: its tokenizer cannot be loaded.
    """
    return tuple(_prompts(model, Tokenizers(model.tokenizer)))


def _prompts(model: MergedModel, tokenizers: Tokenizers) -> Iterator[Prompt]:
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
    """A conversation by the source's chat template, as transformers renders it.

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
    """The source's tokenizer, and others that it might be taken for, which tell the cause of a difference.

    Args:
        files: the tokenizer's files.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._file = files.files["tokenizer.json"]
        self._loaded: dict[tuple[bool, frozenset[int]], Any] = {}

    def ids(
        self, text: str, *, special: bool, normalized: bool = True, more: frozenset[int] = frozenset()
    ) -> list[int]:
        """Token ids, none added.

        Args:
            text: any text.
            special: whether a special token's text stands for the token.
            normalized: whether the tokenizer's normalizer (NFC in a Qwen) is applied.
            more: ids of ordinary tokens that are taken for special ones.
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
