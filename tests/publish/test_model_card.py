"""The model card: front matter that the Hub's own library takes, figures, and nothing of this machine."""

from __future__ import annotations

import copy as copies
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from exporter.pipeline.plan import make_plan
from exporter.publish.model_card import BaseCard, front_matter, model_card
from exporter.publish.serving_commands import serving_commands
from exporter.recipe import Execution, Recipe
from tests.exports import export_to, recipe
from tests.folders import copy, edit_json
from tests.manifests import manifest_of

Make = Callable[..., Path]
BASE = BaseCard({}, None)
QWEN = BaseCard(
    {"license": "apache-2.0", "language": ["en", False, "zh"], "pipeline_tag": "text-generation"}, "Qwen/Q-8B"
)


def parsed(manifest: dict[str, Any], base: BaseCard = BASE) -> ModelCard:
    return ModelCard(model_card(manifest, base).decode())


def metadata(manifest: dict[str, Any], base: BaseCard = BASE) -> dict[str, Any]:
    """The front matter as the Hub's library reads and checks it."""
    read: Any = parsed(manifest, base).data
    found: dict[str, Any] = cast(Any, ModelCardData(**read.to_dict())).to_dict()
    assert found == yaml.safe_load(model_card(manifest, base).decode().split("---\n")[1])
    return found


@pytest.mark.parametrize(
    ("format_", "adapters", "relation", "library"),
    [
        ("gguf", 1, "quantized", "llama-cpp-python"),
        ("gptq", 1, "quantized", "transformers"),
        ("gptqmodel", 0, "quantized", "transformers"),
        ("safetensors", 1, "finetune", "transformers"),
        ("safetensors", 0, None, "transformers"),
    ],
)
def test_front_matter(format_: str, adapters: int, relation: str | None, library: str) -> None:
    manifest = manifest_of(format_=format_)
    manifest["inputs"] = manifest["inputs"][: 1 + adapters]
    data = metadata(manifest, QWEN)
    assert data["base_model"] == "Qwen/Q-8B"
    assert data.get("base_model_relation") == relation
    assert (data["license"], data["language"], data["pipeline_tag"]) == ("apache-2.0", ["en", "zh"], "text-generation")
    assert data["library_name"] == library
    assert format_ in data["tags"]
    assert ("lora" in data["tags"]) == bool(adapters)
    assert "quantized_by" not in data


def test_tags_name_the_types_and_their_bits() -> None:
    manifest = manifest_of(format_="gptq")
    manifest["artifacts"][0]["quant"] = "gptq-int4-g128"
    assert metadata(manifest)["tags"][-2:] == ["4-bit", "gptq-int4-g128"]
    manifest = manifest_of()
    tags = metadata(manifest)["tags"]
    assert tags[-len(manifest["artifacts"]) :] == [artifact["quant"] for artifact in manifest["artifacts"]]
    assert not any(tag.endswith("-bit") for tag in tags)


def test_without_what_is_not_known() -> None:
    assert metadata(manifest_of()).keys() == {"library_name", "pipeline_tag", "tags"}


def test_license_that_is_a_file() -> None:
    other = {"license": "other", "license_name": "qwen", "license_link": "LICENSE"}
    manifest = manifest_of()
    assert "license_link" not in metadata(manifest, BaseCard(other, None))
    linked = metadata(manifest, BaseCard(other, "Qwen/Q"))
    assert (linked["license"], linked["license_name"]) == ("other", "qwen")
    assert linked["license_link"] == "https://huggingface.co/Qwen/Q/blob/main/LICENSE"
    manifest["files"]["LICENSE"] = {"bytes": 1, "sha256": "0" * 64}
    assert metadata(manifest, BaseCard(other, "Qwen/Q"))["license_link"] == "LICENSE"
    link = other | {"license_link": "https://example.org/l"}
    assert metadata(manifest, BaseCard(link, None))["license_link"] == "https://example.org/l"


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (b"---\nlicense: mit\n---\n# x\n", {"license": "mit"}),
        (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (b"# no front matter\n---\nlicense: mit\n---\n", {}),
        (b"---\n- a list\n---\n", {}),
        (b"---\nlicense: [\n---\n", {}),
        (b"---\nlicense: mit\n", {}),
        (b"\xff\xfe", {}),
        (b"", {}),
    ],
)
def test_front_matter_of_a_base(card: bytes, found: dict[str, Any]) -> None:
    assert front_matter(card) == found


