"""Cuts a text into evaluation and calibration windows that share no token. Every runtime gets the same ids."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.errors import RecipeError, TokenizerError
from exporter.inputs.tokenizer import TokenizerFiles, load_encoder
from exporter.recipe import Calibration, Evaluation
from exporter.tokens.texts import read_beginnings

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Windows:
    """Token windows to score, by llama-perplexity's protocol.

    The text is tokenized once and cut into windows that do not overlap; the remainder is dropped and nothing is carried
    from one window to the next. In each window the predictions of positions n_ctx/2 + 1 … n_ctx - 1 are scored
    (tools/perplexity/perplexity.cpp in llama.cpp).

    Attributes:
        ids: the windows, each a tuple of n_ctx token ids.
        n_ctx: tokens in a window.
        source: file name of the text, the dataset's id, or `embedded`.
        sha256: hash of the ids as little-endian 32-bit integers.
    """

    ids: tuple[tuple[int, ...], ...]
    n_ctx: int
    source: str
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return len(self.ids) * self.n_ctx

    @property
    def first_scored(self) -> int:
        """Index of the first position whose prediction is scored: the token at this index + 1 is the target."""
        return self.n_ctx // 2

    @property
    def scored(self) -> int:
        """Scored predictions in a window."""
        return self.n_ctx - 1 - self.first_scored

    @property
    def tokens_scored(self) -> int:
        """Scored predictions in all."""
        return len(self.ids) * self.scored


@dataclass(frozen=True)
class CalibrationWindows:
    """Token windows for activation statistics. None of their tokens is scored.

    Attributes:
        ids: the windows, each a tuple of `window` token ids, in the order of the text.
        window: tokens in a window.
        source: as in `Windows`.
        seed: decided which windows were taken.
        sha256: hash of the ids as little-endian 32-bit integers.
    """

    ids: tuple[tuple[int, ...], ...]
    window: int
    source: str
    seed: int
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return len(self.ids) * self.window


@dataclass(frozen=True)
class TokenSets:
    """Both token sets of a run. Each is None if nothing needs it."""

    evaluation: Windows | None
    calibration: CalibrationWindows | None


def make_token_sets(
    recipe_calibration: Calibration,
    evaluation: Evaluation,
    tokenizer: TokenizerFiles,
    *,
    evaluate: bool,
    calibrate: bool,
) -> TokenSets:
    """Read and tokenize the text once, and cut it.

    Raises:
        MissingFileError, RecipeError: the text cannot be read, or is too short.
        TokenizerError: the tokenizer cannot be loaded.
    """
    if not evaluate and not calibrate:
        return TokenSets(None, None)
    ids = _read(recipe_calibration, evaluation, tokenizer, calibrate=calibrate)
    return cut_token_sets(ids, recipe_calibration, evaluation, evaluate=evaluate, calibrate=calibrate)


def more_windows(
    recipe_calibration: Calibration,
    evaluation: Evaluation,
    tokenizer: TokenizerFiles,
    known: Windows,
    *,
    cut: Evaluation | None,
) -> list[tuple[int, ...]]:
    """The windows that may be drawn after the known evaluation windows, in the order of the text.

    None of them has a token of the calibration windows, if there were any.

    Args:
        recipe_calibration: the text, and the tokens that were calibrated on.
        evaluation: the largest number of tokens.
        tokenizer: the trained model's.
        known: the windows that were scored so far, from the text's beginning on.
        cut: the evaluation in whose run the calibration windows were cut; None if there were none.

    Raises:
        MissingFileError, RecipeError, TokenizerError: the text cannot be read.
    """
    limit = max(evaluation.max_tokens, evaluation.tokens) // evaluation.n_ctx
    if limit <= len(known.ids):
        return []
    scored = set(known.ids)
    found = _uncalibrated(recipe_calibration, tokenizer, cut, evaluation.n_ctx, limit)
    return [window for window in found if window not in scored]


def most_windows(evaluation: Evaluation, known: Windows) -> int:
    """The largest number of windows after drawing more, with those that are known from the text's beginning on.

    It is the number of these alone if the text ended before there were as many as asked for."""
    if known.tokens < evaluation_tokens(evaluation):
        return len(known.ids)
    return max(len(known.ids), evaluation.max_tokens // evaluation.n_ctx)


def check_decidable(known: Windows, further: int = 0) -> None:
    """Check that there can be two windows. One window has no interval, so nothing passes on it.

    Args:
        known: the evaluation windows.
        further: how many more may be drawn.

    Raises:
        RecipeError: there cannot.
    """
    if len(known.ids) + further < 2:
        raise RecipeError(
            f"evaluation text {known.source}",
            found=f"one window of {known.n_ctx} tokens, which has no interval, so that nothing can pass",
            expected=f"at least {2 * known.n_ctx} tokens, two windows",
            remedy="Raise --eval-tokens or --max-eval-tokens, or give a longer text with --calibration.",
        )


def check_drawable(
    recipe_calibration: Calibration,
    evaluation: Evaluation,
    tokenizer: TokenizerFiles,
    known: Windows,
    *,
    cut: Evaluation | None,
) -> None:
    """`check_decidable` with the windows that may be drawn; arguments as in `more_windows`. Reads text for one only."""
    if len(known.ids) == 1:
        check_decidable(known, len(more_windows(recipe_calibration, evaluation, tokenizer, known, cut=cut)))


def _uncalibrated(
    recipe_calibration: Calibration, tokenizer: TokenizerFiles, cut: Evaluation | None, size: int, limit: int
) -> list[tuple[int, ...]]:
    """The first windows of so many tokens that share none with the calibration windows, in the order of the text."""
    ids: list[int] = []
    taken: list[int] = []
    if cut is not None:
        # Read as much text as that run did: its length decides which windows were taken.
        ids = _read(recipe_calibration, cut, tokenizer, calibrate=True)
        _check_length(ids, recipe_calibration, cut)
        taken = _calibration_places(len(ids), recipe_calibration, cut)
    places = _free_places(len(ids), size, taken, recipe_calibration.window)
    if len(places) < limit:
        # Less than a window may be left over beside a taken one.
        needed = limit * size + len(taken) * (recipe_calibration.window + size)
        ids = _enough(recipe_calibration, tokenizer, needed)
        places = _free_places(len(ids), size, taken, recipe_calibration.window)
    return [tuple(ids[place : place + size]) for place in places[:limit]]


def _free_places(length: int, size: int, taken: Sequence[int], taken_size: int) -> list[int]:
    """The first token of each window between the taken ones, which are in order."""
    places: list[int] = []
    start = 0
    for end in [*taken, length]:
        places += range(start, end - size + 1, size)
        start = end + taken_size
    return places


def windows_of(ids: Sequence[tuple[int, ...]], like: Windows) -> Windows:
    """More windows of the same text and size as others."""
    return Windows(tuple(ids), like.n_ctx, like.source, _sha256(ids))


def _read(
    recipe_calibration: Calibration, evaluation: Evaluation, tokenizer: TokenizerFiles, *, calibrate: bool
) -> list[int]:
    """Token ids of as much text as both sets need."""
    needed = evaluation_tokens(evaluation) + (calibration_tokens(recipe_calibration) if calibrate else 0)
    return _enough(recipe_calibration, tokenizer, needed)


def _enough(recipe_calibration: Calibration, tokenizer: TokenizerFiles, needed: int) -> list[int]:
    """Token ids of a beginning of the text that has so many, or of the whole text."""
    ids: list[int] = []
    for text in read_beginnings(recipe_calibration, tokenizer, needed):
        ids = tokenize(text, tokenizer)
        if len(ids) >= needed:
            break
    return ids


def make_windows(
    recipe_calibration: Calibration, evaluation: Evaluation, tokenizer: TokenizerFiles, *, cut: Evaluation | None = None
) -> Windows:
    """The evaluation windows alone, the same ones that `make_token_sets` gives.

    Args:
        recipe_calibration: the text, and what was calibrated on.
        evaluation: the tokens to score.
        tokenizer: the trained model's.
        cut: the evaluation in whose run calibration windows were cut; none of their tokens is scored. None if there
            were none.

    Raises:
        MissingFileError, RecipeError, TokenizerError: as in `make_token_sets`.
    """
    source = recipe_calibration.name or EMBEDDED
    if cut is None:
        ids = _read(recipe_calibration, evaluation, tokenizer, calibrate=False)
        return _evaluation_windows(ids, evaluation, source)
    limit = evaluation_tokens(evaluation) // evaluation.n_ctx
    found = _uncalibrated(recipe_calibration, tokenizer, cut, evaluation.n_ctx, limit)
    return _evaluation_windows([token for window in found for token in window], evaluation, source)


def cut_token_sets(
    ids: Sequence[int], recipe_calibration: Calibration, evaluation: Evaluation, *, evaluate: bool, calibrate: bool
) -> TokenSets:
    """Cut a text's tokens: evaluation windows from its beginning, calibration windows from what follows.

    Calibration windows begin where the evaluation windows end, even if there is no evaluation. So an artifact is the
    same with and without verification. Evaluation windows alone may be fewer than asked for, if the text is short.

    Raises:
        RecipeError: there are too few tokens.
    """
    source = recipe_calibration.name or EMBEDDED
    calibration = _calibration_windows(ids, recipe_calibration, evaluation, source) if calibrate else None
    return TokenSets(_evaluation_windows(ids, evaluation, source) if evaluate else None, calibration)


def evaluation_tokens(evaluation: Evaluation) -> int:
    """Tokens of the evaluation windows: whole windows, at least one."""
    return max(1, evaluation.tokens // evaluation.n_ctx) * evaluation.n_ctx


def calibration_tokens(recipe_calibration: Calibration) -> int:
    """Tokens of the calibration windows: whole windows, at least one."""
    return max(1, recipe_calibration.tokens // recipe_calibration.window) * recipe_calibration.window


def _evaluation_windows(ids: Sequence[int], evaluation: Evaluation, source: str) -> Windows:
    windows = _cut(ids[: evaluation_tokens(evaluation)], evaluation.n_ctx)
    if not windows:
        raise RecipeError(
            f"evaluation text {source}",
            found=f"{len(ids)} tokens",
            expected=f"at least {evaluation.n_ctx}, one window",
            remedy="Give a longer text with --calibration.",
        )
    return Windows(windows, evaluation.n_ctx, source, _sha256(windows))


def _calibration_windows(
    ids: Sequence[int], recipe_calibration: Calibration, evaluation: Evaluation, source: str
) -> CalibrationWindows:
    _check_length(ids, recipe_calibration, evaluation)
    size = recipe_calibration.window
    places = _calibration_places(len(ids), recipe_calibration, evaluation)
    taken = tuple(tuple(ids[place : place + size]) for place in places)
    return CalibrationWindows(taken, recipe_calibration.window, source, recipe_calibration.seed, _sha256(taken))


def _check_length(ids: Sequence[int], recipe_calibration: Calibration, evaluation: Evaluation) -> None:
    """Check that the text has enough tokens for both sets.

    Raises:
        RecipeError: it has fewer.
    """
    scored, wanted = evaluation_tokens(evaluation), calibration_tokens(recipe_calibration)
    if len(ids) < scored + wanted:
        raise RecipeError(
            f"calibration text {recipe_calibration.name or EMBEDDED}",
            found=f"{len(ids)} tokens",
            expected=f"at least {scored + wanted}: {scored} for evaluation and, after those, {wanted} for calibration",
            remedy="Give a longer text with --calibration, or a smaller number with --calibration-tokens.",
        )


def _calibration_places(length: int, recipe_calibration: Calibration, evaluation: Evaluation) -> list[int]:
    """Where the calibration windows begin, in order, in a text of so many tokens."""
    scored, size = evaluation_tokens(evaluation), recipe_calibration.window
    count = calibration_tokens(recipe_calibration) // size
    chosen = sorted(random.Random(recipe_calibration.seed).sample(range((length - scored) // size), count))
    return [scored + index * size for index in chosen]


def _cut(ids: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Cut windows that follow each other. The remainder is dropped."""
    return tuple(tuple(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size))


def _sha256(windows: Sequence[Sequence[int]]) -> str:
    packed = b"".join(token.to_bytes(4, "little") for window in windows for token in window)
    return hashlib.sha256(packed).hexdigest()


def tokenize(text: str, tokenizer: TokenizerFiles) -> list[int]:
    """Token ids of a text; special tokens in it are parsed as such, and none are added.

    Raises:
        TokenizerError: `tokenizer.json` is missing or cannot be loaded.
    """
    if "tokenizer.json" not in tokenizer.files:
        raise TokenizerError(
            "tokenizer.json",
            found="no such file",
            expected="a fast tokenizer",
            remedy="Export with --no-verify, or add it.",
        )
    loaded = load_encoder(tokenizer.files["tokenizer.json"])
    ids: list[int] = loaded.encode(text, add_special_tokens=False).ids
    return ids
