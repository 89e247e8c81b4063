"""The model card: `README.md` of a folder, from its manifest and the base's card.

Its front matter is the Hub's (huggingface.co/docs/hub/model-cards). `base_model_relation` can be `finetune`, `adapter`,
`merge` or `quantized`. A merge is of several models, so base + adapter in float is a `finetune`: its weights are no
longer the base's. A base that is only stored again has no relation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from exporter.backends.registry import find_backend
from exporter.publish.manifest_text import (
    change_text,
    divergence_text,
    loaded_bytes,
    reasons_of,
    share_text,
    survival_text,
    verdict_of,
)
from exporter.publish.serving_commands import serving_commands
from exporter.units import size

if TYPE_CHECKING:
    from exporter.plan.export_plan import ExportPlan


CARD_NAME = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Two names with a slash can be a relative folder too. No publisher of models has one of these names.
_FOLDERS = frozenset(
    ("base", "checkpoint", "checkpoints", "data", "experiments", "exports", "home", "llms", "mnt", "model", "models",
     "opt", "out", "output", "outputs", "results", "runs", "saved", "saves", "tmp", "work", "workspace")
)  # fmt: skip
# Types that round and do not quantize, as the formats spell them.
_FLOAT_TYPES = frozenset(("F64", "F32", "F16", "BF16"))


@dataclass(frozen=True)
class BaseCard:
    """Facts on the base that are not in the manifest.

    Attributes:
        metadata: the front matter of its own card; empty if it has none.
        hub_id: its id on the Hub; None if it is not known.
    """

    metadata: Mapping[str, Any]
    hub_id: str | None

    @classmethod
    def of(cls, plan: ExportPlan) -> BaseCard:
        """The base of a plan.

        Its id is the one that it was fetched by, else the one that an adapter names, else the one that its own card
        names as its base."""
        file = plan.base.folder / CARD_NAME
        metadata = front_matter(file.read_bytes()) if file.is_file() else {}
        named = [adapter.config.get("base_model_name_or_path") for adapter in plan.model.adapters]
        ancestor = metadata.get("base_model")
        named += ancestor if isinstance(ancestor, list) and len(ancestor) == 1 else [ancestor]
        return cls(metadata, plan.base.hub_id or next((name for name in named if _is_hub_id(name)), None))


def front_matter(card: bytes) -> dict[str, Any]:
    """The metadata of a model card; empty if there is none that can be read."""
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", card.decode("utf-8", "replace"), re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        # The card is prose for people. A damaged card is no fault of the model.
        found = None
    return found if isinstance(found, dict) else {}


def model_card(manifest: Mapping[str, Any], base: BaseCard) -> bytes:
    """The card of a folder. The same manifest and base give the same bytes; it holds no time and no path.

    Args:
        manifest: the folder's `export.json`.
        base: facts on the base.
    """
    metadata = yaml.safe_dump(_metadata(manifest, base), sort_keys=False, allow_unicode=True)
    sections = (
        f"# {manifest['name']}",
        _what(manifest, base),
        _files(manifest),
        "\n".join(_reservations(manifest)),
        "## How it was made",
        _made(manifest),
        "## How it was verified",
        _verified(manifest),
        "## Serve it",
        _serve(manifest),
    )
    return (f"---\n{metadata}---\n\n" + "\n\n".join(section for section in sections if section) + "\n").encode()


def _metadata(manifest: Mapping[str, Any], base: BaseCard) -> dict[str, Any]:
    format_, adapters = manifest["recipe"]["format"], manifest["inputs"][1:]
    served = {name for artifact in manifest["artifacts"] for name in artifact["runtimes"]}
    types = {kind for artifact in manifest["artifacts"] for kind in artifact["types"]}
    backend = find_backend(format_)
    quantized = (backend is not None and backend.always_quantized) or not types <= _FLOAT_TYPES
    relation = "quantized" if quantized else "finetune" if adapters else None
    library = "transformers" if "transformers" in served else "llama-cpp-python" if "llamacpp" in served else None
    quants = [artifact["quant"] for artifact in manifest["artifacts"]]
    # A format's own tags, and what people search for: `Q4_K_M`.
    own = [tag for quant in quants for tag in backend.tags(quant)] if backend else []
    tags = list(dict.fromkeys([format_, *(["lora"] if _are_lora(adapters) else []), *own, *quants]))
    values = {
        "base_model": base.hub_id,
        "base_model_relation": relation if base.hub_id else None,
        **_license(manifest, base),
        "language": _words(base.metadata.get("language")),
        "library_name": library,
        "pipeline_tag": _words(base.metadata.get("pipeline_tag")) or "text-generation",
        "tags": tags,
    }
    return {key: value for key, value in values.items() if value}


def _license(manifest: Mapping[str, Any], base: BaseCard) -> dict[str, Any]:
    """The base's license. A link to a file that this folder lacks leads to the base's repository."""
    found = {key: _words(base.metadata.get(key)) for key in ("license", "license_name", "license_link")}
    link = found["license_link"]
    if isinstance(link, str) and "://" not in link and link not in manifest["files"]:
        found["license_link"] = f"https://huggingface.co/{base.hub_id}/blob/main/{link}" if base.hub_id else None
    return found


def _words(value: Any) -> str | list[str] | None:
    """The words of a value of the base's card. YAML reads some words as other values: the language `no` is false."""
    if isinstance(value, list):
        return [word for word in value if isinstance(word, str)] or None
    return value if isinstance(value, str) else None