def test_id_of_the_base(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = copy(make_base(), tmp_path / "base")
    adapter = copy(make_adapter(base), tmp_path / "adapter")

    def found(named: str | None, card: str = "") -> str | None:
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=named)
        (base / "README.md").write_text(card, encoding="utf-8")
        plan = make_plan(recipe(base, (adapter,), tmp_path / "out"), Execution(device="cpu"))
        return BaseCard.of(plan).hub_id

    for name in (
        None,
        "",
        str(base),
        "/abs/olute",
        "./here",
        "../up",
        "~/models/x",
        "models/qwen",
        "a/b/c",
        "C:\\x\\y",
    ):
        assert found(name) is None, name
    assert found("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    ancestor = "---\nbase_model: Qwen/Qwen3-8B-Base\n---\n"
    assert found(None, ancestor) == "Qwen/Qwen3-8B-Base"
    assert found("Qwen/Qwen3-8B", ancestor) == "Qwen/Qwen3-8B"
    assert found(None, "---\nbase_model:\n- Qwen/A\n---\n") == "Qwen/A"
    assert found(None, "---\nbase_model:\n- Qwen/A\n- Qwen/B\n---\n") is None


def test_figures() -> None:
    text = parsed(manifest_of(quants=("Q4_K_M", "Q8_0"))).text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[1] for row in rows] == ["Q4_K_M", "Q8_0"]
    for cell in ("2.9 MB", "+0.78% (+0.30% … +1.27%)", "0.00285 ± 0.00014", "94.3%", "passed"):
        assert cell in rows[0]
    assert "99.64% of the adapter's change" in text
    assert "llama-cpp-python 0.3.36" in text
    assert "2040 predictions, 8 windows of 512 tokens" in text


def test_what_was_drawn_is_said_where_it_was_scored() -> None:
    manifest = manifest_of(quants=("Q4_K_M", "Q8_0"))
    manifest["evaluation"]["drawn"] = {"windows": 24, "tokens_scored": 6120, "sha256": "1" * 64}
    first = manifest["artifacts"][0]["verification"]
    first |= {"tokens_scored": 8160, "reference_perplexity": 70.5}
    text = parsed(manifest).text
    assert "perplexity 68.3063 (the trained model's 70.5000) over 8160 predictions" in text
    assert "perplexity 67.7628 (the trained model's 67.7744) over 2040 predictions" in text
    assert "the same windows of 512 tokens of `embedded`" in text
    assert "in float32 (perplexity" not in text
    # For the whole of one artifact.
    manifest["artifacts"] = manifest["artifacts"][:1]
    text = parsed(manifest).text
    assert "in float32 (perplexity 70.5000), on the same 8160 predictions, 32 windows of 512 tokens" in text


def test_figures_that_are_not_there() -> None:
    skipped = manifest_of()
    skipped["artifacts"][0] |= {"verification": {"verdict": "skipped"}, "weights": None, "answers": None}
    skipped["evaluation"] = None
    skipped["recipe"]["verify"] = False
    text = parsed(skipped).text
    assert "| - | - | - | skipped |" in text
    assert "Q4_K_M was not verified" in text
    one = manifest_of()
    scores = one["artifacts"][0]["verification"]
    top = {key: scores["kl_divergence"][key] for key in scores["kl_divergence"]} | {"k": 20, "stderr": None}
    scores |= {"delta_interval": None, "kl_divergence": None, "top_k_divergence": top}
    assert "| +0.78% | top 20: ≥ 0.00285 |" in parsed(one).text


