"""A model that a vLLM server serves, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from exporter.errors import RuntimeScoreError
from exporter.runtimes.base import Continuation
from exporter.runtimes.vllm.api import Api, NoAnswerError, RequestError
from exporter.runtimes.vllm.server import not_served


class VllmSession:
    """See `Session`: /tokenize, /detokenize and /v1/completions of the server.

    Args:
        artifact: the model folder.
        api: the server.
        model: the name that it serves the model by.
        at_endpoint: whether it runs whatever becomes of the artifact, so that no answer is the server's fault.
    """

    stop_evidence: Literal["generation", "vocabulary"] = "generation"

    def __init__(self, artifact: Path, api: Api, model: str, *, at_endpoint: bool = False) -> None:
        self._artifact, self._api, self._model, self._at_endpoint = artifact, api, model, at_endpoint

    def tokenize(self, text: str, *, special: bool) -> list[int] | None:
        """See `Session`. The server takes a special token's text for the token in any case."""
        if not special:
            return None
        return self._tokens({"prompt": text, "add_special_tokens": False})

    def render(self, conversation: Mapping[str, Any]) -> str:
        """See `Session`. The server gives a conversation's tokens, and their text on another request."""
        known = ("messages", "tools")
        body = {key: conversation[key] for key in known if key in conversation}
        body["messages"] = [_as_sent(message) for message in conversation["messages"]]
        if options := {key: value for key, value in conversation.items() if key not in known}:
            body["chat_template_kwargs"] = options
        tokens = self._tokens(body | {"add_generation_prompt": True})
        return str(self._post("/detokenize", {"tokens": tokens}, "prompt"))

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        """See `Session`."""
        return [self._complete(prompt, tokens) for prompt in prompts]

    def stops_on(self, token: int) -> bool:
        """See `Session`."""
        return self._complete([token], 2, allowed_token_ids=[token]).stopped

    def stop_ids(self) -> frozenset[int] | None:
        """See `Session`. The server does not tell."""
        return None

    def _complete(self, prompt: Sequence[int], tokens: int, **options: Any) -> Continuation:
        # What the folder's generation_config.json says of sampling is the server's default.
        plain = {"temperature": 0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
        body = {"prompt": list(prompt), "max_tokens": tokens, "return_token_ids": True, **plain, **options}
        choices = self._post("/v1/completions", body, "choices")
        try:
            return Continuation(tuple(map(int, choices[0]["token_ids"])), choices[0]["finish_reason"] == "stop")
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._failed("/v1/completions: no token ids of the continuation") from None

    def _tokens(self, body: Mapping[str, Any]) -> list[int]:
        try:
            return [int(token) for token in self._post("/tokenize", body, "tokens")]
        except (TypeError, ValueError):
            raise self._failed("/tokenize: no list of token ids") from None

    def _post(self, path: str, body: Mapping[str, Any], key: str) -> Any:
        try:
            return self._api.post(path, {"model": self._model, **body})[key]
        except RequestError as error:
            gone = self._at_endpoint and isinstance(error, NoAnswerError)
            raise not_served(self._artifact.name, str(error), (), unavailable=gone) from None
        except (KeyError, TypeError):
            raise self._failed(f"{path}: an answer without {key}") from None

    def _failed(self, found: str) -> RuntimeScoreError:
        return not_served(self._artifact.name, found, ())


def _as_sent(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as clients send it: arguments of a tool's call are JSON, which the server reads for the template."""
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
