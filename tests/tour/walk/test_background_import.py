"""What a walk imports, beside other work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.tour.walk.background_import import walk_imported
from exporter.tour.walk.skeleton import import_code
from tests.merged import merged_model

MODULES = ("exporter.tour.walk.skeleton", "peft", "transformers.models.qwen2.modeling_qwen2")
PROGRAM = """
import sys
from exporter.tour.walk.background_import import walk_imported
from exporter.plan.open_model import open_trained
with walk_imported(open_trained(sys.argv[1], tuple(sys.argv[2:]), "model")):
    pass
print(*(name for name in {modules} if name in sys.modules))
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_all_is_imported_by_the_end(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], adapted: bool
) -> None:
    base = make_base("qwen2")
    folders = [str(base), str(make_adapter(base))][: 1 + adapted]
    command = [sys.executable, "-c", PROGRAM.format(modules=MODULES), *folders]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert found == [name for name in MODULES if adapted or name != "peft"]


def test_code_that_is_not_there_is_left_to_the_walk(make_base: Callable[..., Path]) -> None:
    model = merged_model(make_base("qwen2"))
    other = replace(model, config={"model_type": "qwen2_of_tomorrow"})
    with pytest.raises(ImportError):
        import_code(other)
    with walk_imported(other):
        pass
