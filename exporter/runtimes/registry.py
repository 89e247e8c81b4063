"""Which runtime scores an artifact."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from exporter.errors import RecipeError, RuntimeScoreError
from exporter.runtimes.base import Runtime

RUNTIMES = ("llamacpp", "transformers", "vllm")


def choose_runtime(
    names: Sequence[str],
    *,
    endpoint: str | None,
    wanted: str | None = None,
    packed_bits: Collection[int] = (),
    packed_experts: Collection[int] = (),
) -> str:
    """The runtime that will score an artifact: the one that is wanted, or the first that can be had here.

    vLLM can be had if an environment has it or a server is running; the others come with this package. Cheap enough
    for a plan: nothing is loaded or asked.

    Args:
        names: runtimes that serve the artifact, the preferred one first.
        endpoint: address of a running vLLM server, or None.
        wanted: the runtime that was asked for, or None.
        packed_bits: every number of bits that the artifact's GPTQ weights have: not every runtime that is here takes
            them. Empty if it has none.
        packed_experts: likewise of the experts among those weights.

    Raises:
        RecipeError: the one that is wanted does not serve the artifact, or none can be had here.
    """
    if not names:
        raise RecipeError(
            "artifact", found="no runtime that can score it", expected="one", remedy="Name one with --runtime."
        )
    if wanted is not None and wanted not in names:
        raise RecipeError(
            f"--runtime {wanted}",
            found="a runtime that this artifact is not for",
            expected=" or ".join(names),
            remedy="Choose one of them, or leave --runtime out.",
        )
    if unknown := [name for name in names if name not in RUNTIMES]:
        raise _unknown(unknown[0])
    refusals = []
    for name in (wanted,) if wanted else names:
        others = [other for other in names if other != name]
        refusal = _lacking(name, endpoint, packed_bits, others, packed_experts)
        if refusal is None:
            return name
        refusals.append(refusal)
    raise refusals[0]


def _lacking(
    name: str,
    endpoint: str | None,
    packed_bits: Collection[int],
    others: Sequence[str],
    packed_experts: Collection[int],
) -> RecipeError | None:
    """Why a runtime cannot be had here, if it cannot; `others` are what else serves the artifact.

    Raises:
        RecipeError: an environment of vLLM was named and is not there, which must not be passed over in silence.
    """
    if name == "vllm" and endpoint is None:
        from exporter.runtimes.vllm.runtime import available, missing_kernel, serve_python

        try:
            serve_python()
        except RuntimeScoreError as error:
            # Known before anything is written, so it is a refusal.
            remedy = error.remedy + " Or score with --runtime transformers." * ("transformers" in others)
            refusal = RecipeError(error.thing, found=error.found, expected=error.expected, remedy=remedy)
            if available():
                raise refusal from None
            return refusal
        if packed_bits and (missing := missing_kernel(packed_bits, experts=packed_experts)):
            return RecipeError(
                "runtime vllm",
                found=missing,
                expected="one for GPTQ weights",
                remedy="Score with a server elsewhere: --endpoint."
                + " Or with --runtime transformers." * ("transformers" in others),
            )
    if name == "transformers" and packed_bits:
        from exporter.libraries import gptqmodel

        if lacking := gptqmodel.missing_packages():
            return RecipeError(
                "runtime transformers",
                found=f"no {' and no '.join(lacking)}",
                expected="what it loads GPTQ weights with",
                remedy=f"{gptqmodel.INSTALL}, or choose another --runtime.",
            )
    return None


def check_endpoint(endpoint: str | None, chosen: Sequence[str]) -> None:
    """An endpoint must be of use: what is at it is vLLM.

    Args:
        endpoint: address of a running vLLM server, or None.
        chosen: the runtimes of all artifacts.

    Raises:
        RecipeError: it is given, and no artifact is scored by vLLM.
    """
    if endpoint is not None and "vllm" not in chosen:
        raise RecipeError(
            f"--endpoint {endpoint}",
            found="no artifact that vLLM scores" + (f", only {', '.join(dict.fromkeys(chosen))}" if chosen else ""),
            expected="one that is scored by the server at it",
            remedy="Leave --endpoint out, or see --runtime.",
        )


def load_runtime(name: str, device: str = "cpu", endpoint: str | None = None) -> Runtime:
    """A runtime by name.

    Args:
        name: one of `RUNTIMES`.
        device: where it computes, if it has a choice.
        endpoint: address of a running server, for vllm; None starts one.

    Raises:
        RecipeError: there is none of that name, or the endpoint is not an address.
    """
    if name == "llamacpp":
        from exporter.runtimes.llamacpp.runtime import LlamaCpp

        return LlamaCpp()
    if name == "transformers":
        from exporter.runtimes.transformers.runtime import Transformers

        return Transformers(device)
    if name == "vllm":
        from exporter.runtimes.vllm.runtime import Vllm

        return Vllm(endpoint)
    raise _unknown(name)


def _unknown(name: str) -> RecipeError:
    known = " or ".join((", ".join(RUNTIMES[:-1]), RUNTIMES[-1]))
    return RecipeError(f"runtime {name!r}", found="unknown", expected=known, remedy="Choose one.")
