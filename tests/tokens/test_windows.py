"""Text → evaluation and calibration windows: against transformers' tokenizer, by llama-perplexity's protocol."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from exporter.errors import RecipeError, TokenizerError
from exporter.inputs.tokenizer import TokenizerFiles
from exporter.recipe import Calibration, Evaluation
from exporter.tokens.embedded import embedded_text
from exporter.tokens.prompts import Tokenizers
from exporter.tokens.windows import (
    TokenSets,
    Windows,
    cut_token_sets,
    make_token_sets,
    make_windows,
    more_windows,
    tokenize,
)
from tests.folders import copy


@pytest.fixture
def folder(make_base: Callable[..., Path], tmp_path: Path) -> Path:
    return copy(make_base("qwen2"), tmp_path / "base")


@pytest.fixture
def files(folder: Path) -> TokenizerFiles:
    return TokenizerFiles.choose(folder, ())


def windows(files: TokenizerFiles, file: Path | None, tokens: int = 10_000, n_ctx: int = 64) -> Windows:
    return make_windows(Calibration(text=file), Evaluation(tokens=tokens, n_ctx=n_ctx), files)


def ids_of(folder: Path, text: str) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    return found


# --- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", [64, 65, 512])
def test_windows_follow_each_other_and_the_remainder_is_dropped(
    folder: Path, files: TokenizerFiles, tmp_path: Path, n_ctx: int
) -> None:
    text = embedded_text()[:6000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = ids_of(folder, text)
    found = windows(files, tmp_path / "text.txt", n_ctx=n_ctx)
    assert len(found.ids) == len(ids) // n_ctx > 1
    assert len(ids) % n_ctx > 0
    assert [token for window in found.ids for token in window] == ids[: len(found.ids) * n_ctx]
    assert {len(window) for window in found.ids} == {n_ctx}
    assert found.source == "text.txt"
    assert found.n_ctx == n_ctx
    # tools/perplexity/perplexity.cpp: first = n_ctx/2, and n_ctx - first - 1 predictions a window.
    assert found.tokens_scored == len(found.ids) * (n_ctx - n_ctx // 2 - 1)


@pytest.mark.parametrize(("tokens", "count"), [(64, 1), (100, 1), (128, 2), (191, 2), (767, 11), (100_000, 12)])
def test_whole_windows_of_as_many_tokens_as_wanted(
    files: TokenizerFiles, tmp_path: Path, tokens: int, count: int
) -> None:
    (tmp_path / "text.txt").write_text("<|im_end|>" * 800, encoding="utf-8")
    assert len(windows(files, tmp_path / "text.txt", tokens).ids) == count


def test_at_least_one_window_is_scored(files: TokenizerFiles) -> None:
    assert len(windows(files, None, tokens=64, n_ctx=512).ids) == 1


def test_hash_is_of_the_scored_ids(files: TokenizerFiles) -> None:
    found = windows(files, None, tokens=256)
    flat = [token for window in found.ids for token in window]
    assert found.sha256 == hashlib.sha256(struct.pack(f"<{len(flat)}i", *flat)).hexdigest()
    assert found.sha256 == windows(files, None, tokens=256).sha256
    assert found.sha256 != windows(files, None, tokens=192).sha256


def test_too_little_text_is_refused_with_the_number_needed(files: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("only this", encoding="utf-8")
    count = len(tokenize("only this", files))
    with pytest.raises(RecipeError) as caught:
        windows(files, tmp_path / "short.txt", n_ctx=512)
    assert "short.txt" in caught.value.thing
    assert caught.value.found == f"{count} tokens"
    assert "512" in caught.value.expected


def test_as_many_tokens_as_one_window_are_enough(files: TokenizerFiles, tmp_path: Path) -> None:
    text = "<|im_end|>" * 64
    (tmp_path / "exact.txt").write_text(text, encoding="utf-8")
    assert len(windows(files, tmp_path / "exact.txt").ids) == 1
    (tmp_path / "short.txt").write_text("<|im_end|>" * 63, encoding="utf-8")
    with pytest.raises(RecipeError, match="63 tokens"):
        windows(files, tmp_path / "short.txt")


# --- both sets -----------------------------------------------------------------------------------------------------

EVALUATION = Evaluation(tokens=128, n_ctx=64)


def sets(files: TokenizerFiles, file: Path | None, *, evaluate: bool = True, **values: int) -> TokenSets:
    """Both sets of a text, 2 evaluation windows of 64 and calibration windows of 32 unless said otherwise."""
    calibration = Calibration.model_validate({"text": file, "tokens": 96, "window": 32} | values)
    return make_token_sets(calibration, EVALUATION, files, evaluate=evaluate, calibrate=True)


@given(
    length=st.integers(0, 4000), tokens=st.integers(64, 1500), window=st.integers(16, 200), seed=st.integers(),
    scored=st.integers(64, 1500), n_ctx=st.integers(16, 200), evaluate=st.booleans(),
)  # fmt: skip
def test_no_position_of_the_text_is_in_both_sets(
    length: int, tokens: int, window: int, seed: int, scored: int, n_ctx: int, evaluate: bool
) -> None:
    calibration = Calibration(tokens=tokens, window=window, seed=seed)
    evaluation = Evaluation(tokens=scored, n_ctx=n_ctx)
    needed = max(1, scored // n_ctx) * n_ctx + max(1, tokens // window) * window
    # Every token is its own position.
    cut = partial(cut_token_sets, range(length), calibration, evaluation, evaluate=evaluate, calibrate=True)
    if length < needed:
        with pytest.raises(RecipeError) as caught:
            cut()
        assert caught.value.found == f"{length} tokens"
        assert str(needed) in caught.value.expected
        return
    found = cut()
    assert found.calibration is not None
    assert (found.evaluation is not None) is evaluate
    taken = [position for ids in found.calibration.ids for position in ids]
    assert found.calibration.tokens == len(taken) == max(1, tokens // window) * window
    assert all(ids == tuple(range(ids[0], ids[0] + window)) for ids in found.calibration.ids)
    # In the order of the text, each once, and none of what is scored with or without verification.
    assert taken == sorted(set(taken))
    assert min(taken) >= max(1, scored // n_ctx) * n_ctx
    if found.evaluation is not None:
        assert {position for ids in found.evaluation.ids for position in ids}.isdisjoint(taken)


def test_windows_are_those_of_the_text_after_the_evaluation(files: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text := embedded_text()[:3000], encoding="utf-8")
    ids = tokenize(text, files)
    found = sets(files, tmp_path / "text.txt")
    assert found.evaluation == make_windows(Calibration(text=tmp_path / "text.txt"), EVALUATION, files)
    assert found.calibration is not None
    whole = [tuple(ids[start : start + 32]) for start in range(128, len(ids) - 31, 32)]
    assert set(found.calibration.ids) < set(whole)
    assert found.calibration.tokens == 96
    assert (found.calibration.window, found.calibration.source, found.calibration.seed) == (32, "text.txt", 0)
    flat = [token for window in found.calibration.ids for token in window]
    assert found.calibration.sha256 == hashlib.sha256(struct.pack(f"<{len(flat)}i", *flat)).hexdigest()


def test_calibration_windows_do_not_depend_on_verification(files: TokenizerFiles) -> None:
    assert sets(files, None, evaluate=False) == TokenSets(None, sets(files, None).calibration)


def test_the_seed_decides_which_windows_are_taken(files: TokenizerFiles) -> None:
    one, two = sets(files, None), sets(files, None, seed=1)
    assert one.evaluation == two.evaluation
    assert one.calibration is not None
    assert two.calibration is not None
    assert one.calibration.sha256 != two.calibration.sha256
    assert one == sets(files, None)


@pytest.mark.slow
def test_evaluation_alone_is_the_same_as_with_calibration(files: TokenizerFiles) -> None:
    """Of the embedded text only the beginning is read then."""
    evaluation, calibration = Evaluation(tokens=8000, n_ctx=100), Calibration()
    alone = make_token_sets(calibration, evaluation, files, evaluate=True, calibrate=False)
    both = make_token_sets(calibration, evaluation, files, evaluate=True, calibrate=True)
    assert alone == TokenSets(both.evaluation, None)
    assert both.evaluation is not None
    assert len(both.evaluation.ids) == 80


def test_nothing_is_read_where_nothing_is_needed(tmp_path: Path) -> None:
    calibration, files = Calibration(text=tmp_path / "none.txt"), TokenizerFiles({}, "base")
    assert make_token_sets(calibration, EVALUATION, files, evaluate=False, calibrate=False) == TokenSets(None, None)


@pytest.mark.parametrize("evaluate", [True, False])
def test_as_many_tokens_as_both_sets_take_are_enough(files: TokenizerFiles, tmp_path: Path, evaluate: bool) -> None:
    file = tmp_path / "text.txt"
    file.write_text("<|im_end|>" * (128 + 96), encoding="utf-8")
    found = sets(files, file, evaluate=evaluate).calibration
    assert found is not None
    assert len(found.ids) == 3
    file.write_text("<|im_end|>" * (128 + 96 - 1), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        sets(files, file, evaluate=evaluate)
    assert "text.txt" in caught.value.thing
    assert caught.value.found == "223 tokens"
    for number in ("224", "128", "96"):
        assert number in caught.value.expected
    assert "--calibration-tokens" in caught.value.remedy


# --- tokens --------------------------------------------------------------------------------------------------------


def test_special_tokens_are_parsed_and_none_are_added(folder: Path, files: TokenizerFiles) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenize("<|im_start|>user\nhi<|im_end|>", files)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (found[0], found[-1]) == (start, end)
    assert found.count(start) == found.count(end) == 1
    assert found == ids_of(folder, "<|im_start|>user\nhi<|im_end|>")


@pytest.mark.parametrize(
    "text", ["", "plain", "Ünïcödé 你好 🦙", "tab\there\r\nand 1234\n\n\n", embedded_text()[:3000]]
)
def test_tokens_are_transformers(folder: Path, files: TokenizerFiles, text: str) -> None:
    assert tokenize(text, files) == ids_of(folder, text)


@pytest.mark.parametrize(
    "damage",
    [lambda file: file.unlink(), lambda file: file.write_text("{"), lambda file: file.write_text('{"model": {}}')],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        tokenize("text", TokenizerFiles.choose(folder, ()))


@pytest.mark.parametrize("wanted", [40, 1000])
def test_what_a_trainer_saved_neither_cuts_nor_pads(
    folder: Path, files: TokenizerFiles, tmp_path: Path, wanted: int
) -> None:
    """By the setting of the tokenizers library, which obeys it in every call."""
    text = embedded_text()[:1000]
    expected = tokenize(text, files)
    assert 64 < len(expected) < 1000
    own = copy(folder, tmp_path / "trained")
    saved = Tokenizer.from_file(str(own / "tokenizer.json"))
    saved.enable_truncation(wanted)
    saved.enable_padding(length=wanted)
    saved.save(str(own / "tokenizer.json"))
    trained = TokenizerFiles.choose(own, ())
    assert len(Tokenizer.from_file(str(own / "tokenizer.json")).encode(text).ids) == wanted
    assert tokenize(text, trained) == expected
    assert Tokenizers(trained).ids(text, special=True) == expected


# --- more tokens -----------------------------------------------------------------------------------------------------


# Lengths of a text, and how both sets are cut from it.
CUTS = {
    "length": st.integers(600, 3000),
    "tokens": st.integers(64, 400),
    "size": st.sampled_from([16, 40, 64, 100]),
    "count": st.integers(1, 4),
    "seed": st.integers(0, 5),
}


@given(**CUTS)
def test_more_windows_follow_and_share_no_token_with_either_set(
    length: int, tokens: int, size: int, count: int, seed: int
) -> None:
    ids = list(range(length))
    files = TokenizerFiles({}, "base")
    assume(length >= max(64, tokens) + max(64, size * count))
    calibration = Calibration(tokens=max(64, size * count), window=size, seed=seed)
    evaluation = Evaluation(tokens=tokens, n_ctx=64, max_tokens=100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.tokens.windows.read_beginnings", lambda *_: iter([""]))
        patch.setattr("exporter.tokens.windows.tokenize", lambda *_: ids)
        sets = make_token_sets(calibration, evaluation, files, evaluate=True, calibrate=True)
        assert sets.evaluation is not None
        assert sets.calibration is not None
        more = more_windows(calibration, evaluation, files, sets.evaluation, cut=evaluation)
        few = evaluation.model_copy(update={"max_tokens": tokens + 3 * 64})
        assert more_windows(calibration, few, files, sets.evaluation, cut=evaluation) == more[:3]
        at_once = evaluation.model_copy(update={"max_tokens": 64})
        assert more_windows(calibration, at_once, files, sets.evaluation, cut=evaluation) == []
    seen = [token for windows in (sets.evaluation.ids, more, sets.calibration.ids) for one in windows for token in one]
    assert len(seen) == len(set(seen))
    assert more == sorted(more)
    # Nothing that would hold a window is left out.
    left = sorted(set(ids) - set(seen))
    places = itertools.count()
    assert all(len(list(run)) < 64 for _, run in itertools.groupby(left, key=lambda token: token - next(places)))


@given(
    **CUTS,
    now=st.integers(64, 4000),
    n_ctx=st.integers(16, 200),
)
def test_no_token_that_was_calibrated_on_is_scored_however_many_are_asked_for(
    length: int, tokens: int, size: int, count: int, seed: int, now: int, n_ctx: int
) -> None:
    """An artifact that is verified again, with other settings than those of its export."""
    ids = list(range(length))
    files = TokenizerFiles({}, "base")
    assume(length >= max(64, tokens) + max(64, size * count))
    calibration = Calibration(tokens=max(64, size * count), window=size, seed=seed)
    cut = Evaluation(tokens=tokens, n_ctx=64)
    evaluation = Evaluation(tokens=now, n_ctx=n_ctx, max_tokens=100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.tokens.windows.read_beginnings", lambda *_: iter([""]))
        patch.setattr("exporter.tokens.windows.tokenize", lambda *_: ids)
        then = make_token_sets(calibration, cut, files, evaluate=True, calibrate=True)
        assert then.calibration is not None
        assert make_windows(calibration, cut, files, cut=cut) == then.evaluation
        try:
            known = make_windows(calibration, evaluation, files, cut=cut)
        except RecipeError:
            # Nowhere is there room for a window, and so not in the whole windows that were scored then.
            assert n_ctx > max(64, tokens // 64 * 64)
            return
        more = more_windows(calibration, evaluation, files, known, cut=cut)
    scored = [token for one in (*known.ids, *more) for token in one]
    assert len(scored) == len(set(scored))
    assert not set(scored) & {token for one in then.calibration.ids for token in one}
    assert {len(one) for one in (*known.ids, *more)} == {n_ctx}
    # As many as were asked for, unless that is all there is.
    assert len(known.ids) == max(1, now // n_ctx) or not more


@pytest.mark.slow
def test_a_text_that_is_read_in_part_is_cut_as_it_was(files: TokenizerFiles, tmp_path: Path) -> None:
    """Of the embedded text and of a dataset no more is read than is needed, and that decides what is taken."""
    calibration = Calibration(tokens=256, window=64)
    cut = Evaluation(tokens=128, n_ctx=64)
    then = make_token_sets(calibration, cut, files, evaluate=True, calibrate=True)
    assert then.calibration is not None
    known = make_windows(calibration, Evaluation(tokens=60_000, n_ctx=64), files, cut=cut)
    assert len(known.ids) == 60_000 // 64
    assert not set(known.ids) & set(then.calibration.ids)
    # Whole windows are taken from among whole windows, so that what is left out is all that is missing.
    plain = make_windows(calibration, Evaluation(tokens=60_000 + 256, n_ctx=64), files)
    assert [one for one in plain.ids if one not in then.calibration.ids][: len(known.ids)] == list(known.ids)
