"""What files say of themselves, falsified: configuration, tokenizer, Modelfile, index, packed matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from exporter.backends.gptq.bit_unpacking import unpack_layer
from scripts.sabotage.damage import Array, Damaged, Tensors

LLAMA_TEMPLATE = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class NotApplicableError(Exception):
    """The model has nothing that could be damaged so."""


# --- configuration ---------------------------------------------------------------------------------------------------


def wrong_rope(damaged: Damaged) -> None:
    """A rotary base that is a hundredth: 10,000 is what transformers takes where none is given."""
    rope = damaged.config.get("rope_parameters") or damaged.config
    theta = float(rope["rope_theta"]) / 100
    if damaged.format == "gguf":
        damaged.set_number(damaged.metadata_key("rope.freq_base"), theta)
    else:
        damaged.edit_json("config.json", lambda values: values.get("rope_parameters", values).update(rope_theta=theta))


def wrong_epsilon(damaged: Damaged) -> None:
    """An epsilon of the norms that is ten times the right one."""
    epsilon = 10 * float(damaged.config["rms_norm_eps"])
    if damaged.format == "gguf":
        damaged.set_number(damaged.metadata_key("attention.layer_norm_rms_epsilon"), epsilon)
    else:
        damaged.edit_json("config.json", lambda values: values.update(rms_norm_eps=epsilon))


def wrong_context(damaged: Damaged) -> None:
    """Half the positions."""
    length = int(damaged.config["max_position_embeddings"]) // 2
    if damaged.format == "gguf":
        damaged.set_number(damaged.metadata_key("context_length"), length)
    else:
        damaged.edit_json("config.json", lambda values: values.update(max_position_embeddings=length))


def tie(damaged: Damaged) -> None:
    """A folder whose configuration ties a head that it stores."""
    damaged.edit_json("config.json", lambda values: values.update(tie_word_embeddings=True))


def wrong_eos(damaged: Damaged, *, config: bool = True, generation: bool = True) -> None:
    """The id that ends a Llama's text."""
    if damaged.format == "gguf":
        damaged.set_number("tokenizer.ggml.eos_token_id", 2)
        return
    if config:
        damaged.edit_json("config.json", lambda values: values.update(eos_token_id=2))
    if generation:
        damaged.edit_json("generation_config.json", lambda values: values.update(eos_token_id=2))


# --- tokenizer -------------------------------------------------------------------------------------------------------


def exchange_merges(damaged: Damaged, first: int, second: int) -> None:
    """Exchange two merges."""
    if damaged.format == "gguf":
        damaged.exchange_texts("tokenizer.ggml.merges", first, second)
        return

    def change(values: dict[str, Any]) -> None:
        merges = values["model"]["merges"]
        merges[first], merges[second] = merges[second], merges[first]

    damaged.edit_json("tokenizer.json", change)


def wrong_template(damaged: Damaged) -> None:
    """A Llama's chat template."""
    if damaged.format == "gguf":
        damaged.set_text("tokenizer.chat_template", LLAMA_TEMPLATE)
    elif (file := damaged.folder / "chat_template.jinja").is_file():
        damaged.own(file).write_text(LLAMA_TEMPLATE, encoding="utf-8")
    else:
        damaged.edit_json("tokenizer_config.json", lambda values: values.update(chat_template=LLAMA_TEMPLATE))


def wrong_pre_tokenizer(damaged: Damaged) -> None:
    """The way in which a Llama splits text, three digits to a token."""
    if damaged.format == "gguf":
        damaged.set_text("tokenizer.ggml.pre", "llama-bpe")
        return

    def change(values: dict[str, Any]) -> None:
        split = values["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")

    damaged.edit_json("tokenizer.json", change)


def add_bos(damaged: Damaged) -> None:
    """A token that llama.cpp puts before every prompt."""
    damaged.set_number("tokenizer.ggml.add_bos_token", True)


def end_as_text(damaged: Damaged) -> None:
    """The token that ends a turn as one of plain text, on which llama.cpp would stop only by luck."""
    text = damaged.config["eos_token_id"]
    damaged.set_number("tokenizer.ggml.token_type", 1, text if isinstance(text, int) else text[0])


