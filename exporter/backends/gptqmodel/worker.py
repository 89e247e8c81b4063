"""Runs GPTQModel on a model folder: `python -I worker.py JOB.json`. Imports nothing of this package.

In a process of its own, so that its memory is given back, and what importing it does to a process stays there.
The job: `model` and `target` (folders), `windows` (token ids), `quantize` (arguments of QuantizeConfig),
`max_shard_bytes`, `device` (`cpu` or `cuda`) and `threads`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(job_file: Path) -> None:
    """Quantize, and save."""
    job = json.loads(job_file.read_text("utf-8"))
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.set_num_threads(job["threads"])
    windows = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        for ids in job["windows"]
    ]
    model = GPTQModel.load(job["model"], QuantizeConfig(**job["quantize"], device=job["device"]))
    # Whatever their length, windows are not to be joined, padded or left out: one at a time, as they are.
    model.quantize(windows, batch_size=1, calibration_data_min_length=1)
    model.save(job["target"], max_shard_size=job["max_shard_bytes"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
