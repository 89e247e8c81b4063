"""Makes a recipe, an evaluation and an execution from the options of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import RecipeError

if TYPE_CHECKING:
    from exporter.recipe import Evaluation, Execution, Recipe, ReferenceRecipe


def arguments_of(values: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that make a recipe from a command's locals."""
    names = (
        "recipe_file", "base", "adapter", "format_", "quant", "out", "name", "calibration", "calibration_tokens",
        "window", "seed", "eval_tokens", "max_eval_tokens", "eval_window", "gate", "no_verify", "no_answers", "force",
        "max_shard_size", "option", "imatrix", "force_unservable", "compute_dtype", "keep_reference", "reference_dtype",
    )  # fmt: skip
    return {name: values[name] for name in names}


def recipe_from(
    recipe_file: Path | None,
    base: str | None,
    adapter: list[str] | None,
    format_: str | None,
    quant: list[str] | None,
    out: Path | None,
    name: str | None,
    calibration: str | None,
    calibration_tokens: int | None,
    window: int | None,
    seed: int | None,
    eval_tokens: int | None,
    max_eval_tokens: int | None,
    eval_window: int | None,
    gate: list[str] | None,
    no_verify: bool,
    no_answers: bool,
    force: bool,
    max_shard_size: str | None,
    option: list[str] | None,
    imatrix: str | None,
    force_unservable: bool,
    compute_dtype: str | None,
    keep_reference: bool,
    reference_dtype: str | None,
) -> Recipe:
    """Make a recipe from a file or from options.

    Raises:
        RecipeError: both are given, or an option that is needed is not.
    """
    from exporter.recipe import Recipe

    if recipe_file is not None:
        given = (
            base, adapter, format_, quant, out, name, calibration, calibration_tokens, window, seed, eval_tokens,
            max_eval_tokens, eval_window, gate, max_shard_size, option, imatrix, compute_dtype, reference_dtype,
        )  # fmt: skip
        if force_unservable or any(value is not None and value != [] for value in given):
            raise RecipeError(
                str(recipe_file),
                found="a recipe file together with options",
                expected="a recipe file alone (it takes only --force, --no-verify, --no-answers and --keep-reference)",
                remedy="Put the options into the recipe.",
            )
        recipe = Recipe.load(recipe_file)
        update: dict[str, Any] = {
            "force": recipe.force or force,
            "verify": recipe.verify and not no_verify,
            "keep_reference": recipe.keep_reference or keep_reference,
        }
        if no_answers:
            update["evaluation"] = recipe.evaluation.model_copy(update={"answers": False})
        return recipe.model_copy(update=update)
    for flag, value in (("--base", base), ("--format", format_), ("--out", out)):
        if value is None:
            raise RecipeError(flag, found="nothing", expected="a value", remedy="See `exporter export --help`.")
    options = dict(_pair(text, "--option") for text in option or [])
    if max_shard_size is not None:
        options["max_shard_size"] = max_shard_size
    if imatrix is not None:
        options["imatrix"] = imatrix
    if force_unservable:
        options["force_unservable"] = "true"
    return Recipe.build(
        {
            "base": base,
            "adapters": adapter or (),
            "outputs": [{"format": format_, "quant": quant or (), "out": out, "options": options}],
            "name": name,
            "verify": not no_verify,
            "force": force,
            "keep_reference": keep_reference,
            **_given(compute_dtype=compute_dtype, reference_dtype=reference_dtype),
            "calibration": _given(text=calibration, tokens=calibration_tokens, window=window, seed=seed),
            "evaluation": _evaluation(eval_tokens, max_eval_tokens, eval_window, gate, no_answers),
        }
    )


def reference_recipe_from(
    base: str | None,
    adapter: list[str] | None,
    out: Path | None,
    name: str | None,
    calibration: str | None,
    eval_tokens: int | None,
    max_eval_tokens: int | None,
    eval_window: int | None,
    no_answers: bool,
    force: bool,
    compute_dtype: str | None,
    reference_dtype: str | None,
) -> ReferenceRecipe:
    """Make the recipe of a reference pack from options.

    Raises:
        RecipeError: an option that is needed is not given, or a value is wrong.
    """
    from exporter.recipe import ReferenceRecipe

    for flag, value in (("--base", base), ("--out", out)):
        if value is None:
            raise RecipeError(flag, found="nothing", expected="a value", remedy="See `exporter reference --help`.")
    return ReferenceRecipe.build(
        {
            "base": base,
            "adapters": adapter or (),
            "out": out,
            "name": name,
            "force": force,
            **_given(compute_dtype=compute_dtype, reference_dtype=reference_dtype),
            "calibration": _given(text=calibration),
            "evaluation": _given(
                tokens=eval_tokens, max_tokens=max_eval_tokens, n_ctx=eval_window, answers=not no_answers
            ),
        }
    )


