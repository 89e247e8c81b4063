"""One tree of errors. Each names the thing, what was found, what was expected and what to do next.

The exit status of the command line is part of the class: 1 failed on the way, 2 refused (arguments or inputs, nothing
is left written), 3 the gate failed.
"""

from __future__ import annotations

from typing import ClassVar


class ExporterError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        thing: the tensor, key, file or argument that the error is about.
        found: what is there.
        expected: what should be there.
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
    """No server would take what was asked for."""


class DeviceUnavailableError(RefusalError):
    """The device that was asked for is not on this machine."""


class OutputExistsError(RefusalError, FileExistsError):
    """The output path exists and replacing it was not asked for."""


class OverlappingPathsError(RefusalError):
    """An input lies inside the output, or the output inside an input."""


class NotEnoughDiskError(RefusalError):
    """The file system of the output has less room than the plan needs."""


class NotEnoughMemoryError(RefusalError):
    """A step of the plan needs more memory than the machine has available."""


class OutOfMemoryError(NotEnoughMemoryError):
    """Memory ran out on the way, against the estimate; what is staged stays."""

    exit_status = 1


class StagingInUseError(RefusalError):
    """Another run is writing to the same staging folder."""


class HubError(RefusalError):
    """A hub id could not be resolved to files."""


# --- base ----------------------------------------------------------------------------------------------------------


class CheckpointError(RefusalError):
    """A checkpoint cannot be read as it is."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file that the checkpoint needs is not there: a folder, a config, a shard."""


class MissingShardError(MissingFileError):
    """The index names a shard that is not in the folder."""


class TruncatedFileError(CheckpointError):
    """A file is shorter than its own header says."""


class InvalidHeaderError(CheckpointError):
    """A safetensors header or index contradicts itself or the format."""


class UnsafePathError(CheckpointError):
    """An index names a file outside of the checkpoint's folder."""


class QuantizedBaseError(RefusalError):
    """The base is already quantized; merging into it would lose the tune."""


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
    """A merged value does not fit the type that was asked for."""


# --- adapter -------------------------------------------------------------------------------------------------------


class AdapterError(RefusalError):
    """The adapter cannot be applied to this base."""


class UnsupportedAdapterError(AdapterError):
    """The adapter uses a method that is not supported yet."""


class AdapterTargetError(AdapterError):
    """An adapter tensor has no base tensor to go to."""


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
    """A backend broke the protocol, or the library behind it failed."""


class RuntimeScoreError(ExporterError):
    """The serving runtime could not load or score the artifact: its verdict, where artifacts are verified."""


class RuntimeUnavailableError(RuntimeScoreError):
    """The runtime is not here, does not answer, or has no memory left: nothing that tells of an artifact."""


class ArtifactError(RefusalError):
    """A published artifact is not what its manifest says."""


class ReferencePackError(ArtifactError):
    """A reference pack is not what its description says, or does not belong to the artifact."""


class GateFailedError(ExporterError):
    """At least one artifact is too far from the reference."""

    exit_status = 3
