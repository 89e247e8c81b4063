"""`report_html`: the manifest as one page. The page needs nothing else and says nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from exporter.publish.report import plots
from exporter.publish.report.figures import Figure, figures
from exporter.publish.report.nodes import CHANGE, NATS, NOTHING, PERCENT, Node, count, counted, share, shown
from exporter.publish.report.plots import Point
from exporter.publish.serving_commands import serving_commands
from exporter.units import size

REPORT_NAME = "report.html"
# From worst to best. A folder is as good as its worst artifact.
_VERDICTS = ("failed", "undecided", "skipped", "passed")
# The number of matrices that the page names with their losses.
_NAMED = 8


@dataclass(frozen=True)
class Reason:
    """A reason why an artifact did not pass.

    Attributes:
        area: scores, weights or answers.
        text: the reason in words.
    """

    area: str
    text: str


@dataclass(frozen=True)
class Plot:
    """A drawing with its title.

    Attributes:
        title: the title.
        about: how to read it.
        drawing: SVG.
    """

    title: str
    about: str
    drawing: Markup


@dataclass(frozen=True)
class Section:
    """The page's section on one artifact.

    Attributes:
        node: its place in the manifest.
        label: format and type.
        verdict: passed, failed, undecided or skipped.
        diagnosis: what is wrong with it as a whole, in a sentence; empty if nothing is.
        reasons: why it did not pass.
        figures: its figures.
        spreads: its divergences over the predictions, each with name and unit.
        plots: its plots.
        fallbacks: tensors by the wanted type and the stored type.
        losses: the largest losses of matrices that were solved for, with their inputs.
        commands: the runtimes that serve it, with their commands.
    """

    node: Node
    label: str
    verdict: str
    diagnosis: str
    reasons: list[Reason]
    figures: list[Figure]
    spreads: list[tuple[str, str, Node]]
    plots: list[Plot]
    fallbacks: dict[tuple[str, str], list[Node]]
    losses: list[tuple[str, Node, Node]]
    commands: list[tuple[str, str]]


def report_html(manifest: Mapping[str, Any], *, again: Sequence[str] | None = None) -> bytes:
    """Make the report of an output folder from its `export.json`, and from nothing else.

    Args:
        manifest: from `build_manifest`, or read from the file.
        again: notes for the reader if the folder was verified again; None for an export's report.
    """
    # In the file's form, so that both give the same page.
    root = Node(json.loads(json.dumps(manifest)))
    sections = [_section(root, artifact) for artifact in root["artifacts"]]
    verdict = min((section.verdict for section in sections), key=_VERDICTS.index)
    style = Markup(files("exporter.publish.report").joinpath("report.css").read_text(encoding="utf-8"))
    summary = _summary(sections, again=again is not None)
    page = _template().render(root=root, sections=sections, verdict=verdict, summary=summary, style=style, again=again)
    return page.encode()


# Names of the limits on a stored weight, by the keys of `nearest` in the manifest.
_MEASURES = {
    "relative_error": "Whole weight",
    "group": "Columns of a scale",
    "scale": "Scale",
    "row_mean": "Mean of a row",
    "survival": "Delta survival",
}


# The entries of a divergence in the manifest that show its spread over the predictions.
_QUANTILES = {"median": "Median", "p90": "90%", "p95": "95%", "p99": "99%", "largest": "Maximum"}


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "interval_bar": plots.interval_bar,
        "ends": _ends,
        "share": share,
        "limit": _limit,
        "measures": _MEASURES,
        "quantiles": _QUANTILES,
    }
    environment.filters |= {
        "count": lambda node: shown(node, count),
        "counted": counted,
        "size": lambda node: shown(node, size),
        "nats": lambda node: shown(node, NATS.text),
        "number": lambda node: shown(node, "{:g}".format),
        "figure": lambda figure: shown(figure.value, figure.text),
        "percent": lambda node: shown(node, PERCENT.text),
        "change": lambda node: shown(node, CHANGE.text),
    }
    return environment.from_string(
        files("exporter.publish.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )


def _summary(sections: list[Section], *, again: bool) -> str:
    """The verdict on the folder in a sentence."""
    names = {verdict: [one.label for one in sections if one.verdict == verdict] for verdict in _VERDICTS}
    if unscored := [one.label for one in sections if one.node["verification"]["not_scored"]]:
        rest = [label for label in names["failed"] if label not in unscored]
        beside = f", and {_listed(rest)} {'fails' if len(rest) == 1 else 'fail'}" if rest else ""
        end = f"do not serve {'them' if rest or len(unscored) > 1 else 'it'}" if again else "nothing was published"
        return f"{_listed(unscored)} could not be scored by what serves it{beside}: {end}."
    if broken := names["failed"]:
        of_all = f" ({len(broken)} of {len(sections)} artifacts)" if len(sections) > 1 else ""
        if again:
            verb = "is" if len(broken) == 1 else "are"
            return f"{_listed(broken)}{of_all} {verb} not the model that was trained: do not serve it."
        verb = "breaks" if len(broken) == 1 else "break"
        return f"{_listed(broken)}{of_all} {verb} a limit: nothing was published."
    if unsure := names["undecided"]:
        verb = "keeps" if len(unsure) == 1 else "keep"
        return f"What was scored does not tell whether {_listed(unsure)} {verb} every limit: nothing was published."
    if skipped := names["skipped"]:
        if again:
            return f"The files of {_listed(skipped)} hold what they should; how they are served was not looked at."
        return f"{_listed(skipped)} {'was' if len(skipped) == 1 else 'were'} written and not verified."
    return f"{_listed(names['passed'])} {'keep' if len(sections) > 1 else 'keeps'} every limit."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _section(root: Node, artifact: Node) -> Section:
    found = figures(artifact, root["evaluation"])
    verdict = artifact["verification"]["verdict"].value
    reasons = list(_reasons(artifact, verdict))
    return Section(
        artifact,
        f"{artifact['format'].value} {artifact['quant'].value}",
        verdict,
        _diagnosis(artifact, {reason.area for reason in reasons}) if verdict == "failed" else "",
        reasons,
        found,
        list(_spreads(artifact["verification"])),
        list(_plots(artifact)),
        _fallbacks(artifact),
        _losses(artifact["quantization"]),
        serving_commands(root.value, artifact.value),
    )


def _diagnosis(artifact: Node, areas: set[str]) -> str:
    """One sentence for all reasons, since a single fault may have many reasons."""
    weights = artifact["weights"]
    survival, limit = weights["survival"].value, weights["survival_limit"].value
    if survival is not None and limit is not None and abs(survival - 1) > limit:
        if abs(survival) <= limit:
            return "The weights hold next to nothing of the adapter's change, as if it had been left out."
        if abs(survival - 2) <= limit:
            return "The weights hold the adapter's change twice, as if it had been applied twice."
        return "The weights do not hold the adapter's change as it was trained."
    if "weights" in areas:
        return "The files are not what base and adapter make."
    if artifact["verification"]["not_scored"]:
        return "What serves it cannot load it, or gives no numbers."
    if "scores" in areas:
        stored = "The weights are what their type leaves, but the" if weights else "The"
        return f"{stored} predictions are farther from the trained model's than the limits allow."
    return "It predicts as the trained model does, but answers otherwise." if "answers" in areas else ""


def _reasons(artifact: Node, verdict: str) -> Iterator[Reason]:
    """Everything broken or undecided, by area, then what could decide it."""
    verification = artifact["verification"]
    areas = {area: artifact[area]["broken"].value or [] for area in ("weights", "answers")}
    areas["answers"] = [*areas["answers"], verification["not_answered"].value]
    unscored = verification["delta"].value is None and verification["not_scored"].value is None
    for text in verification["broken"].value or []:
        other = "files" if unscored else "scores"
        yield Reason(next((area for area, broken in areas.items() if text in broken), other), text)
    if verdict == "undecided":
        looks = " and ".join(map(count, verification["looks"].value))
        yield Reason("tokens", f"looked at after {looks} predictions; more may decide (--max-eval-tokens)")


# --- figures ---------------------------------------------------------------------------------------------------------


def _ends(figure: Figure) -> Markup:
    """The interval of a figure. If it follows from a standard error, it names that."""
    if figure.ends is None:
        return NOTHING
    if figure.interval:
        texts = [shown(end, figure.text) for end in figure.interval]
    else:
        pointer = figure.error.pointer if figure.error is not None else ""
        end = Markup('<data value="{}" data-end="{}" data-error-at="{}" data-value-at="{}">{}</data>')
        texts = [
            end.format(json.dumps(value), number, pointer, figure.value.pointer, figure.text(value))
            for number, value in enumerate(figure.ends)
        ]
    return Markup(" … ").join(texts)


def _limit(figure: Figure) -> Markup:
    """The limit of a figure, with its sign."""
    if figure.limit is None:
        return NOTHING
    unit = PERCENT if figure.unit is CHANGE else figure.unit
    ideal = f"{unit.short(figure.ideal)} " if figure.kind == "within" and figure.ideal else ""
    return ideal + figure.sign + shown(figure.limit, unit.limit)


def _spreads(verification: Node) -> Iterator[tuple[str, str, Node]]:
    if kl := verification["kl_divergence"]:
        yield "KL divergence", "nats", kl
    if top := verification["top_k_divergence"]:
        yield f"KL of the top {top['k'].value}", "nats", top
    if shannon := verification["jensen_shannon"]:
        yield "Jensen-Shannon", "bits", shannon


# --- plots -----------------------------------------------------------------------------------------------------------


def _plots(artifact: Node) -> Iterator[Plot]:
    title = "Bytes by tensor type"
    types = [Point(name, one["bytes"], f" · {one['share'].value:.1%}") for name, one in artifact["types"].entries()]
    yield Plot(title, "What the bytes of all tensors are spent on.", plots.bars(title, types, size))
    yield from _error_plots(artifact["weights"])
    yield from _survival_plots(artifact["weights"])
    yield from _delta_error_plots(artifact["weights"])
    profile = artifact["verification"]["profile"]
    if profile["kl_quantiles"]:
        title = "KL divergence by quantile"
        about = "Nats, logarithmic: how far the closest and the farthest predictions are."
        yield Plot(title, about, plots.quantiles(title, profile["kl_quantiles"]))
    if profile["kl_along_window"]:
        runs = [Point(str(run[0].value), run[1]) for run in profile["kl_along_window"]]
        title = "KL divergence along the window"
        about = "Mean in nats: errors that build up with the context rise to the right."
        yield Plot(title, about, plots.columns(title, runs, NATS, "scored position"))
    if profile["probability"]:
        title = "Probability of the right token"
        about = "Predictions by that probability before and after; what is on the diagonal stayed."
        yield Plot(title, about, plots.heat(title, profile["probability"]))


def _error_plots(weights: Node) -> Iterator[Plot]:
    about = "Of what is stored, against the merge in float32."
    if layers := _points(weights["layers"], "relative_error"):
        title = "Relative error by layer"
        yield Plot(title, about, plots.columns(title, layers, PERCENT, "layer"))
    kinds = _points(weights["kinds"], "relative_error")
    exact = ", ".join(point.name for point in kinds if point.number == 0)
    if lossy := [point for point in kinds if point.number != 0]:
        title = "Relative error by kind of matrix"
        yield Plot(title, f"Stored exactly: {exact}." if exact else about, plots.bars(title, lossy, PERCENT.text))


def _survival_plots(weights: Node) -> Iterator[Plot]:
    about = "Share of the adapter's change that is stored; 100% is all of it."
    layers, kinds = (_known_points(weights[part], "survival") for part in ("layers", "kinds"))
    if layers:
        title = "Delta survival by layer"
        yield Plot(title, about, plots.dots(title, layers, PERCENT, "layer", 1))
    if kinds:
        title = "Delta survival by kind of matrix"
        as_text = PERCENT.fixed(max(abs(point.value.value - 1) for point in kinds) or 1)
        yield Plot(title, about, plots.deviations(title, kinds, as_text, 1))


def _delta_error_plots(weights: Node) -> Iterator[Plot]:
    """Plots of the change's error. Survival stays at 100% however large an error is that is unrelated to the change."""
    about = "Of what is stored of the adapter's change, over that change; 100% is an error as large as it."
    layers, kinds = (_known_points(weights[part], "delta_error") for part in ("layers", "kinds"))
    if layers:
        title = "Relative error of the delta by layer"
        yield Plot(title, about, plots.columns(title, layers, PERCENT, "layer"))
    if kinds:
        title = "Relative error of the delta by kind of matrix"
        yield Plot(title, about, plots.bars(title, kinds, PERCENT.text))


def _known_points(part: Node, figure: str) -> list[Point]:
    """The points that have the figure. A layer that the adapter does not change has none."""
    return [point for point in _points(part, figure) if point.number is not None]


def _points(part: Node, figure: str) -> list[Point]:
    return [Point(name, one[figure]) for name, one in part.entries()]


# --- what degraded ---------------------------------------------------------------------------------------------------


def _fallbacks(artifact: Node) -> dict[tuple[str, str], list[Node]]:
    found: dict[tuple[str, str], list[Node]] = {}
    for tensor in artifact["tensors"]:
        if wanted := tensor["wanted"].value:
            found.setdefault((wanted, tensor["type"].value), []).append(tensor)
    return found


def _losses(quantization: Node) -> list[tuple[str, Node, Node]]:
    by_loss = sorted(quantization["losses"].entries(), key=lambda entry: -entry[1].value)
    return [(name, loss, quantization["tokens"][name]) for name, loss in by_loss[:_NAMED]]
