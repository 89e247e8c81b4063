"""A walk that nothing rides on: for what the trained model says, and no artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from exporter.inputs.row_blocks import DEFAULT_BLOCK_BYTES
from exporter.inputs.tensor_reader import TensorReader
from exporter.merge.device import make_merger
from exporter.merge.model import MergedModel
from exporter.tour.riders import Passengers, Settings
from exporter.tour.stream import Progress, Stream
from exporter.tour.walk.hidden_states import Group
from exporter.tour.walk.walk import Walk


@contextmanager
def lone_walk(
    model: MergedModel,
    groups: Sequence[Group],
    settings: Settings,
    *,
    on_file: Callable[[Path], None] = lambda _: None,
) -> Iterator[Walk]:
    """A walk of these windows through the trained model; its files are open for as long as the context lasts.

    Args:
        model: the merged model.
        groups: the windows, at least one group.
        settings: how to walk.
        on_file: called with each file of the base when the walk gets to it.
    """
    with ExitStack() as stack:
        merger = make_merger(settings.device, stack.enter_context(TensorReader()))
        progress = Progress(reached=on_file)
        stream = Stream(model, (), merger, threads=settings.threads, block_bytes=DEFAULT_BLOCK_BYTES, progress=progress)
        stack.callback(stream.close)
        yield Walk(
            model, stream, Passengers(), evaluation=groups[0], more=groups[1:], calibration=None, settings=settings
        )