def test_what_did_not_pass_is_said_first() -> None:
    failed = manifest_of()
    failed["artifacts"][0]["verification"] |= {"verdict": "failed", "broken": ["perplexity changes | by 9 %"]}
    assert "**Q4_K_M, failed:** perplexity changes | by 9 %." in parsed(failed).text.partition("## ")[0]
    undecided = manifest_of()
    scores = undecided["artifacts"][0]["verification"]
    scores |= {"verdict": "undecided", "checks": [{"name": "perplexity", "verdict": "undecided", "reason": "too few"}]}
    del scores["broken"]
    assert "**Q4_K_M, undecided:** too few." in parsed(undecided).text


def test_the_recipe_is_one() -> None:
    for verify in (True, False):
        manifest = manifest_of(quants=("Q4_K_M", "Q8_0"))
        manifest["recipe"]["verify"] = verify
        manifest["recipe"]["options"] = {"imatrix": "none"}
        manifest["inputs"][0] |= {"hub_id": "Qwen/Qwen3-8B", "revision": "0" * 40}
        text = parsed(manifest).text.partition("```yaml\n")[2].partition("```")[0]
        found = Recipe.build(yaml.safe_load(text))
        assert found.base == "Qwen/Qwen3-8B@" + "0" * 40
        assert found.outputs[0].quant == ("Q4_K_M", "Q8_0")
        assert found.verify == verify
        assert found.evaluation.tokens == 4096


def test_serving_commands() -> None:
    manifest = manifest_of()
    (artifact,) = manifest["artifacts"]
    assert [name for name, _ in serving_commands(manifest, artifact)] == ["llama-server", "llama-cli"]
    manifest["name"], artifact["entry"] = "My model.1", "My model.1-Q4_K_M.gguf"
    artifact["files"] = [artifact["entry"], "Modelfile.Q4_K_M"]
    commands = dict(serving_commands(manifest, artifact))
    assert commands["llama-server"] == "llama-server -m 'My model.1-Q4_K_M.gguf'"
    assert commands["ollama"].splitlines() == [
        "ollama create my-model.1:q4_k_m -f Modelfile.Q4_K_M", "ollama run my-model.1:q4_k_m",
    ]  # fmt: skip
    folder = manifest_of(format_="gptq")
    commands = dict(serving_commands(folder, folder["artifacts"][0]))
    assert commands["vllm"] == "vllm serve . --served-model-name demo"
    compile(commands["transformers"], "snippet", "exec")


def test_the_card_is_a_function_of_manifest_and_base() -> None:
    manifest = manifest_of()
    before = copies.deepcopy(manifest)
    assert model_card(manifest, QWEN) == model_card(json.loads(json.dumps(manifest)), QWEN)
    assert manifest == before


def test_every_folder_has_one(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = copy(make_base(), tmp_path / "inputs" / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-0.6B-Base\n---\n# Base\n")
    adapter = make_adapter(base)
    result = export_to(tmp_path / "out", base, adapter, format="gguf", quant=("F16", "Q8_0"))
    (folder,) = result.folders
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.content.encode() == model_card(folder.manifest, BaseCard.of(result.plan))
    found = card.data.to_dict()
    assert (found["license"], found["base_model"]) == ("apache-2.0", "Qwen/Qwen3-0.6B-Base")
    assert str(tmp_path) not in card.content
    assert "README.md" not in folder.manifest["files"]
    assert {"Modelfile.F16", "Modelfile.Q8_0"} <= folder.manifest["files"].keys()
    assert "ollama create" in card.text
    assert "was not verified" in card.text


def test_names_in_commands_are_quoted() -> None:
    manifest = {"name": "my model; rm -rf ~"}
    artifact = {"entry": "-a 'b'.gguf", "quant": "Q8_0", "runtimes": ["llamacpp", "vllm"], "files": []}
    commands = dict(serving_commands(manifest, artifact))
    assert shlex.split(commands["llama-server"]) == ["llama-server", "-m", "./-a 'b'.gguf"]
    assert shlex.split(commands["vllm"])[-1] == "my model; rm -rf ~"
    assert serving_commands(manifest, artifact | {"runtimes": []}) == []
