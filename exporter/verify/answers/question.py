"""What is asked of every artifact of a model, and what the model's own files answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.merge.model import MergedModel
from exporter.tokens.end_tokens import StopTokens, stop_tokens
from exporter.tokens.prompt_texts import CONVERSATIONS, TEXTS
from exporter.tokens.prompts import MAX_NEW, Prompt, Tokenizers, prompts_from, render


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
        prompts=tuple(prompts_from(model, tokenizers) if prompts is None else prompts),
        stops=stop_tokens(model),
    )