def _is_hub_id(name: Any) -> bool:
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or "--" in name or ".." in name:
        return False
    return name.partition("/")[0].lower() not in _FOLDERS


def _what(manifest: Mapping[str, Any], base: BaseCard) -> str:
    name, adapters = _code(manifest["inputs"][0]["name"]), manifest["inputs"][1:]
    link = f" ([{base.hub_id}](https://huggingface.co/{base.hub_id}))" if base.hub_id else ""
    kinds = ", ".join(artifact["quant"] for artifact in manifest["artifacts"])
    merged = ""
    if adapters:
        plural = "s" if len(adapters) > 1 else ""
        merged = (
            f" with the {'LoRA ' if _are_lora(adapters) else ''}adapter{plural} "
            f"{' and '.join(_code(each['name']) for each in adapters)} merged into it"
        )
    return f"{name}{link}{merged}, as {manifest['recipe']['format']} {kinds}."


def _are_lora(adapters: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are adapters, all of them LoRA or rsLoRA; `adapters` are inputs of a manifest."""
    return bool(adapters) and all("lora" in each["adapter"]["method"] for each in adapters)


def _files(manifest: Mapping[str, Any]) -> str:
    rows = [("file", "type", "size", "perplexity change (95 % interval)", "KL (nats)", "same top", "verdict")]
    for artifact in manifest["artifacts"]:
        scores = artifact["verification"]
        rows.append(
            (
                "this folder" if artifact["entry"] == "." else _code(artifact["entry"]), artifact["quant"],
                size(loaded_bytes(manifest, artifact)), change_text(scores), divergence_text(scores),
                share_text(scores.get("same_top")), verdict_of(artifact),
            )
        )  # fmt: skip
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---|---|--:|--:|--:|--:|---|", *lines[1:]])


def _reservations(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Warnings at the top of the card: broken limits, then choices and degradations."""
    for artifact in manifest["artifacts"]:
        if verdict_of(artifact) == "skipped":
            yield f"- **{artifact['quant']} was not verified.**"
        elif verdict_of(artifact) != "passed":
            reasons = "; ".join(reasons_of(artifact)) or "see export.json"
            yield f"- **{artifact['quant']}, {verdict_of(artifact)}:** {reasons}."
    for artifact in manifest["artifacts"]:
        yield from (f"- {artifact['quant']}: {note}." for note in artifact["notes"])


def _made(manifest: Mapping[str, Any]) -> str:
    merge, lines = manifest["merge"], []
    if manifest["inputs"][1:]:
        lines.append(
            f"Base and adapter were merged in float32, which changes {merge['tensors_updated']} of {merge['tensors']} "
            "tensors; what is stored is made from that."
        )
        for each in manifest["inputs"][1:]:
            kind = each["adapter"]
            method = kind["method"]
            if "ranks" in kind:
                method += f", rank {', '.join(map(str, kind['ranks']))}"
            lines.append(f"Adapter {_code(each['name'])}: {method} on {kind['targets']} tensors.")
    if (calibration := manifest["calibration"]) is not None:
        lines.append(f"Calibrated on {calibration['tokens']} tokens of {_code(calibration['source'])}.")
    package = "llama-cpp-python" if "llamacpp" in manifest["artifacts"][0]["runtimes"] else "torch"
    lines.append(
        f"exporter {manifest['exporter']}, {package} {manifest['versions'].get(package, 'unknown')}. The recipe:"
    )
    return "\n".join(lines) + f"\n\n```yaml\n{_recipe(manifest)}```"


def _recipe(manifest: Mapping[str, Any]) -> str:
    """The recipe as `exporter export` takes it. Inputs that are not from a hub appear as folders of that name."""
    recipe, inputs = manifest["recipe"], manifest["inputs"]
    sources = [each.get("hub_id") or each["name"] for each in inputs]
    sources = [
        f"{name}@{each['revision']}" if each.get("revision") else name
        for name, each in zip(sources, inputs, strict=True)
    ]
    output = {"format": recipe["format"], "quant": recipe["quant"], "out": manifest["name"]}
    evaluation = {key: value for key, value in recipe["evaluation"].items() if value != {}}
    values = {
        "base": sources[0],
        "adapters": sources[1:],
        "name": manifest["name"],
        "outputs": [output | ({"options": dict(recipe["options"])} if recipe["options"] else {})],
        "calibration": {key: value for key, value in recipe["calibration"].items() if value is not None},
        **({"evaluation": evaluation} if recipe["verify"] else {"verify": False}),
        **({"compute_dtype": recipe["compute_dtype"]} if recipe["compute_dtype"] != "float32" else {}),
    }
    return yaml.safe_dump({key: value for key, value in values.items() if value != []}, sort_keys=False, width=110)


def _verified(manifest: Mapping[str, Any]) -> str:
    evaluation = manifest["evaluation"]
    scored = [artifact for artifact in manifest["artifacts"] if "perplexity" in artifact["verification"]]
    failed = [artifact for artifact in manifest["artifacts"] if artifact["verification"].get("not_scored")]
    if evaluation is None or not (scored or failed):
        return "It was not."
    if not scored:
        return "\n".join(_not_scored(artifact) for artifact in failed)
    one, *others = dict.fromkeys(
        (artifact["verification"]["tokens_scored"], artifact["verification"]["reference_perplexity"])
        for artifact in scored
    )
    text = f"windows of {evaluation['n_ctx']} tokens of {_code(evaluation['source'])}, by llama-perplexity's protocol"
    trained, on = "", f"the same {text}. More windows were drawn where a verdict was undecided"
    if not others:
        windows = one[0] * evaluation["windows"] // evaluation["tokens_scored"]
        trained, on = f" (perplexity {one[1]:.4f})", f"the same {one[0]} predictions, {windows} {text}"
    lines = [
        f"Against base + adapter, unmerged, in float32{trained}, on {on}.",
        "",
        *(_figures(artifact, with_reference=bool(others)) for artifact in scored),
        *map(_not_scored, failed),
        "",
        "[`export.json`](export.json) has every figure, and the hash of every file that went in and came out.",
    ]
    return "\n".join(lines)


def _not_scored(artifact: Mapping[str, Any]) -> str:
    """The verdict on an artifact that its runtime could not score; the warnings at the top say why."""
    scores = artifact["verification"]
    return f"- {artifact['quant']} in {scores['runtime']}: not scored, for it could not be loaded or run."


def _figures(artifact: Mapping[str, Any], *, with_reference: bool) -> str:
    scores, answers = artifact["verification"], artifact.get("answers")
    trained = ""
    if with_reference:
        trained = (
            f" (the trained model's {scores['reference_perplexity']:.4f}) over {scores['tokens_scored']} predictions"
        )
    parts = [f"- {artifact['quant']} in {scores['runtime']}: perplexity {scores['perplexity']:.4f}{trained}"]
    if (survival := survival_text(artifact)) != "-":
        parts.append(f"{survival} of the adapter's change is in its weights")
    if answers:
        texts = answers["tokenization"]
        alike = texts["texts"] - len(texts["differing"]) - len(texts["explained"])
        explained = f" ({len(texts['explained'])} explained)" if texts["explained"] else ""
        parts.append(f"{alike} of {texts['texts']} texts tokenized alike{explained}")
        if (rendered := answers.get("chat_template")) is not None:
            alike = rendered["conversations"] - len(rendered["differing"])
            parts.append(f"{alike} of {rendered['conversations']} conversations rendered alike")
    return ", ".join(parts) + "."


def _serve(manifest: Mapping[str, Any]) -> str:
    """The commands for the first artifact. Those for the others differ in the file's name."""
    found: Sequence[tuple[str, str]] = serving_commands(manifest, manifest["artifacts"][0])
    blocks = [f"```{'python' if 'import ' in command else 'sh'}\n{command}\n```" for _, command in found]
    return "\n\n".join(["In this folder:", *blocks]) if blocks else "See the documentation of the format."


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"