def wrong_padding(damaged: Damaged) -> None:
    """Another token that fills up."""
    damaged.set_number("tokenizer.ggml.padding_token_id", 2)


def other_sampling(damaged: Damaged) -> None:
    """Twice the temperature, by the header."""
    key = "general.sampling.temp"
    if not damaged.has_key(key):
        raise NotApplicableError("the model has no defaults of sampling")
    damaged.set_number(key, 1.4)


# --- Modelfile -------------------------------------------------------------------------------------------------------


def edit_modelfile(damaged: Damaged, pattern: str, replacement: str) -> None:
    """Change what Ollama is told."""
    file = damaged.own(damaged.folder / "Modelfile")
    text, count = re.subn(pattern, replacement, file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    if not count:
        raise NotApplicableError(f"the Modelfile has no {pattern}")
    file.write_text(text, encoding="utf-8")


# --- index and shards ------------------------------------------------------------------------------------------------

_INDEX = "model.safetensors.index.json"
_NORM = "model.norm.weight"


def no_index(damaged: Damaged) -> None:
    """Several shards without an index."""
    (damaged.folder / _INDEX).unlink()


def unnamed_tensor(damaged: Damaged) -> None:
    """An index that leaves a tensor out."""
    damaged.edit_json(_INDEX, lambda values: values["weight_map"].pop(_NORM))


def wrong_shard(damaged: Damaged) -> None:
    """An index that looks for a tensor in another shard than the one that holds it."""

    def change(values: dict[str, Any]) -> None:
        shards = sorted(set(values["weight_map"].values()) - {values["weight_map"][_NORM]})
        values["weight_map"][_NORM] = shards[0]

    damaged.edit_json(_INDEX, change)


def twice_stored(damaged: Damaged) -> None:
    """A tensor that is in a second shard, too, with other values."""
    held = damaged.places[_NORM]
    other = next(shard for shard in damaged.shards if shard != held.file)
    damaged.edit_tensors(other, lambda tensors: tensors.update({_NORM: torch.ones(held.shape, dtype=torch.bfloat16)}))


def unnamed_shard(damaged: Damaged) -> None:
    """A copy of a shard that the index does not name."""
    shard = damaged.shards[0]
    (damaged.folder / "model-more.safetensors").write_bytes(shard.read_bytes())


def stray_tensor(damaged: Damaged) -> None:
    """A tensor that is not the model's, which the index names."""
    name, shard = "model.layers.0.self_attn.more_proj.weight", damaged.shards[0]
    damaged.edit_tensors(shard, lambda tensors: tensors.update({name: torch.ones(8, 8, dtype=torch.bfloat16)}))
    damaged.edit_json(_INDEX, lambda values: values["weight_map"].update({name: shard.name}))


# --- packed matrices -------------------------------------------------------------------------------------------------


def say(damaged: Damaged, changes: Mapping[str, Any], *, older: bool = True) -> None:
    """Change what the configuration says of packed matrices, and also, or not, the file for older readers."""
    damaged.edit_json("config.json", lambda values: values["quantization_config"].update(changes))
    if older:
        damaged.edit_json("quantize_config.json", lambda values: values.update(changes))


def keep_in_16_bits(damaged: Damaged) -> None:
    """A matrix of floats among packed ones, and no rule that says so."""
    module = "model.layers.0.mlp.down_proj"
    places = [damaged.places[name] for name in damaged.parts(f"{module}.weight").values()]
    weight = torch.from_numpy(_unpacked(damaged, module)).to(torch.bfloat16)

    def change(tensors: Tensors) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{module}.{part}", None)

    for shard in {place.file for place in places}:
        damaged.edit_tensors(shard, change)
    last = places[0].file
    damaged.edit_tensors(last, lambda tensors: tensors.update({f"{module}.weight": weight}))

    def rename(values: dict[str, Any]) -> None:
        named = {name: file for name, file in values["weight_map"].items() if not name.startswith(f"{module}.")}
        values["weight_map"] = named | {f"{module}.weight": last.name}

    damaged.edit_json(_INDEX, rename)


def _unpacked(damaged: Damaged, module: str) -> Array:
    said = damaged.quantization
    parts = damaged.stored(f"{module}.weight")
    return unpack_layer(parts, said["bits"], said["group_size"], said["checkpoint_format"])
