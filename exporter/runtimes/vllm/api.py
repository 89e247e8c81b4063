"""Requests to a vLLM server, and the scores in its answers."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from exporter.runtimes.base import OnWindow, TopK, TopKScores
from exporter.tokens.windows import Windows

# While one window is computed, the answer for another is written out, sent and read.
IN_FLIGHT = 2
REQUEST_SECONDS = 3600.0
# What vLLM writes for minus infinity, which JSON lacks (clamp_prompt_logprobs).
CLAMPED = -9999.0

_Rows = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.float64]]


class RequestError(Exception):
    """A request failed, or its answer is not what the API promises; the text says how."""


class NoAnswerError(RequestError):
    """Nobody answered: the server cannot be reached, or is gone."""


class Api:
    """JSON requests to one server, without proxies.

    Args:
        root: its address, without a path.
        key: what it wants to be shown, if anything.
    """

    def __init__(self, root: str, key: str | None = None) -> None:
        address = urlsplit(root)
        self._connect = HTTPSConnection if address.scheme == "https" else HTTPConnection
        self._host, self._path = address.netloc, address.path
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._open: set[HTTPConnection] = set()

    def abandon(self) -> None:
        """Drop what is under way: a server that is asked to end waits for its connections to be closed."""
        for connection in tuple(self._open):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def healthy(self) -> bool:
        """Whether the server is up."""
        try:
            self._send("/health", None, seconds=5)
        except RequestError:
            return False
        return True

    def get(self, path: str) -> Any:
        """The JSON that a path answers with.

        Raises:
            RequestError: there is none.
        """
        return _parse(path, self._send(path, None, seconds=60))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a path answers a request with.

        Raises:
            RequestError: the server refuses, or does not answer.
        """
        return _parse(path, self._send(path, body, seconds=REQUEST_SECONDS))

    def complete(self, model: str, prompt: Sequence[int], k: int) -> Any:
        """Choice of /v1/completions for a prompt of token ids, with the k likeliest tokens at each of its positions.

        Raises:
            RequestError: the server refuses, or does not answer.
        """
        body = {"model": model, "prompt": list(prompt), "prompt_logprobs": k, "max_tokens": 1, "temperature": 0}
        answer = _parse("/v1/completions", self._send("/v1/completions", body, seconds=REQUEST_SECONDS))
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise RequestError(f"/v1/completions: no choices in {str(answer)[:200]}") from None

    def _send(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> bytes:
        data = json.dumps(body).encode() if body is not None else None
        try:
            connection = self._connect(self._host, timeout=seconds)
            self._open.add(connection)
            try:
                connection.request("GET" if body is None else "POST", self._path + path, data, self._headers)
                answer = connection.getresponse()
                content, status = answer.read(), answer.status
            finally:
                self._open.discard(connection)
                connection.close()
        except (OSError, HTTPException, ValueError) as error:
            raise NoAnswerError(f"{path}: {type(error).__name__}: {error}") from None
        if status != HTTPStatus.OK:
            raise RequestError(f"{path}: status {status}, {_message(content)}")
        return content


def _parse(path: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise RequestError(f"{path}: not JSON: {content[:100]!r}") from None


def _message(content: bytes) -> str:
    """The text of an error answer."""
    try:
        return str(json.loads(content)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace")


def served_model(api: Api, vocabulary: int, n_ctx: int) -> str:
    """Name of the model that a running server serves, after checks that it can be the artifact.

    Raises:
        RequestError: it serves none or several, a shorter context, or another vocabulary.
    """
    try:
        # Adapters that are served beside a model name it as their parent.
        models = [model for model in api.get("/v1/models")["data"] if not model.get("parent")]
        names = [str(model["id"]) for model in models]
        length = models[0].get("max_model_len") if models else None
    except (KeyError, TypeError, AttributeError):
        raise RequestError("/v1/models: not a list of models") from None
    if len(names) != 1:
        raise RequestError(f"/v1/models: {len(names)} models ({', '.join(names)}) where one is expected")
    if length is not None and length < n_ctx + 1:
        raise RequestError(f"a server for {length} tokens, where a window and the next token are {n_ctx + 1}")
    # The API does not tell the size of the vocabulary, but refuses ids beyond it.
    api.complete(names[0], [vocabulary - 1] * 2, 1)
    try:
        api.complete(names[0], [vocabulary] * 2, 1)
    except RequestError as error:
        if "status 4" in str(error):
            return names[0]
        raise
    raise RequestError(f"a server of more than the {vocabulary} tokens of the artifact: another model")


def score_windows(api: Api, model: str, windows: Windows, k: int, on_window: OnWindow) -> TopKScores:
    """Score all windows, `IN_FLIGHT` at a time.

    Raises:
        RequestError: a request failed; the others are left to end by themselves.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, _Rows | Exception]] = queue.SimpleQueue()
    stopped = threading.Event()
    for index in range(len(windows.ids)):
        todo.put(index)

    def work() -> None:
        while not stopped.is_set():
            try:
                index = todo.get_nowait()
            except queue.Empty:
                return
            try:
                choice = api.complete(model, windows.ids[index], k)
                done.put((index, _rows(choice, windows.ids[index], windows.first_scored, k)))
            except Exception as error:  # raised again below, in the thread that waits
                done.put((index, error))

    # Daemons rather than a pool, which would hold an interrupted program until its last request is answered.
    for _ in range(IN_FLIGHT):
        threading.Thread(target=work, daemon=True).start()
    found: dict[int, _Rows] = {}
    try:
        while len(found) < len(windows.ids):
            index, rows = done.get()
            if isinstance(rows, Exception):
                raise rows
            found[index] = rows
            on_window(1)
    finally:
        stopped.set()
        api.abandon()
    right, ids, log_probabilities = (np.stack(parts) for parts in zip(*(found[i] for i in sorted(found)), strict=True))
    return TopKScores(right, ids[:, :, 0].copy(), TopK(ids, log_probabilities))


def _rows(choice: Any, window: Sequence[int], first_scored: int, k: int) -> _Rows:
    """Scores of one window out of the answer for it.

    vLLM gives, for every token of the prompt but the first, {id: {"logprob", "rank", "decoded_token"}} with the k
    likeliest tokens and the token itself (vllm/entrypoints/openai/completion/protocol.py).

    Args:
        choice: the answer's choice.
        window: n_ctx token ids.
        first_scored: see `Windows`.
        k: likeliest tokens that were asked for.

    Returns:
        Log-probabilities of the right tokens, shape (scored,); ids and log-probabilities of the likeliest, (scored, k).

    Raises:
        RequestError: something of this is missing.
    """
    given = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    if not isinstance(given, list):
        raise RequestError("/v1/completions: an answer without prompt_logprobs")
    if len(given) != len(window):
        raise RequestError(f"/v1/completions: prompt_logprobs of {len(given)} tokens for a window of {len(window)}")
    right, ids, log_probabilities = [], [], []
    for position in range(first_scored + 1, len(window)):
        try:
            scores = {int(token): float(entry["logprob"]) for token, entry in given[position].items()}
            right.append(scores[window[position]])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise RequestError(
                f"/v1/completions: no log-probability of token {window[position]} at position {position}"
            ) from None
        if len(scores) < k:
            raise RequestError(f"/v1/completions: {len(scores)} tokens at position {position} where {k} were asked for")
        # By value rather than by the ranks given, which break ties at will: the lowest id wins, as argmax has it.
        best = sorted(scores, key=lambda token: (-scores[token], token))[:k]
        ids.append(best)
        log_probabilities.append([scores[token] for token in best])
    return _unclamped(right), np.array(ids, np.int64), _unclamped(log_probabilities)


def _unclamped(values: Sequence[Any]) -> npt.NDArray[np.float64]:
    array = np.array(values, np.float64)
    return np.where(array <= CLAMPED, -np.inf, array)
