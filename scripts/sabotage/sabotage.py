"""Break artifacts on purpose and see that verification says so, and that it passes sound ones.

    python -m scripts.sabotage.sabotage --base DIR --adapter DIR --work DIR [--formats gguf …] [--types Q4_K_M …]
        [--only "adapter left" …] [--serve] [--all-types] [--fast] [--calibration-tokens N] [--json FILE]
        [--report DIR] [--by-reference]
    python -m scripts.sabotage.sabotage --show FILE …     # the tables of results that --json wrote; of a case, the last

Makes every fault of scripts/sabotage/faults.py in a copy of an artifact, then makes the copy's manifest fit: this tests
what stands between a faulty exporter and its user, and not the hashes. The checksums that weights had when they were
encoded are left out of the manifest too, unless the fault comes after the encoder. `exporter verify` must fail it
(status 3) or refuse it (2), with a reason; a run that ends in an error (1) has judged nothing.
With `--fast` it compares files first (`--files-only`), and scores only the faults that this passes and the sound
artifacts of the inputs that were given.
Prints two tables, of faults and of sound artifacts; exit status 1 if a fault is missed or a sound artifact fails.
`--report` keeps each report. With `--by-reference` artifacts are held against a reference pack in place of base and
adapter, which does not know the values of the weights: what it misses, it cannot see.
Folders are scored by transformers, which needs `make gptqmodel` for GPTQ; with `--serve` by vLLM (`make serve-env`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from exporter.artifact.file_records import MANIFEST_NAME
from exporter.runtimes.vllm.runtime import ENVIRONMENT
from scripts.measurements.quality import outputs_of
from scripts.sabotage.damage import Damaged
from scripts.sabotage.faults import FAULTS, FORMATS, Fault, swap_shard
from scripts.sabotage.inputs import Inputs, inputs_of
from scripts.sabotage.statements import NotApplicableError
from scripts.tables import write_json

TYPES = {"gguf": ("Q8_0", "Q4_K_M"), "safetensors": ("bf16",), "gptq": ("gptq-int4-g128",)}
# What `exporter` prints before the thing that is wrong.
_WORDS = ("refused  ", "failed  ", "failed the gate  ")
_LONGEST = 150
_MOST = re.compile(r", columns? [\w ]+ the most;")


@dataclass(frozen=True)
class Verdict:
    """What `exporter verify` said of an artifact.

    Attributes:
        fault: what is wrong with it; None if it is sound.
        type: its format and type.
        status: exit status.
        reasons: why it was failed or refused.
        seconds: how long that took.
    """

    fault: Fault | None
    type: str
    status: int
    reasons: tuple[str, ...]
    seconds: float

    @property
    def caught(self) -> bool:
        """Whether it was failed or refused, with a reason for each of its parts."""
        return self.status in (2, 3) and bool(self.reasons) and self.named == len(self._parts)

    @property
    def named(self) -> int:
        """How many of the fault's parts a reason names."""
        return sum(any(f".{part}.weight" in reason for reason in self.reasons) for part in self._parts)

    @property
    def _parts(self) -> tuple[str, ...]:
        return self.fault.parts if self.fault else ()

    @property
    def right(self) -> bool:
        """Whether that is as it should be."""
        return self.status == 0 if self.fault is None else self.caught

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verdict:
        """One of a file of results."""
        fault = next((one for one in FAULTS if one.name == values["fault"]), None)
        if fault is None and values["fault"] is not None:
            raise ValueError(f"{values['fault']} is no fault of scripts/sabotage/faults.py")
        return cls(fault, values["type"], values["status"], tuple(values["reasons"]), values["seconds"])

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        return {
            "fault": self.fault.name if self.fault else None,
            "type": self.type,
            "status": self.status,
            "reasons": list(self.reasons),
            "seconds": round(self.seconds, 1),
        }


# --- the exporter ----------------------------------------------------------------------------------------------------


