"""The errors of this package. Each names the thing, what was found, what was expected and what to do next.

Each class has the exit status of the command line: 1 failed on the way; 2 refused, because arguments or inputs are
wrong, and nothing is left written; 3 the gate failed.
"""

from __future__ import annotations

from typing import ClassVar


class ExporterError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        thing: the tensor, key, file or argument that the error is about.
        found: the wrong value or state.
        expected: the right one.
        remedy: what the reader can do about it.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, thing: str, *, found: str, expected: str, remedy: str) -> None:
        self.thing = thing
        self.found = found
        self.expected = expected
        self.remedy = remedy
        super().__init__(f"{thing}: found {found}; expected {expected}. {remedy}")


class RefusalError(ExporterError, ValueError):
    """The arguments or the inputs are wrong: the run stops and leaves nothing written."""

    exit_status = 2


# --- arguments -----------------------------------------------------------------------------------------------------


class RecipeError(RefusalError):
    """The recipe or an argument does not validate."""


class UnknownFormatError(RefusalError):
    """No backend of that name is installed."""


class UnknownQuantizationError(RefusalError):
    """The backend does not know that quantization type."""


class UnservableError(RefusalError):
    """No server takes the output that was asked for."""


class DeviceUnavailableError(RefusalError):
    """This machine does not have the device that was asked for."""


class OutputExistsError(RefusalError, FileExistsError):
    """The output path exists, and the run may not replace it."""


class OverlappingPathsError(RefusalError):
    """An input lies inside the output, or the output inside an input."""


class NotEnoughDiskError(RefusalError):
    """The file system of the output has less room than the plan needs."""


class NotEnoughMemoryError(RefusalError):
    """A step of the plan needs more memory than the machine has available."""


class OutOfMemoryError(NotEnoughMemoryError):
    """Memory ran out on the way, against the estimate. The staged files stay."""

    exit_status = 1


class StagingInUseError(RefusalError):
    """Another run is writing to the same staging folder."""


class HubError(RefusalError):
    """A hub id could not be resolved to files."""


# --- base ----------------------------------------------------------------------------------------------------------


class CheckpointError(RefusalError):
    """A checkpoint cannot be read."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file or folder that the checkpoint needs is missing: a config, a shard."""


class MissingShardError(MissingFileError):
    """The index names a shard that is not in the folder."""


class TruncatedFileError(CheckpointError):
    """A file is shorter than its own header says."""


class InvalidHeaderError(CheckpointError):
    """A safetensors header or index contradicts itself or the format."""


class UnsafePathError(CheckpointError):
    """An index names a file outside of the checkpoint's folder."""


class QuantizedBaseError(RefusalError):
    """The base is already quantized. Merging into it would lose the adapter's change."""


class NonFiniteTensorError(RefusalError):
    """A tensor holds NaN or infinity."""


class UnsupportedModelError(RefusalError):
    """The backend has no family for this model."""


class TokenizerError(RefusalError):
    """The tokenizer files are missing, contradict the model, or use a pre-tokenizer that no runtime here knows."""


class MissingTensorError(RefusalError):
    """The checkpoint lacks a tensor that its configuration calls for."""


class UnexpectedTensorError(RefusalError):
    """The checkpoint has a tensor that the output format has no place for."""


class OverflowRefusedError(RefusalError, OverflowError):
    """A merged value is beyond the range of the output's type."""


# --- adapter -------------------------------------------------------------------------------------------------------


class AdapterError(RefusalError):
    """The adapter cannot be applied to this base."""


class UnsupportedAdapterError(AdapterError):
    """The adapter uses a method that is not supported yet."""


class AdapterTargetError(AdapterError):
    """The base has no tensor for a tensor of the adapter."""


class AdapterShapeError(AdapterError):
    """An adapter tensor does not fit its base tensor."""


class AdapterRankError(AdapterError):
    """A and B, or the tensors and the adapter's configuration, disagree about the rank."""


class ZeroDeltaError(AdapterError):
    """The adapter changes nothing on one of its targets."""


class ArchitectureMismatchError(AdapterError):
    """The adapter was trained for another architecture."""


# --- on the way ----------------------------------------------------------------------------------------------------


class WriteError(ExporterError, OSError):
    """Writing the output failed."""


class BackendError(ExporterError):
    """A backend broke its interface, or the library behind it failed."""


class RuntimeScoreError(ExporterError):
    """The runtime could not load or score the artifact. In verification this fails the artifact."""


class RuntimeUnavailableError(RuntimeScoreError):
    """The runtime is missing, does not answer, or is out of memory. This is not the artifact's fault."""


class ArtifactError(RefusalError):
    """A published artifact is not what its manifest says."""


class ReferencePackError(ArtifactError):
    """A reference pack is not what its description says, or does not belong to the artifact."""


class GateFailedError(ExporterError):
    """At least one artifact is too far from the reference."""

    exit_status = 3
