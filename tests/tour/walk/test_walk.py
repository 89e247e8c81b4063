"""The walk, a layer at a time, against the whole model's own forward.

The files of progress, states and moments are ours alone and never published. Their witness is a walk that was not
stopped, and its states are held against transformers' here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.artifact.staging import Staging
from exporter.backends.base import Finding, Solution, Writer
from exporter.backends.hessian import Moments
from exporter.backends.output_plan import TensorPlan
from exporter.backends.pieces import Piece, whole
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.device import make_merger
from exporter.merge.model import MergedModel
from exporter.plan.estimate import PlannedWalk
from exporter.reference.predictions import score_reference
from exporter.tokens.windows import CalibrationWindows, TokenSets
from exporter.tour.riders import Passengers, Rider, Settings, Solver
from exporter.tour.stream import Progress, Stream
from exporter.tour.walk.hidden_states import Group, States
from exporter.tour.walk.walk import Walk
from tests.merged import load_peft, merged_model, plan_gguf, random_windows
from tests.models import make_tokenizer

IDS = np.random.default_rng(5).integers(0, 384, (3, 24))
CALIBRATION = Group("calibration", IDS)


@contextmanager
def walking(model: MergedModel, passengers: Passengers, **settings: Any) -> Iterator[Walk]:
    """A walk with the calibration windows, and with them as evaluation windows too."""
    with TensorReader() as reader:
        riders = [*passengers.riders, *passengers.observers]
        merger = make_merger("cpu", reader)
        stream = Stream(model, riders, merger, threads=2, block_bytes=4096, progress=Progress())
        try:
            yield Walk(
                model,
                stream,
                passengers,
                evaluation=Group("evaluation", IDS[:2]),
                calibration=CALIBRATION,
                settings=Settings(**settings),
            )
        finally:
            stream.close()


def inputs_of(model: Any, ids: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """What every linear layer of a whole model is given: (tokens, in_features) by the name of its weight."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith("_proj"):

            def hook(_: Any, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen[f"{name}.weight"] = inputs[0].reshape(-1, inputs[0].shape[-1])

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=torch.tensor(ids))
    for handle in handles:
        handle.remove()
    return seen


def hidden_after_layers(model: Any, ids: npt.NDArray[np.int64]) -> torch.Tensor:
    """What the final norm of a whole model is given."""
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor(ids))
    handle.remove()
    return seen[0]