def exporter(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "exporter", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def reasons_of(done: subprocess.CompletedProcess[str]) -> tuple[str, ...]:
    """Why an artifact was failed or refused; nothing if it was not, or in no words."""
    if "Traceback" in done.stderr:
        return ()
    if done.returncode == 3:
        return tuple(reason for verdict in json.loads(done.stdout).values() for reason in verdict["broken"])
    lines = done.stderr.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(_WORDS):
            found = [after.split(None, 1)[1] for after in lines[number + 1 :] if after.startswith("  found ")]
            return (": ".join([line.split("  ", 1)[1], *found[:1]]),)
    return ()


@dataclass(frozen=True)
class How:
    """How artifacts are verified.

    Attributes:
        fast: their files are compared first, and they are scored only if that finds nothing.
        scored: whether they are scored then.
        reports: where reports are kept; None for nowhere.
        packs: where the reference packs are that they are held against, a folder for each inputs; None if they are held
            against base and adapters.
    """

    fast: bool = False
    scored: bool = True
    reports: Path | None = None
    packs: Path | None = None


def source_of(inputs: Inputs) -> list[str | Path]:
    """Base and adapters as options."""
    return ["--base", inputs.base, *(part for adapter in inputs.adapters for part in ("--adapter", adapter))]


def pack_of(inputs: Inputs, packs: Path) -> Path:
    """The reference pack of inputs, made when it is first asked for."""
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]
    if not (packs / key).is_dir():
        done = exporter("reference", *source_of(inputs), "--out", packs / key, "--quiet")
        if done.returncode:
            raise RuntimeError(f"a reference pack failed:\n{done.stderr}")
    return packs / key


def verify(damaged: Damaged, inputs: Inputs, fault: Fault | None, type_: str, how: How) -> Verdict:
    """Hold an artifact against what it should be."""
    damaged.publish(checksums=fault is None or fault.after_encoding)
    source = ["--reference", pack_of(inputs, how.packs)] if how.packs else source_of(inputs)
    command: tuple[str | Path, ...] = ("verify", damaged.folder, *source, "--json")
    if how.reports is not None:
        name = re.sub(r"\W+", "-", f"{type_} {fault.name if fault else 'sound'}")
        command += ("--report", how.reports / f"{name}.html", "--force")
    started = time.monotonic()
    done = exporter(*command, *(["--files-only"] if how.fast else []))
    if how.fast and done.returncode == 0 and how.scored:
        done = exporter(*command)
    if "damaged after publishing" in done.stderr:
        raise RuntimeError(f"the manifest of {damaged.folder} does not fit its files:\n{done.stderr}")
    if "Traceback" in done.stderr or (done.returncode and not reasons_of(done)):
        print(done.stderr, file=sys.stderr)
    return Verdict(fault, type_, done.returncode, reasons_of(done), time.monotonic() - started)


class Exports:
    """Sound exports of several inputs, each made once.

    Args:
        work: the folder that they are made in.
        calibration_tokens: what types are calibrated on that need it; None for the default.
    """

    def __init__(self, work: Path, calibration_tokens: int | None) -> None:
        self._work, self._calibration_tokens = work, calibration_tokens
        self._made: dict[tuple[Inputs, str, str], Path] = {}

    def make(self, wanted: Iterable[tuple[Inputs, str, str]]) -> None:
        """Export types of inputs, all those of the same inputs in one tour."""
        by_inputs: dict[Inputs, list[tuple[str, str]]] = {}
        for inputs, format_, quant in dict.fromkeys(wanted):
            by_inputs.setdefault(inputs, []).append((format_, quant))
        for number, (inputs, types) in enumerate(by_inputs.items()):
            folders = {one: self._work / f"export-{number}-{one[0]}-{one[1]}" for one in types}
            outputs = [
                {"format": format_, "quant": [quant], "out": str(folders[format_, quant])}
                | _options(format_, quant, inputs)
                for format_, quant in types
            ]
            export(inputs, outputs, self._work, verified=False, calibration_tokens=self._calibration_tokens)
            self._made |= {(inputs, *one): folder for one, folder in folders.items()}

    def folder(self, inputs: Inputs, format_: str, quant: str) -> Path:
        """One that was made."""
        return self._made[inputs, format_, quant]


