"""Figures of an `export.json` as text. A figure that the manifest lacks is no error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def verdict_of(artifact: Mapping[str, Any]) -> str:
    """`passed`, `failed`, `undecided` or `skipped`."""
    return str(artifact["verification"].get("verdict", "undecided"))


def reasons_of(artifact: Mapping[str, Any]) -> list[str]:
    """The reasons why an artifact did not pass, as far as the manifest says them."""
    verification = artifact["verification"]
    checks = [check for check in verification.get("checks") or () if isinstance(check, Mapping)]
    said = [str(check["reason"]) for check in checks if check.get("reason") and check.get("verdict") != "passed"]
    found: list[str] = list(verification.get("broken") or said)
    for part in ("answers", "weights"):
        found += [reason for reason in (artifact.get(part) or {}).get("broken") or () if reason not in found]
    return found


def change_text(verification: Mapping[str, Any]) -> str:
    """The change of perplexity with its 95 % interval; `not scored` if scoring failed, `-` if it was not tried."""
    if verification.get("not_scored"):
        return "not scored"
    if (delta := verification.get("delta")) is None:
        return "-"
    interval = verification.get("delta_interval")
    ends = f" ({interval[0]:+.2%} … {interval[1]:+.2%})" if interval else ""
    return f"{delta:+.2%}{ends}"


def divergence_text(verification: Mapping[str, Any]) -> str:
    """The mean KL divergence in nats with its standard error. The top-k form is marked as a lower bound."""
    if spread := verification.get("kl_divergence"):
        return f"{spread['mean']:.3g}{_error(spread.get('stderr'))}"
    if spread := verification.get("top_k_divergence"):
        return f"top {spread['k']}: ≥ {spread['mean']:.3g}{_error(spread.get('stderr'))}"
    return "-"


def share_text(share: float | None) -> str:
    """A share in percent."""
    return "-" if share is None else f"{share:.1%}"


def survival_text(artifact: Mapping[str, Any]) -> str:
    """The share of the adapter's change that is in the stored weights."""
    survival = (artifact.get("weights") or {}).get("survival")
    return "-" if survival is None else f"{survival:.2%}"


def loaded_bytes(manifest: Mapping[str, Any], artifact: Mapping[str, Any]) -> int:
    """Bytes that a runtime loads: the file, or all files of the folder."""
    entry = manifest["files"].get(artifact["entry"])
    return int(entry["bytes"] if entry else artifact["bytes"])


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.2g}"