class Observing(Writer):
    """A writer that keeps what it is told, and refuses rows whose moments it has not seen."""

    def __init__(self) -> None:
        self.moments: dict[str, tuple[npt.NDArray[np.float64], int]] = {}
        self.rows: dict[str, torch.Tensor] = {}

    def observe(self, tensor: TensorPlan, piece: Piece, sums: npt.NDArray[np.float64], tokens: int) -> None:
        self.moments[piece.source] = (sums.copy(), tokens)

    def write(self, tensor: TensorPlan, first_row: int, block: torch.Tensor) -> None:
        (source,) = tensor.sources
        assert source in self.moments
        whole = self.rows.setdefault(source, torch.zeros(tensor.shape))
        whole[first_row : first_row + block.shape[0]] = block

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Coarse(Observing):
    """A solver that rounds to few digits, and keeps the moments that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.hessians: dict[str, torch.Tensor] = {}
        self.solved: dict[str, torch.Tensor] = {}

    def solve(self, weights: Mapping[str, torch.Tensor], moments: Moments) -> Solution:
        found = {name: (weight * 8).round() / 8 for name, weight in weights.items()}
        self.hessians |= dict.fromkeys(weights, moments.matrix())
        self.solved |= found
        return Solution(found, tuple(Finding(name, moments.tokens, 0.0, 0.0, 1, 0, False) for name in found))


def projections(model: MergedModel) -> list[str]:
    return [tensor.name for tensor in model.tensors if tensor.name.endswith("_proj.weight")]


def observer(model: MergedModel, staging: Staging) -> Rider:
    plans = [
        TensorPlan(tensor.name, whole(tensor.name), tensor.shape, "F32", "file", 0, 4 * tensor.shape[-1])
        for tensor in model.tensors
        if tensor.name in projections(model)
    ]
    return Rider.of("observer", plans, Observing(), staging)


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    opened = Staging(tmp_path / "out", "key")
    yield opened
    opened.close()


@pytest.fixture(params=["qwen2", "qwen3"])
def sources(request: pytest.FixtureRequest, make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> Any:
    base = make_base(request.param)
    return base, make_adapter(base)


@pytest.mark.parametrize("ahead", [False, True])
def test_second_moments_are_those_of_the_whole_model(sources: tuple[Path, Path], staging: Staging, ahead: bool) -> None:
    model = merged_model(*sources)
    rider = observer(model, staging)
    with walking(model, Passengers(observers=[rider]), ahead=ahead) as walk:
        walk.run()
    inputs = inputs_of(load_peft(*sources).base_model.merge_and_unload(), IDS)
    writer: Any = rider.writer
    assert writer.moments.keys() == inputs.keys() == set(projections(model))
    for name, (sums, tokens) in writer.moments.items():
        assert tokens == IDS.size
        np.testing.assert_allclose(sums, inputs[name].double().square().sum(0), rtol=1e-4)


def test_observers_are_given_merged_rows(sources: tuple[Path, Path], staging: Staging) -> None:
    model = merged_model(*sources)
    rider = observer(model, staging)
    with walking(model, Passengers(observers=[rider])) as walk:
        walk.run()
    weights = load_peft(*sources).base_model.merge_and_unload().state_dict()
    writer: Any = rider.writer
    for name, rows in writer.rows.items():
        assert (rows - weights[name]).abs().max() < 1e-6


@pytest.mark.parametrize("ahead", [False, True])
def test_solved_layers_feed_the_next_ones(sources: tuple[Path, Path], ahead: bool) -> None:
    model = merged_model(*sources)
    writer = Coarse()
    passengers = Passengers(solvers=[Solver("coarse", frozenset(projections(model)), writer)])
    with walking(model, passengers, ahead=ahead) as walk:
        walked = walk.run()
    trained = walked.states
    assert [finding.name for finding in walked.findings["coarse"]] == list(writer.solved)
    whole = load_peft(*sources).base_model.merge_and_unload()
    # The reference does not see what was solved.
    expected = hidden_after_layers(whole, IDS[:2])
    assert (trained[0].read(slice(0, 2)) - expected).abs().max() < 1e-4
    # The Hessian of a layer: those before it solved, itself and those after it as merged.
    assert whole.config.num_hidden_layers == 2
    for index in range(2):
        inputs = inputs_of(whole, IDS)
        for name in (name for name in projections(model) if f".layers.{index}." in name):
            moments = inputs[name].T @ inputs[name] / IDS.size
            assert (writer.hessians[name] - moments).abs().max() < 1e-4 * moments.abs().max()
        state = whole.state_dict()
        for name, value in writer.solved.items():
            if f".layers.{index}." in name:
                assert (state[name] - value).abs().max() > 1e-3
                state[name].copy_(value)


def test_layers_compute_in_bfloat16_with_a_solver_and_without(sources: tuple[Path, Path]) -> None:
    """As the whole model does in bfloat16, with the adapter beside it; the solver is given float32 all the same."""
    model = merged_model(*sources)
    writer = Coarse()
    solver = Solver("coarse", frozenset(projections(model)), writer)
    found = []
    for passengers in (Passengers(), Passengers(solvers=[solver])):
        with walking(model, passengers, dtype=torch.bfloat16) as walk:
            found.append(walk.run().states[0].read(slice(0, 2)))
    assert torch.equal(*found)
    whole = load_peft(*sources)
    exact = hidden_after_layers(whole.base_model.model, IDS[:2])
    # Not `.to`, which would round the buffers of the rotary embedding as well.
    for parameter in whole.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    rounded = hidden_after_layers(whole.base_model.model, IDS[:2])
    assert found[0].dtype == torch.bfloat16
    # Far nearer to the same arithmetic than to float32.
    assert (found[0] - rounded).abs().mean() < 0.2 * (exact - rounded).abs().mean()
    assert {value.dtype for value in (*writer.hessians.values(), *writer.solved.values())} == {torch.float32}


def test_a_walk_that_was_killed_goes_on_with_the_same_states(sources: tuple[Path, Path], staging: Staging) -> None:
    model = merged_model(*sources)

    def run(rider: Rider, **settings: Any) -> list[States]:
        with walking(model, Passengers(observers=[rider]), **settings) as walk:
            return walk.run().states

    whole = run(observer(model, Staging(staging.out.with_name("other"), "key")))

    def kill(done: int, layers: int) -> None:
        raise KeyboardInterrupt

    first = observer(model, staging)
    with pytest.raises(KeyboardInterrupt):
        run(first, scratch=staging.scratch, on_layer=kill)
    staging.close()
    staging = Staging(staging.out, "key")
    assert staging.resumed
    seen: list[int] = []
    second = observer(model, staging)
    again = run(second, scratch=staging.scratch, on_layer=lambda done, _: seen.append(done))
    assert seen == [1, 2]
    for one, other in zip(whole, again, strict=True):
        everything = slice(0, one.group.windows)
        assert torch.equal(one.read(everything), other.read(everything))
    # The first layer was not walked again: its rows were written by the first run, its moments are remembered.
    before, after = set(first.writer.rows), set(second.writer.rows)  # type: ignore[attr-defined]
    assert before.isdisjoint(after)
    assert before | after == set(projections(model)) == second.writer.moments.keys()  # type: ignore[attr-defined]


def test_large_states_are_kept_in_a_file(sources: tuple[Path, Path], staging: Staging) -> None:
    model = merged_model(*sources)
    with walking(model, Passengers()) as walk:
        in_memory = walk.run().states
    with walking(model, Passengers(), scratch=staging.scratch, keep_bytes=0) as walk:
        in_file = walk.run().states
        assert (staging.scratch / "hidden trained evaluation").stat().st_size == in_file[0].nbytes
    everything = slice(0, 2)
    assert torch.equal(in_memory[0].read(everything), in_file[0].read(everything))


def test_states_that_are_small_one_by_one_stay_in_memory_up_to_their_sum(
    sources: tuple[Path, Path], staging: Staging
) -> None:
    model = merged_model(*sources)
    passengers = Passengers(observers=[observer(model, staging)])
    # 2, 3 windows: each fits by itself, both do not.
    window = IDS.shape[1] * int(model.config["hidden_size"]) * 4
    with walking(model, passengers, scratch=staging.scratch, keep_bytes=5 * window - 1):
        assert [file.name for file in staging.scratch.glob("hidden *")] == ["hidden trained calibration"]
    calibration = CalibrationWindows(tuple(map(tuple, IDS.tolist())), IDS.shape[1], "", 0, "")
    tokens = TokenSets(random_windows(2, IDS.shape[1], 384), calibration)
    artifact = replace(plan_gguf(model), needs="moments")
    all_in, one_out = (
        PlannedWalk(model, [artifact], tokens, "float32", keep_bytes) for keep_bytes in (5 * window, 5 * window - 1)
    )
    assert (all_in.scratch_bytes, one_out.scratch_bytes) == (10 * window, 13 * window)
    assert all_in.memory - one_out.memory == pytest.approx(1.15 * 3 * window, abs=1)


def make_experts(folder: Path, hidden: int = 64) -> Path:
    """A small Qwen3-MoE with random weights; its second layer is dense."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    folder.mkdir()
    config = Qwen3MoeConfig(
        vocab_size=make_tokenizer(folder) + 16, hidden_size=hidden, intermediate_size=128, moe_intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
        num_experts_per_tok=2, mlp_only_layers=[1], max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_family(folder: Path, kind: str) -> Path:
    """Small models of other families with random weights."""
    import transformers

    torch.manual_seed(0)
    folder.mkdir()
    experts = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    config: Any = getattr(transformers, f"{kind}Config")(
        vocab_size=make_tokenizer(folder) + 16, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
        tie_word_embeddings=kind == "Qwen3Moe", **experts,
        **({"shared_expert_intermediate_size": 48} if kind != "Qwen3Moe" else {}),
        **({} if kind == "Qwen2Moe" else {"head_dim": 16}),
        **({"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16} if kind == "Qwen3Next" else {}),
    )  # fmt: skip
    model: Any = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Qwen2Moe", "Qwen3Next"])
def test_other_families(tmp_path: Path, kind: str) -> None:
    """A tied mixture of experts, one with shared experts, and one whose layers are of linear and of full attention."""
    base = make_family(tmp_path / "base", kind)
    config = merged_model(base).config
    assert bool(config.get("tie_word_embeddings")) == (kind == "Qwen3Moe")
    assert (len(set(config.get("layer_types") or ())) == 2) == (kind == "Qwen3Next")
    same_as_whole_model(base)


def test_mixture_of_experts(tmp_path: Path) -> None:
    base = make_experts(tmp_path / "base")
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in {tensor.name for tensor in merged_model(base).tensors}
    same_as_whole_model(base)


def same_as_whole_model(base: Path, *adapters: Path, n_ctx: int = 32) -> None:
    """The walk's logits are those of the whole model's own forward, with peft's adapter."""
    windows = random_windows(2, n_ctx, 384)
    found = score_reference(merged_model(base, *adapters), windows, "cpu")
    with torch.no_grad():
        whole = load_peft(base, *adapters)(input_ids=torch.tensor(windows.ids)).logits
    assert whole.std() > 0.1
    for window in range(2):
        ours = torch.cat([logits for _, logits in found.logits(window)])
        assert (ours - whole[window, windows.first_scored : -1]).abs().max() < 1e-4


def test_mixture_of_experts_with_an_adapter_on_attention(tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    base = make_experts(tmp_path / "base")
    adapter = make_adapter(base, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    ids = torch.tensor(random_windows(2, 32, 384).ids)
    with torch.no_grad():
        delta = load_peft(base, adapter)(input_ids=ids).logits - load_peft(base)(input_ids=ids).logits
    # It changes what is compared, by far more than what is allowed.
    assert delta.abs().max() > 0.05
    same_as_whole_model(base, adapter)


def write_adapter(base: Path, folder: Path, ending: str, rank: int = 4) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter on every matrix whose name ends like that, as peft wrote them when experts were modules of their own;
    and its changes by tensor. peft itself can no longer train one."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: tensor.shape for name, tensor in merged_model(base).base.tensors.items()}
    modules = [name.removesuffix(".weight") for name in shapes if re.fullmatch(f".*({ending}).weight", name)]
    stored: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((rank, columns), (rows, rank)))
        stored |= {f"base_model.model.{module}.lora_{part}.weight": value for part, value in (("A", a), ("B", b))}
        deltas[f"{module}.weight"] = 2 * b @ a
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    return folder, deltas


@pytest.mark.parametrize("ending", [r"_proj", r"gate_proj", r"(gate|up|down)_proj|\.gate", r"\.gate"])
def test_mixture_of_experts_with_an_adapter_on_experts(tmp_path: Path, ending: str) -> None:
    """Of experts, of the layer that is dense, and of routers; also on one of two matrices that transformers fuses."""
    base = make_experts(tmp_path / "base")
    adapter, deltas = write_adapter(base, tmp_path / "adapter", ending)
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    with torch.no_grad():
        values = {name: value.float() for name, value in load_file(base / "model.safetensors").items()}
        save_file(
            {name: value + deltas.get(name, 0) for name, value in values.items()},
            merged / "model.safetensors", metadata={"format": "pt"},
        )  # fmt: skip
        windows = random_windows(2, 32, 384)
        ids = torch.tensor(windows.ids)
        expected, before = load_peft(merged)(input_ids=ids).logits, load_peft(base)(input_ids=ids).logits
    assert (expected - before).abs().max() > 0.05
    found = score_reference(merged_model(base, adapter), windows, "cpu")
    for window in range(2):
        ours = torch.cat([logits for _, logits in found.logits(window)])
        # Routed the other way by a last bit, a token would be off by far more.
        assert (ours - expected[window, windows.first_scored : -1]).abs().max() < 1e-4


def test_layers_with_a_sliding_window_beside_layers_without(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    base = make_base("qwen2", layers=4, use_sliding_window=True, sliding_window=8, layer_types=kinds)
    whole, ids = load_peft(base), torch.tensor(random_windows(2, 32, 384).ids)
    assert [layer.self_attn.layer_type for layer in whole.model.layers] == kinds
    with torch.no_grad():
        sliding = whole(input_ids=ids).logits
        whole.config.layer_types = ["full_attention"] * 4
        full = whole(input_ids=ids).logits
    # It changes what is compared, by far more than what is allowed.
    assert (full - sliding)[:, 16:].abs().max() > 0.05
    same_as_whole_model(base, make_adapter(base))


def test_true_sequential_hessians(sources: tuple[Path, Path]) -> None:
    """Each as the whole model gives it with everything before it solved, also in its own layer."""
    model = merged_model(*sources)
    writer = Coarse()
    solver = Solver("coarse", frozenset(projections(model)), writer, sequential=True)
    with walking(model, Passengers(solvers=[solver])) as walk:
        walk.run()
    whole = load_peft(*sources).base_model.merge_and_unload()
    state = whole.state_dict()
    steps = [("self_attn", "q", "k", "v"), ("self_attn", "o"), ("mlp", "gate", "up"), ("mlp", "down")]
    differ = 0
    for index in range(whole.config.num_hidden_layers):
        unsolved = inputs_of(whole, IDS)
        for block, *leaves in steps:
            inputs = inputs_of(whole, IDS)
            for name in (f"model.layers.{index}.{block}.{leaf}_proj.weight" for leaf in leaves):
                moments = inputs[name].T @ inputs[name] / IDS.size
                assert (writer.hessians[name] - moments).abs().max() < 1e-4 * moments.abs().max()
                # Not what it would be if the layer's other matrices were not solved yet.
                others = unsolved[name].T @ unsolved[name] / IDS.size
                differ += (others - moments).abs().max().item() > 1e-2 * moments.abs().max().item()
                state[name].copy_(writer.solved[name])
    # All but the three of each layer that come first.
    assert differ == 4 * whole.config.num_hidden_layers
