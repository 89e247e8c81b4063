"""Reads what a model folder that came without a manifest says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.backends.recognized import Recognized
from exporter.errors import ArtifactError
from exporter.inputs.checkpoint import StoredTensor, read_header, read_json


@dataclass(frozen=True)
class ModelFolder:
    """A folder with `config.json` and tensors.

    Attributes:
        config: content of `config.json`.
        tensors: every stored tensor by its name.
        nbytes: bytes of the files that hold them.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    nbytes: int

    @classmethod
    def read(cls, folder: Path) -> ModelFolder:
        """Read the configuration and the headers of all files.

        Raises:
            ArtifactError: the folder holds no tensors.
            CheckpointError: the configuration or a header cannot be read.
        """
        config, files = read_json(folder / "config.json"), sorted(folder.glob("*.safetensors"))
        tensors = {name: one for file in files for name, one in read_header(file).items()}
        if not tensors:
            raise ArtifactError(
                str(folder), found="no safetensors file", expected="the model's weights", remedy="Check the path."
            )
        return cls(config, tensors, sum(file.stat().st_size for file in files))

    def recognized(self, quant: str, parameters: int) -> Recognized:
        """The folder as an artifact.

        Args:
            quant: its type.
            parameters: number of weights that its tensors stand for.
        """
        vocabulary = int(self.config.get("vocab_size") or 0)
        return Recognized(quant, ".", ("vllm", "transformers"), parameters, vocabulary, self.nbytes)
