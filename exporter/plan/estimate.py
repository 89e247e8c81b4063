"""Rough figures for the plan: memory and time. Measured by scripts/benchmarks/export.py, see docs/performance.md."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from exporter.backends.output_plan import OutputPlan
from exporter.backends.registry import find_backend
from exporter.families.roles import layer_of, shared_inputs
from exporter.inputs.checkpoint import DTYPE_BYTES
from exporter.merge.model import MergedModel
from exporter.tokens.windows import TokenSets, Windows
from exporter.tour.walk.sizes import BATCH_TOKENS, HEAD_ROWS, KEEP_BYTES, LOGIT_ROWS, stay_in_memory

# Interpreter, torch and this package, and the buffers for hashing.
_RESIDENT_BYTES = 250 << 20
# Interpreter, torch, transformers and peft.
_WALK_RESIDENT_BYTES = 480 << 20
# The allocator keeps some memory during a walk. A 14B took 10 % more than the sum of its parts
# (scripts/benchmarks/tour.py).
_MARGIN = 1.15
# Raw rows, float32 rows, product and stored rows of one block, and the memory that the allocator keeps of them.
_BLOCK_FACTOR = 5

FEWER_TOKENS = "fewer tokens"

_STARTUP_SECONDS = 4.0
# Elements a second and thread: reading, merging and writing floats. A backend says its own rates of encoding.
_MERGE_RATE = 150e6
# Multiply-adds a second and thread in a forward pass.
_FORWARD_RATE = 50e9
# Tokens of answers: all prompts and their continuations. The artifact and the trained model each pass them once.
_ANSWER_TOKENS = 2400
# The same in solving for a matrix, and in taking its Hessian.
_SOLVE_RATE = 10e9
_MOMENT_RATE = 100e9


def merge_memory(model: MergedModel, threads: int, block_bytes: int) -> int:
    """Estimated peak memory of merging and writing. It does not depend on the size of the model or of its tensors."""
    factors = max((update.whole_bytes for tensor in model.tensors for update in tensor.updates), default=0)
    return _RESIDENT_BYTES + (threads + 1) * _BLOCK_FACTOR * block_bytes + 2 * factors


@dataclass(frozen=True)
class PlannedWalk:
    """The memory, disk and time that a walk will take.

    Attributes:
        model: the merged model.
        artifacts: all that are made.
        tokens: the windows that travel.
        compute_dtype: what the layers compute in: float32 or bfloat16.
        keep_bytes: all hidden states together stay in memory up to this size.
        held_bytes: of a reference pack, what stays in memory until it is written.
        prompts: tokens of each prompt that travels for a reference pack.
    """

    model: MergedModel
    artifacts: Sequence[OutputPlan]
    tokens: TokenSets
    compute_dtype: str
    keep_bytes: int = KEEP_BYTES
    held_bytes: int = 0
    prompts: tuple[int, ...] = ()

    @classmethod
    def for_reference(
        cls,
        model: MergedModel,
        windows: Windows,
        compute_dtype: str,
        keep_bytes: int,
        prompts: tuple[int, ...] = (),
    ) -> PlannedWalk:
        """A walk for the reference alone; see the attributes."""
        return cls(model, (), TokenSets(windows, None), compute_dtype, keep_bytes, prompts=prompts)

    @property
    def walks(self) -> bool:
        """Whether anything needs the walk."""
        needing = any(artifact.needs in ("moments", "hessians") for artifact in self.artifacts)
        return self.tokens.evaluation is not None or needing

    @property
    def memory(self) -> int:
        """Estimated peak memory: one layer, activations of a pass, Hessians, and the hidden states that stay; or at
        its end the head with its logits. 0 without a walk."""
        if not self.walks:
            return 0
        return round(_MARGIN * (_WALK_RESIDENT_BYTES + self._kept + self._computing("cpu"))) + self.held_bytes

    @property
    def device_memory(self) -> int:
        """Estimated peak on a CUDA device: the layer that computes, and the next one, which is loaded meanwhile."""
        return round(_MARGIN * (self._layer + self._computing("cuda"))) if self.walks else 0

    @property
    def scratch_bytes(self) -> int:
        """Temporary disk: hidden states that do not stay in memory, and those after the last layer and the one before.

        A killed run goes on from the latter."""
        if not self.walks:
            return 0
        return 3 * sum(self._states) - self._kept

    @property
    def spills(self) -> bool:
        """Whether hidden states go to the disk because they do not stay in memory."""
        return self._kept < sum(self._states)

    def lighter(self) -> dict[str, int]:
        """Settings that take less memory, in words that follow "with", and the estimate of each."""
        evaluation, calibration = self.tokens.evaluation, self.tokens.calibration
        few = TokenSets(
            replace(evaluation, ids=evaluation.ids[:1]) if evaluation else None,
            replace(calibration, ids=calibration.ids[:1]) if calibration else None,
        )
        others = [artifact for artifact in self.artifacts if artifact.needs != "hessians"]
        found = {
            "--compute-dtype bfloat16": replace(self, compute_dtype="bfloat16"),
            FEWER_TOKENS: replace(self, tokens=few),
        }
        if self.artifacts and evaluation:
            found["--no-verify"] = replace(self, tokens=replace(self.tokens, evaluation=None), held_bytes=0, prompts=())
        if len(others) < len(self.artifacts):
            found["outputs that need no Hessians"] = replace(self, artifacts=others)
        return {name: walk.memory for name, walk in found.items() if walk.memory < self.memory}

    @property
    def _item(self) -> int:
        return 2 if self.compute_dtype == "bfloat16" else 4

    @property
    def _layer(self) -> float:
        """Buffers of the largest layer: float32 where weights are solved for."""
        solved = any(artifact.needs == "hessians" for artifact in self.artifacts)
        return max(layer_bytes(self.model), default=0) * (1 if solved else self._item / 4)

    def _computing(self, kind: str) -> float:
        """Bytes on a kind of device: adapters, and a layer at its peak; or the head, if that is more."""
        hidden = int(self.model.config.get("hidden_size") or 0)
        inner = max(int(self.model.config.get("intermediate_size") or 0), 4 * hidden)
        evaluation, calibration = self.tokens.evaluation, self.tokens.calibration
        updates = [update for adapter in self.model.adapters for update in adapter.updates.values()]
        adapters = self._item * sum(update.elements for update in updates)
        adapters += self._item * max((update.passing_elements for update in updates), default=0)
        longest = max(evaluation.n_ctx if evaluation else 0, calibration.window if calibration else 0, *self.prompts, 0)
        passing = self._item * max(BATCH_TOKENS[kind], longest) * (4 * hidden + 3 * inner)
        solved = [artifact.calibrated for artifact in self.artifacts if artifact.needs == "hessians"]
        solving = max((solving_memory(self.model, names) for names in solved), default=0)
        # The layers compute in this dtype, beside buffers of float32.
        cast = max(layer_bytes(self.model), default=0) / 2 if solved and self._item == 2 else 0
        scoring = 0
        if evaluation and (head := self.model.head):
            kept = 4 if head.updates else DTYPE_BYTES[head.source.dtype]
            states = 4 * hidden * (HEAD_ROWS + evaluation.tokens)
            scoring = kept * head.elements + states + 2 * 4 * head.shape[0] * LOGIT_ROWS
        return adapters + max(self._layer + cast + max(passing, solving), scoring)

    @property
    def _kept(self) -> int:
        """Bytes of the hidden states that stay in memory."""
        stay = stay_in_memory(self._states, self.keep_bytes)
        return sum(nbytes for nbytes, stays in zip(self._states, stay, strict=True) if stays)

    @property
    def _states(self) -> list[int]:
        """Bytes of the hidden states of each group of windows: the trained model's, and one for each artifact that is
        solved for."""
        item = int(self.model.config.get("hidden_size") or 0) * self._item
        evaluated = self.tokens.evaluation.tokens if self.tokens.evaluation else 0
        calibrated = self.tokens.calibration.tokens if self.tokens.calibration else 0
        observed = calibrated * any(artifact.needs == "moments" for artifact in self.artifacts)
        solved = sum(artifact.needs == "hessians" for artifact in self.artifacts)
        prompted = [item * length for length in self.prompts]
        return [item * evaluated, *prompted, item * observed] + [item * calibrated] * solved


def solving_memory(model: MergedModel, solved: Collection[str]) -> int:
    """Estimated memory for the Hessians of a layer, and for the largest of its solutions."""
    shapes = {tensor.name: tensor.shape for tensor in model.tensors if tensor.name in solved}
    largest = 0
    layers: dict[str, list[tuple[int, int]]] = {}
    for group in shared_inputs(shapes):
        columns, rows = shapes[group[0]][-1], sum(shapes[name][0] for name in group)
        layers.setdefault(layer_of(group[0]), []).append((rows, columns))
    for groups in layers.values():
        hessians = sum(4 * columns**2 for _, columns in groups)
        # The mean and its factor; weights, residual, errors, codes and what is packed of them.
        solving = max(8 * columns**2 + 18 * rows * columns for rows, columns in groups)
        largest = max(largest, hessians + solving)
    return largest


def layer_bytes(model: MergedModel) -> list[int]:
    """float32 bytes of each decoder layer."""
    sizes: dict[str, int] = {}
    for tensor in model.tensors:
        if layer := layer_of(tensor.name):
            sizes[layer] = sizes.get(layer, 0) + 4 * tensor.elements
    return list(sizes.values())


def seconds(
    model: MergedModel,
    artifacts: Sequence[OutputPlan],
    threads: int,
    tokens: TokenSets,
    *,
    startup: float = 0.0,
    answers: bool = False,
) -> float:
    """Rough duration of a run in seconds, as if every verdict were clear on the first evaluation tokens.

    Args:
        model: the merged model.
        artifacts: everything that is written.
        threads: worker threads.
        tokens: evaluation and calibration windows.
        startup: seconds that runtimes take to start their servers.
        answers: whether artifacts are asked for answers.
    """
    work = model.parameters / _MERGE_RATE
    for artifact in artifacts:
        backend = find_backend(artifact.format)
        rates = backend.quantize_rates if backend else {}
        for tensor in artifact.tensors:
            work += tensor.rows * tensor.columns / rates.get(tensor.type, _MERGE_RATE)
    duration = _STARTUP_SECONDS + work / threads
    passed = 0
    if tokens.evaluation:
        passed += (1 + len(artifacts)) * (tokens.evaluation.tokens + answers * _ANSWER_TOKENS)
        # Reading the weights back takes as long as merging them, and they are merged again for that.
        duration += _STARTUP_SECONDS + 2 * len(artifacts) * model.parameters / (_MERGE_RATE * threads)
    if tokens.calibration:
        solved = [artifact for artifact in artifacts if artifact.needs == "hessians"]
        journeys = any(artifact.needs == "moments" for artifact in artifacts) + 2 * len(solved)
        passed += journeys * tokens.calibration.tokens
        for artifact in solved:
            duration += (
                sum(
                    tensor.elements * (tensor.shape[-1] / _SOLVE_RATE + tokens.calibration.tokens / _MOMENT_RATE)
                    for tensor in model.tensors
                    if tensor.name in artifact.calibrated
                )
                / threads
            )
    return duration + passed * model.parameters / (_FORWARD_RATE * threads) + startup
