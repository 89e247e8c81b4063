"""Where further evaluation tokens come from while a verdict is undecided: a reference pack, or the text again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from exporter.merge.model import MergedModel
from exporter.plan.estimate import PlannedWalk
from exporter.plan.reporter import Reporter
from exporter.plan.resources import check_disk, states_budget
from exporter.recipe import Calibration, Evaluation
from exporter.reference.predictions import walk_reference
from exporter.tokens.windows import Windows, more_windows, windows_of

if TYPE_CHECKING:
    from exporter.reference.predictions import Reference


# What the names of folders for hidden states of drawn windows begin with.
_SCRATCH = "exporter-"


class MoreTokens(Protocol):
    """Where further evaluation tokens come from."""

    def draw(self, windows: int) -> Reference | None:
        """The trained model on so many further windows, or on as many as there are; None if there are no more."""


class PackTokens:
    """The windows of a reference pack, which has those that it has.

    Args:
        whole: the trained model on all of them.
        first: how many are scored first.
    """

    def __init__(self, whole: Reference, first: int) -> None:
        self._whole, self._known, self._first = whole, first, first

    @property
    def first(self) -> Reference:
        """The trained model on the windows that are scored first."""
        from exporter.reference.predictions import part_of

        return part_of(self._whole, slice(0, self._first))

    @property
    def drawn(self) -> Windows | None:
        """All that were drawn; None if none were."""
        ids = self._whole.windows.ids[self._first : self._known]
        return windows_of(ids, self._whole.windows) if ids else None

    def draw(self, windows: int) -> Reference | None:
        """See `MoreTokens`."""
        from exporter.reference.predictions import part_of

        further = slice(self._known, self._known + windows)
        if not self._whole.windows.ids[further]:
            return None
        self._known = min(further.stop, len(self._whole.windows.ids))
        return part_of(self._whole, further)


class DrawnTokens:
    """Windows of the same text that nothing was calibrated on.

    Args:
        model: the trained model.
        calibration: the text, and what was calibrated on.
        evaluation: how many windows there may be.
        first: the trained model on the windows that were scored first.
        device: where the reference's layers compute.
        reporter: told about every layer and window.
        cut: the evaluation that calibration windows were cut beside; None if nothing was calibrated on.
        threads: threads of the walk on the CPU.
        compute_dtype: what the walk computes in.
        keep: whether `reference` is wanted, for which the states of all windows are held.
        scratch: a folder for hidden states that do not stay in memory; None for one where temporary files go.
    """

    def __init__(
        self,
        model: MergedModel,
        calibration: Calibration,
        evaluation: Evaluation,
        first: Reference,
        device: str,
        reporter: Reporter,
        *,
        cut: Evaluation | None,
        threads: int,
        compute_dtype: str = "float32",
        keep: bool = False,
        scratch: Path | None = None,
    ) -> None:
        self._scratch = scratch
        self._model, self._text, self._evaluation = model, calibration, evaluation
        self._first, self._known = first, first.windows
        self._device, self._reporter, self._threads = device, reporter, threads
        self._cut, self._dtype = cut, compute_dtype
        self._left: list[tuple[int, ...]] | None = None
        self._drawn: list[tuple[int, ...]] = []
        self._keep = keep
        self._kept: list[Reference] = []

    @property
    def drawn(self) -> Windows | None:
        """All that were drawn; None if none were."""
        return windows_of(self._drawn, self._known) if self._drawn else None

    def reference(self) -> Reference:
        """The trained model on the first windows, and on all that were drawn if those were to be kept."""
        from exporter.reference.predictions import joined

        return joined(self._first, self._kept)

    def draw(self, windows: int) -> Reference | None:
        """See `MoreTokens`.

        Raises:
            ExporterError: the text cannot be read again, or the walk fails.
        """
        if self._left is None:
            self._left = more_windows(self._text, self._evaluation, self._model.tokenizer, self._known, cut=self._cut)
        taken, self._left = self._left[:windows], self._left[windows:]
        if not taken:
            return None
        self._drawn += taken
        more = windows_of(taken, self._known)
        walk = PlannedWalk.for_reference(self._model, more, self._dtype, states_budget())
        with scratch_folder(walk, self._scratch) as scratch:
            walked = walk_reference(
                self._model,
                more,
                self._device,
                self._reporter,
                threads=self._threads,
                compute_dtype=self._dtype,
                scratch=scratch,
                key=more.sha256,
                keep_bytes=walk.keep_bytes,
            )
        from exporter.reference.predictions import Reference

        # All windows share one head: of a large vocabulary, it takes more memory than their states.
        found = Reference(more, walked.hidden, self._first.head)
        if self._keep:
            self._kept.append(found)
        return found


@contextmanager
def scratch_folder(walk: PlannedWalk, parent: Path | None = None) -> Iterator[Path | None]:
    """A folder for hidden states that do not stay in memory, until the walk has ended; None where all do.

    Args:
        walk: what it takes.
        parent: where the folder is made; None for where temporary files go.

    Raises:
        NotEnoughDiskError: there is no room for them.
    """
    if not walk.spills:
        yield None
        return
    for left in parent.glob(f"{_SCRATCH}*") if parent else ():
        # Of a run that was killed.
        rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=_SCRATCH, dir=parent) as folder:
        check_disk([(Path(folder) / "states", walk.scratch_bytes)])
        yield Path(folder)