def _options(format_: str, quant: str, inputs: Inputs) -> dict[str, Any]:
    """As exports are made that are verified; and folders in four files."""
    if format_ == "gguf":
        return {"options": {"imatrix": "auto"}} if "K" in quant else {}
    size = sum(file.stat().st_size for file in inputs.base.glob("*.safetensors"))
    return {"options": {"max_shard_size": size // 4}}


def export(
    inputs: Inputs,
    outputs: Sequence[Mapping[str, Any]],
    work: Path,
    *,
    verified: bool,
    calibration_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Export; returns the artifacts of all manifests."""
    recipe = {
        "base": str(inputs.base),
        "adapters": list(map(str, inputs.adapters)),
        "outputs": list(outputs),
        "name": "sabotage",
        "verify": verified,
        "force": True,
    }
    if calibration_tokens:
        recipe["calibration"] = {"tokens": calibration_tokens}
    file = work / "sabotage.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = exporter("export", file, "--json")
    if done.returncode not in (0, 3):
        raise RuntimeError(f"an export failed:\n{done.stderr}")
    found = json.loads(done.stdout)
    return [
        artifact for manifest in (found if isinstance(found, list) else [found]) for artifact in manifest["artifacts"]
    ]


# --- both suites -----------------------------------------------------------------------------------------------------


def sabotage(
    faults: Sequence[Fault],
    types: Sequence[tuple[str, str]],
    known: Mapping[str, Inputs],
    work: Path,
    how: How,
    calibration_tokens: int | None = None,
) -> list[Verdict]:
    """Verify every sound artifact that a fault is made in, unchanged, and then every fault."""
    cases = [(fault, format_, quant) for format_, quant in types for fault in faults if fault.fits(format_, quant)]
    sound = dict.fromkeys((known[fault.judged], format_, quant) for fault, format_, quant in cases)
    exports = Exports(work, calibration_tokens)
    exports.make([*sound, *((known[fault.made], format_, fault.quant or quant) for fault, format_, quant in cases)])
    verdicts = []
    for inputs, format_, quant in sound:
        name = next(name for name, one in known.items() if one == inputs)
        folder = exports.folder(inputs, format_, quant)
        scored = name == "sound" or not how.fast
        label = f"{format_} {quant}" + ("" if name == "sound" else f", {name}") + ("" if scored else ", by files alone")
        verdicts.append(case(None, label, folder, folder, folder, inputs, work, replace(how, scored=scored)))
    for fault, format_, quant in cases:
        target = exports.folder(known[fault.judged], format_, quant)
        source = exports.folder(known[fault.made], format_, fault.quant or quant)
        files = target if fault.shard is not None else source
        try:
            label = f"{format_} {quant}"
            judged = known[fault.judged]
            verdicts.append(case(fault, label, files, source, target, judged, work, how))
        except NotApplicableError as error:
            print(f"left out: {fault.name} in {format_} {quant}: {error}", file=sys.stderr)
    return verdicts


def case(
    fault: Fault | None,
    type_: str,
    files: Path,
    source: Path,
    target: Path,
    inputs: Inputs,
    work: Path,
    how: How,
) -> Verdict:
    """One artifact: copied, damaged, verified and removed.

    Args:
        fault: what to do to it; nothing if None.
        type_: its format and type.
        files: the folder that is copied.
        source: where a single file of another run is taken from.
        target: the sound artifact that it is passed off as.
        inputs: what it is held against.
        work: where it lies meanwhile.
        how: how it is verified.
    """
    manifest = json.loads((target / MANIFEST_NAME).read_text("utf-8"))
    config = json.loads((inputs.base / "config.json").read_text("utf-8"))
    folder = work / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        damaged = Damaged(files, manifest, folder, config)
        if fault is not None:
            if fault.shard is not None:
                swap_shard(damaged, fault.shard, source)
            fault.apply(damaged)
        verdict = verify(damaged, inputs, fault, type_, how)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    word = "" if verdict.right else "  <---"
    name = fault.name if fault else "sound"
    reason = verdict.reasons[0] if verdict.reasons else "passed"
    print(f"{verdict.seconds:6.1f} s  {type_}: {name}: {reason}{word}", file=sys.stderr, flush=True)
    return verdict


def every_type(formats: Sequence[str], inputs: Inputs, work: Path) -> list[Verdict]:
    """Export and verify all types of formats."""
    verdicts = []
    for format_ in formats:
        for output in outputs_of(format_, None, work):
            started = time.monotonic()
            artifacts = export(inputs, [output], work, verified=True)
            seconds = (time.monotonic() - started) / len(artifacts)
            for one in artifacts:
                broken = tuple(one["verification"]["broken"])
                label = f"{one['format']} {one['quant']}"
                print(f"{seconds:6.1f} s  {label}: sound: {broken or 'passed'}", file=sys.stderr, flush=True)
                verdicts.append(Verdict(None, label, 3 if broken else 0, broken, seconds))
            for folder in (Path(output["out"]), Path(f"{output['out']}.rejected")):
                shutil.rmtree(folder, ignore_errors=True)
    return verdicts


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(verdicts: Sequence[Verdict]) -> str:
    """Both, in Markdown: a row a fault and a column a type; and a row a format of the sound ones."""
    faulty = {(one.fault, one.type): one for one in verdicts if one.fault}
    types = list(dict.fromkeys(type_ for _, type_ in faulty))
    lines = [_row("fault", *types, "by what"), _row(*["---"] * (len(types) + 2))]
    for fault in FAULTS:
        found = [faulty.get((fault, type_)) for type_ in types]
        if not any(found):
            continue
        first = next((one.reasons[0] for one in found if one and one.reasons), "")
        # Where in the tensor is in the list of all reasons: the row has room for what and by how much.
        first = _MOST.sub(",", first)
        reason = first if len(first) <= _LONGEST else f"{first[:_LONGEST]}…"
        lines.append(_row(fault.name, *map(_word, found), reason))
    lines += ["", _row("sound artifacts", "passed", "wrongly failed"), _row(*["---"] * 3)]
    sound: dict[str, dict[str, Verdict]] = {}
    for one in verdicts:
        if one.fault is None:
            format_, rest = one.type.split(" ", 1)
            quant, *inputs = rest.split(", ", 1)
            sound.setdefault(", ".join([format_, *inputs]), {})[quant] = one
    for name, by_type in sound.items():
        passed = " ".join(quant for quant, one in by_type.items() if one.right)
        failed = [f"{quant}: {'; '.join(one.reasons)}" for quant, one in by_type.items() if not one.right]
        lines.append(_row(name, passed, ". ".join(failed)))
    return "\n".join(lines)


def _word(verdict: Verdict | None) -> str:
    """What became of a fault. Of several bits, each in a matrix of its own, how many were named if not all were."""
    if verdict is None:
        return ""
    if verdict.caught:
        return "caught"
    return f"**caught in part ({verdict.named})**" if verdict.named else "**missed**"


def _row(*cells: str) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("\n", " ")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path, action="append")
    parser.add_argument("--work", type=Path, help="a folder for inputs and artifacts; they are removed")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--types", nargs="+", help="types to make faults in; by default one or two of each format")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults whose names contain one of these")
    parser.add_argument("--serve", action="store_true", help="score folders in vLLM, where that serves them")
    parser.add_argument("--all-types", action="store_true", help="export and verify every type of the formats, too")
    parser.add_argument("--fast", action="store_true", help="compare files first, and score what that passes")
    parser.add_argument("--calibration-tokens", type=int, help="for types that are calibrated; faults need few")
    parser.add_argument("--json", type=Path, help="write all verdicts with all reasons here")
    parser.add_argument("--report", type=Path, metavar="DIR", help="keep the report of each verification there")
    parser.add_argument("--by-reference", action="store_true", help="hold artifacts against a reference pack")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="run nothing: the tables of these results")
    arguments = parser.parse_args()
    if arguments.show:
        return report(Verdict.from_json(one) for file in arguments.show for one in json.loads(file.read_text("utf-8")))
    if not (arguments.base and arguments.adapter and arguments.work):
        parser.error("--base, --adapter and --work are needed")
    if arguments.fast and arguments.by_reference:
        parser.error("--fast compares files with base and adapter, and --by-reference does without")
    faults = [fault for fault in FAULTS if not arguments.only or any(name in fault.name for name in arguments.only)]
    types = [
        (format_, quant)
        for format_ in arguments.formats
        for quant in TYPES[format_]
        if not arguments.types or quant in arguments.types
    ]
    if not arguments.serve:
        os.environ[ENVIRONMENT] = ""
    reports = arguments.report.absolute() if arguments.report else None
    if reports is not None:
        reports.mkdir(parents=True, exist_ok=True)
    work = arguments.work.absolute() / "sabotage"
    work.mkdir(parents=True)
    try:
        names = {name for fault in faults for name in (fault.made, fault.judged)}
        sound = Inputs(arguments.base.absolute(), tuple(adapter.absolute() for adapter in arguments.adapter))
        verdicts = sabotage(
            faults,
            types,
            inputs_of(sound, names, work),
            work,
            How(arguments.fast, reports=reports, packs=work if arguments.by_reference else None),
            arguments.calibration_tokens,
        )
        if arguments.all_types:
            verdicts += every_type(arguments.formats, sound, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_json(arguments.json, [one.as_json() for one in verdicts])
    return report(verdicts)


def report(verdicts: Iterable[Verdict]) -> int:
    """Print the tables, of each case its last verdict; the exit status."""
    last = list({(one.fault, one.type): one for one in verdicts}.values())
    print(tables(last))
    wrong = [one for one in last if not one.right]
    print(f"\n{len(last)} artifacts, {len(wrong)} judged wrongly")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