def check_files_only(**others: Any) -> None:
    """Check that no option of scoring is beside `--files-only`, which scores nothing.

    Args:
        others: the options of scoring, by name.

    Raises:
        RecipeError: there is one.
    """
    given = _options_of(others)
    if given:
        raise RecipeError(
            "--files-only", found=f"{given} together with it", expected="no option of scoring, as nothing is scored",
            remedy=f"Leave out {given}, or --files-only.",
        )  # fmt: skip


def _options_of(values: dict[str, Any]) -> str:
    """The options that were given, as a user writes them."""
    return " ".join(f"--{name.replace('_', '-')}" for name, value in values.items() if value not in (None, [], False))


def check_verify_options(reference: Path | None, **others: Any) -> None:
    """Check that there is either a reference pack or a base, and not both.

    Args:
        reference: the pack, or None.
        others: by name, the options that the pack replaces or that have no effect with it.

    Raises:
        RecipeError: both are given, or neither.
    """
    if reference is None:
        if others["base"] is None:
            raise RecipeError(
                "--base", found="nothing", expected="--base with --adapter, or --reference",
                remedy="Give the base and adapter, or a reference pack, to judge the artifact by.",
            )  # fmt: skip
        return
    given = _options_of(others)
    if given:
        raise RecipeError(
            f"--reference {reference}", found=f"{given} together with it",
            expected="the pack alone, which has the tokens to score and the prompts", remedy=f"Leave out {given}.",
        )  # fmt: skip


def check_plot_file(file: Path | None) -> None:
    """Check that a plot's file ends in .svg or .html.

    Raises:
        RecipeError: it does not.
    """
    if file is not None and file.suffix not in (".svg", ".html"):
        raise RecipeError(
            "--out", found=repr(file.name), expected="a file that ends in .svg or .html", remedy="Correct its name."
        )


def _given(**values: Any) -> dict[str, Any]:
    """The values that were given. The recipe has defaults for the others."""
    return {key: value for key, value in values.items() if value is not None}


def _evaluation(
    eval_tokens: int | None,
    max_eval_tokens: int | None,
    eval_window: int | None,
    gate: list[str] | None,
    no_answers: bool,
) -> dict[str, Any]:
    return _given(
        tokens=eval_tokens,
        max_tokens=max_eval_tokens,
        n_ctx=eval_window,
        gate=_gates(gate or []),
        answers=not no_answers,
    )


def evaluation_from(
    eval_tokens: int | None,
    max_eval_tokens: int | None,
    eval_window: int | None,
    gate: list[str] | None,
    no_answers: bool = False,
) -> Evaluation:
    """Make the evaluation from options.

    Raises:
        RecipeError: a value is out of range.
    """
    from pydantic import ValidationError

    from exporter.recipe import Evaluation

    try:
        return Evaluation.model_validate(_evaluation(eval_tokens, max_eval_tokens, eval_window, gate, no_answers))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            str(first["loc"][0]), found=repr(first.get("input")), expected=first["msg"], remedy="Correct the option."
        ) from None


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise RecipeError(flag, found=repr(text), expected="KEY=VALUE", remedy="Correct the option.")
    return key, value


def _gates(texts: list[str]) -> dict[str, Any]:
    """Limits by type from `TYPE=0.05` and `TYPE:kl=0.1`, or for all types from `0.05`."""
    gates: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for text in texts:
        key, value = _pair(text, "--gate") if "=" in text else ("*", text)
        kind, _, name = key.partition(":")
        # Upper and lower case are the same, as in --quant.
        kind = spelled.setdefault(kind.lower(), kind)
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if not 0 <= limit < float("inf") or name not in ("", "change", "kl", "top_k_kl", "same_top"):
            raise RecipeError(
                "--gate", found=repr(text),
                expected="TYPE=0.05, 0.05, or TYPE:change, TYPE:kl, TYPE:top_k_kl or TYPE:same_top=0.05",
                remedy="Correct the limit.",
            )  # fmt: skip
        known = gates.get(kind, {})
        if isinstance(known, float) or name in known or (known and not name):
            raise RecipeError(
                "--gate", found=f"two values for {kind}", expected="one limit, or several by name, each once",
                remedy="Leave one out.",
            )  # fmt: skip
        gates[kind] = {**known, name: limit} if name else limit
    return gates


def execution_from(device: str, threads: int | None, runtime: str | None, endpoint: str | None) -> Execution:
    """Make the execution from options.

    Raises:
        RecipeError: a value is out of range.
    """
    from pydantic import ValidationError

    from exporter.recipe import Execution

    try:
        return Execution(device=device, threads=threads, runtime=runtime, endpoint=endpoint)
    except ValidationError as error:
        first = error.errors()[0]
        wanted = {"device": "auto, cpu, cuda or cuda:N", "endpoint": "an address such as http://localhost:8000"}
        name = str(first["loc"][0])
        raise RecipeError(
            f"--{name}",
            found=repr(first.get("input")),
            expected=wanted.get(name, first["msg"]),
            remedy="Correct the option.",
        ) from None
