"""Laws of filled rows: exact where they can be, the same bits however read, in the memory given."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from merge.errors import PlanError
from merge.tokens.fill import (
    Combination,
    Ids,
    Rows,
    Shared,
    anchors,
    combined,
    held_out,
    held_out_errors,
    mean_row,
)
from merge.tokens.omp import Pursuit, least_memory, omp
from merge.tokens.procrustes import fitting_memory, mapped, procrustes
from merge.tokens.subword import pieces, subword
from merge.tokens.vocabulary import Vocabulary, folder_files, read_vocabulary

REAL = Path(__file__).parents[3] / "shared/real"
MEMORY = 256 << 20
DONOR, OWN, BOTH = 900, 700, 600  # rows of two models, and how many tokens they share
EPS = 2.0**-23  # of float32
Drawn = NDArray[np.float32]


def drawn(rows: int, cols: int, seed: int) -> Drawn:
    """Around a mean that is not zero, as embeddings are."""
    random = np.random.default_rng(seed)
    return (random.standard_normal((rows, cols)) + random.standard_normal(cols)).astype("<f4")


def shared() -> Shared:
    random = np.random.default_rng(3)
    return Shared(random.permutation(DONOR)[:BOTH], random.permutation(OWN)[:BOTH])


def lacking(both: Shared) -> Ids:
    return np.setdiff1d(np.arange(DONOR), both.donor)


def served(values: Drawn) -> Rows:
    return lambda ids: values[ids]


def pursued(values: Drawn, both: Shared, wanted: Ids, how: Pursuit, **rest: Any) -> Combination:
    rest = {"memory": MEMORY} | rest
    return omp(served(values), both, wanted, values.shape[1], how=how, **rest)


def reference(rows: NDArray[Any], x: NDArray[Any], how: Pursuit) -> dict[int, float]:
    """From the paper, in float64 on the whole matrix: positions of `rows` and their weights."""
    mean = rows.astype(float).mean(axis=0)
    rows, x = rows.astype(float) - mean, x.astype(float) - mean
    lengths = np.linalg.norm(rows, axis=1)
    units = rows / lengths[:, None]
    nearest = np.sort(np.argsort(-np.abs(units @ x), kind="stable")[: how.candidates])
    chosen: list[int] = []
    for _ in range(how.terms):
        span = units[chosen].T
        left = x - span @ np.linalg.lstsq(span, x)[0] if chosen else x
        if left @ left <= 1e-12 * (x @ x):
            break
        scores = np.abs(units[nearest] @ left)
        scores[np.isin(nearest, chosen)] = -1
        chosen.append(int(nearest[np.argmax(scores)]))
    span = units[chosen]
    weights = np.linalg.solve(span @ span.T + how.ridge * np.eye(len(chosen)), span @ x)
    weights *= np.linalg.lstsq((weights @ span)[:, None], x)[0]
    return dict(zip(chosen, weights / lengths[chosen], strict=True))


@pytest.mark.parametrize(
    "how",
    [
        Pursuit(1, 512, 0.0),
        Pursuit(16, 600, 0.0),
        Pursuit(16, 90, 0.2),
        Pursuit(60, 512, 0.5),
        Pursuit(64, 600, 0.0),
    ],
)
def test_pursuit_is_that_of_the_paper(how: Pursuit) -> None:
    """Weights are rounded to float32 at the end; sums in another order move them by their condition."""
    both, values = shared(), drawn(DONOR, 48, 1)
    wanted = lacking(both)[:40]
    found = pursued(values, both, wanted, how)
    position = {int(own): at for at, own in enumerate(both.own)}
    for at, x in enumerate(values[wanted]):
        told = {
            position[int(row)]: float(weight)
            for row, weight in zip(found.rows[at], found.weights[at], strict=True)
            if row >= 0
        }
        expected = reference(values[both.donor], x, how)
        assert list(told) == list(expected)
        assert list(told.values()) == pytest.approx(list(expected.values()), rel=1e-6, abs=1e-6)


def test_sums_of_few_rows_are_recovered_exactly() -> None:
    """Rows that are sums of 3 shared ones in the donor become the same sums of the model's rows, to a few
    roundings of the weights."""
    both, values, own = shared(), drawn(DONOR, 128, 1), drawn(OWN, 20, 2)
    random, wanted = np.random.default_rng(9), lacking(both)[:30]
    rows = np.array([random.choice(BOTH, 3, replace=False) for _ in wanted])
    weights = random.uniform(0.5, 2.0, rows.shape) * random.choice([-1.0, 1.0], rows.shape)
    means = [v.astype(float).mean(axis=0) for v in (values[both.donor], own[both.own])]

    def sums(of: Drawn, mean: NDArray[Any]) -> NDArray[Any]:
        return mean + np.einsum("ij,ijk->ik", weights, of[rows] - mean)

    values[wanted] = sums(values[both.donor], means[0])
    found = pursued(values, both, wanted, Pursuit(8, 512, 0.0))
    filled = combined(served(own), mean_row(served(own), both.own, 20), found)
    expected = sums(own[both.own], means[1])
    assert np.abs(filled(np.arange(30)) - expected).max() <= 32 * EPS * np.abs(expected).max()


@pytest.mark.parametrize("cols", [1, 7, 48])
def test_the_same_bits_for_any_memory_and_grain_of_a_pass(
    cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge.tokens.omp.WANTED_GRAIN", 32)
    monkeypatch.setattr("merge.tokens.omp.MOST_ROWS", 50)
    both, values = shared(), drawn(DONOR, cols, 1)
    how = Pursuit(12, 100, 0.1)
    least = least_memory(BOTH, cols, how)
    found = [
        pursued(values, both, lacking(both), how, memory=memory)
        for memory in (least, least + 40_000, MEMORY)
    ]
    for other in found[1:]:
        assert other.rows.tobytes() == found[0].rows.tobytes()
        assert other.weights.tobytes() == found[0].weights.tobytes()


def test_equal_rows_are_told_apart_by_their_order() -> None:
    """The same row under many tokens: the first of them is picked, whether all are looked at or few."""
    both, values = shared(), drawn(DONOR, 16, 1)
    values[both.donor[100:400]] = values[both.donor[100]]
    wanted = both.donor[100:101]
    for candidates in (BOTH, 50):
        found = pursued(values, both, wanted, Pursuit(4, candidates, 0.0))
        assert found.rows[0].tolist() == [both.own[100], -1, -1, -1]
        assert found.weights[0, 0] == pytest.approx(1, abs=2 * EPS)


def test_rows_that_are_all_the_same_or_none_leave_the_mean() -> None:
    own = drawn(OWN, 6, 2)
    for count in (0, 1, 5):
        both = Shared(np.arange(count), np.arange(count))
        found = pursued(np.ones((9, 4), "<f4"), both, np.array([7, 8]), Pursuit(3, 2, 0.0))
        mean = mean_row(served(own), both.own, 6)
        assert (combined(served(own), mean, found)(np.arange(2)) == mean).all()


def test_pursuit_refuses_memory_that_is_too_little() -> None:
    both, values = shared(), drawn(DONOR, 48, 1)
    how = Pursuit()
    with pytest.raises(PlanError, match="allow more memory"):
        pursued(values, both, lacking(both), how, memory=least_memory(BOTH, 48, how) - 1)


def hashed(cols: int) -> Rows:
    """Rows of an embedding that is nowhere: each value a hash of its place."""

    def read(ids: Ids) -> Drawn:
        place = ids.astype(np.uint32)[:, None] * np.uint32(cols) + np.arange(cols, dtype=np.uint32)
        place *= np.uint32(2654435761)
        place ^= place >> np.uint32(15)
        place *= np.uint32(2246822519)
        return (place >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)

    return read


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        kept = work()
        del kept
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_pursuit_stays_in_its_memory() -> None:
    """A vocabulary of 128 MiB, in the least that is accepted and in what holds the shared rows."""
    count, cols, how = 16_000, 2048, Pursuit(8, 256, 0.1)
    both = Shared(np.arange(count), np.arange(count))
    wanted = np.arange(count, count + 150)
    result = wanted.size * how.terms * 12
    for spare in (0, 16 << 20, 4 * count * cols):
        memory = least_memory(count, cols, how) + spare
        used = peak(
            lambda: omp(hashed(cols), both, wanted, cols, how=how, memory=memory)  # noqa: B023
        )
        assert used <= memory + result


def test_means_and_fits_stay_in_their_memory() -> None:
    count, cols = 24_000, 2048
    ids = np.arange(count)
    assert peak(lambda: mean_row(hashed(cols), ids, cols)) < 32 << 20
    memory = fitting_memory(256, 320)
    both = Shared(ids, ids)
    used = peak(lambda: procrustes(hashed(256), hashed(320), both, 256, 320, memory=memory))
    assert used <= memory


def rotation(donor: int, own: int) -> NDArray[Any]:
    """[donor, own] with orthonormal rows, or columns if it is taller than wide."""
    u, _, v = np.linalg.svd(
        np.random.default_rng(4).standard_normal((donor, own)), full_matrices=False
    )
    return u @ v


@pytest.mark.parametrize(("cols", "own_cols"), [(24, 24), (24, 40), (40, 24)])
def test_procrustes_finds_the_rotation_scale_and_shift(cols: int, own_cols: int) -> None:
    """For a narrower model the donor's rows lie in as few dimensions. Rows are recovered to the rounding of
    float32 rows in sums over their columns."""
    both, turn = shared(), rotation(cols, own_cols)
    values = drawn(DONOR, cols, 1)
    if own_cols < cols:
        values = (values.astype(float) @ turn @ turn.T).astype("<f4")
    true = 2.5 * values.astype(float) @ turn + drawn(1, own_cols, 8)
    own = np.zeros((OWN, own_cols), "<f4")
    own[both.own] = true[both.donor]
    fitted = procrustes(served(values), served(own), both, cols, own_cols, memory=MEMORY)
    wanted = lacking(both)
    rows = mapped(served(values), fitted, wanted)
    filled = rows(np.arange(len(wanted)))
    assert np.abs(filled - true[wanted]).max() <= 64 * EPS * np.abs(true).max()
    assert rows(np.array([200, 3])).tobytes() == filled[[200, 3]].tobytes()


def test_procrustes_is_the_best_rotation_of_what_has_none() -> None:
    """No rotation drawn at random, at its own best scale, comes nearer."""
    both, values, own = shared(), drawn(DONOR, 12, 1), drawn(OWN, 12, 2)
    own[both.own] += values[both.donor] @ rotation(12, 12).astype("<f4")
    fitted = procrustes(served(values), served(own), both, 12, 12, memory=MEMORY)
    a, b = (
        v.astype(float) - v.astype(float).mean(axis=0) for v in (values[both.donor], own[both.own])
    )
    least = np.linalg.norm(a @ fitted.matrix - b)
    random = np.random.default_rng(6)
    for _ in range(200):
        nearby = fitted.matrix + 0.1 * random.standard_normal((12, 12))
        u, _, v = np.linalg.svd(nearby)
        scale = np.sum((a @ u @ v) * b) / np.sum(a * a)
        assert np.linalg.norm(scale * a @ u @ v - b) >= least


def test_fits_refuse_memory_that_is_too_little() -> None:
    with pytest.raises(PlanError, match="allow more memory"):
        procrustes(served(drawn(9, 4, 1)), served(drawn(9, 4, 2)), shared(), 4, 4, memory=1000)


def test_held_out_errors_are_those_of_a_direct_computation() -> None:
    """A row of zeros has no relative error: nothing but itself comes near."""
    both, own = shared(), drawn(OWN, 16, 2)
    zero = held_out(both)[1].own[0]
    own[zero] = 0

    def by_mean(kept: Shared, wanted: Ids) -> Rows:
        assert not np.isin(wanted, kept.donor).any()
        return combined(
            served(own), mean_row(served(own), kept.own, 16), subword([()] * len(wanted))
        )

    held, errors = held_out_errors(by_mean, served(own), both, 16)
    assert BOTH / 20 < len(held) < BOTH / 5
    kept = np.setdiff1d(both.own, held.own)
    exact = own.astype(float)
    missing = np.linalg.norm(exact[held.own] - exact[kept].mean(axis=0), axis=1)
    assert errors[0] == np.inf
    assert errors[1:] == pytest.approx(
        missing[1:] / np.linalg.norm(exact[held.own[1:]], axis=1), rel=1e-5
    )


def test_what_is_held_out_follows_from_the_models_rows_alone() -> None:
    both = shared()
    turned = Shared(both.donor[::-1], both.own[::-1])
    assert set(held_out(both)[1].own.tolist()) == set(held_out(turned)[1].own.tolist())


def test_a_combination_without_terms_is_the_mean_and_terms_are_weighed() -> None:
    own = drawn(9, 5, 1)
    found = Combination(
        np.array([[-1, -1], [4, -1], [2, 3]]), np.array([[7, 7], [1, 7], [0.25, 0.5]], "<f4")
    )
    mean = mean_row(served(own), np.arange(9), 5)
    rows = combined(served(own), mean, found)(np.array([2, 0, 1]))
    expected = 0.25 * mean.astype(float) + 0.25 * own[2].astype(float) + 0.5 * own[3].astype(float)
    assert np.abs(rows[0] - expected).max() <= EPS * np.abs(expected).max()
    assert (rows[1] == mean).all()
    assert (rows[2] == own[4]).all()


def test_what_texts_hardly_contain_is_no_anchor(llama: Vocabulary) -> None:
    """Not special tokens, nor the bytes of unknown characters, of either model."""
    own = np.arange(llama.size)
    few = vocabulary(
        {"model": {"type": "BPE", "vocab": {f"{i}": i for i in range(512)}, "merges": []}}
    )
    for found in (
        anchors(Shared(own, own[::-1].copy()), llama, few).own,
        anchors(Shared(own[::-1].copy(), own), few, llama).donor,
    ):
        assert sorted(found.tolist()) == list(range(259, 512))


def vocabulary(tokenizer: dict[str, Any], **settings: str) -> Vocabulary:
    files = {
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    found = read_vocabulary("own", files)
    assert found is not None
    return found


def spelled(own: Vocabulary, text: bytes | str, without: tuple[str, ...] = ()) -> list[str]:
    ids = [own.ids[piece] for piece in without]
    return [own.texts[i] for i in pieces(own, [text], ids)[0]]


@pytest.fixture(scope="module")
def llama() -> Vocabulary:
    folder = REAL / "stories260k"
    if not folder.is_dir():
        pytest.skip("the real models do not lie beside the repository")
    found = read_vocabulary("llama", folder_files(folder))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def gpt2(real: Callable[[str], Vocabulary]) -> Vocabulary:
    return real("gpt2")


def test_pieces_of_sentencepiece_start_no_word_of_their_own(llama: Vocabulary) -> None:
    assert spelled(llama, b" the") == ["▁the"]
    assert spelled(llama, b"the") == ["t", "he"]
    assert spelled(llama, b" beautiful") == ["▁be", "a", "ut", "i", "f", "u", "l"]
    assert spelled(llama, b"  ") == ["▁", "▁"]
    assert spelled(llama, b"\n") == ["<0x0A>"]
    assert spelled(llama, "ü".encode()) == ["<0xC3>", "<0xBC>"]
    assert spelled(llama, b"a\xe2\x80") == ["a", "<0xE2>", "<0x80>"]
    assert spelled(llama, b" <s>") == ["▁", "<", "s", ">"]
    assert spelled(llama, "<s>") == []


def test_pieces_of_bytes_cross_no_rule_for_words(gpt2: Vocabulary) -> None:
    assert spelled(gpt2, b" the") == ["Ġthe"]
    assert spelled(gpt2, b" Handschuh") == ["ĠHands", "ch", "uh"]
    assert spelled(gpt2, "über".encode()) == ["Ã¼", "ber"]
    assert spelled(gpt2, b"\xe2\x80") == ["âĢ"]
    assert spelled(gpt2, b"\n\n") == ["ĊĊ"]


def test_pieces_of_larger_vocabularies(real: Callable[[str], Vocabulary]) -> None:
    expected = {
        "llama2": {
            b" Handschuh": ["▁Hand", "sch", "uh"],
            b"Handschuh": ["Hand", "sch", "uh"],
            b"  def": ["▁", "▁def"],
            "日本".encode(): ["日", "本"],
            b"\n\n": ["<0x0A>", "<0x0A>"],
        },
        "llama3": {
            b" Handschuh": ["ĠHands", "ch", "uh"],
            "日本".encode(): ["æĹ¥æľ¬"],
            b"\xe6\x97": ["æĹ"],
        },
    }
    for name, texts in expected.items():
        assert {text: spelled(real(name), text) for text in texts} == texts


def test_what_is_held_out_is_spelled_by_other_pieces(llama: Vocabulary, gpt2: Vocabulary) -> None:
    assert spelled(llama, b" the", ("▁the",)) == ["▁t", "he"]
    assert spelled(llama, b" the", ("▁the", "he")) == ["▁th", "e"]
    assert spelled(llama, b"t", ("t",)) == ["<0x74>"]
    assert spelled(llama, b"\n", ("<0x0A>",)) == []
    assert spelled(gpt2, b" the", ("Ġthe",)) == ["Ġt", "he"]


def test_unigram_and_wordpiece_spell_too() -> None:
    unigram = {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["?", 0], ["▁ab", -1], ["▁a", -2], ["b", -2]]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    }  # fmt: skip
    assert spelled(vocabulary(unigram), b" ab") == ["▁ab"]
    assert spelled(vocabulary(unigram), b" ab", ("▁ab",)) == ["▁a", "b"]
    assert spelled(vocabulary(unigram), b"xyz") == []
    word = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 99,
    }
    vocab = {"[UNK]": 0, "ab": 1, "##c": 2, "a": 3, "##b": 4}
    wordpiece = vocabulary({"model": {**word, "vocab": vocab}})
    assert spelled(wordpiece, b" abc") == ["ab", "##c"]
    assert spelled(wordpiece, b" abc", ("ab",)) == ["a", "##b", "##c"]
    assert spelled(wordpiece, b" xyz") == []


def test_subwords_are_means_of_their_rows() -> None:
    own = drawn(9, 5, 1)
    found = subword([(1, 4), (), (2,), (3, 3, 1)])
    filled = combined(served(own), mean_row(served(own), np.arange(9), 5), found)(np.arange(4))
    exact = own.astype(float)
    expected = [
        (exact[1] + exact[4]) / 2,
        exact.mean(axis=0),
        exact[2],
        (2 * exact[3] + exact[1]) / 3,
    ]
    assert np.abs(filled - expected).max() <= 2 * EPS * np.abs(own).max()
    assert subword([]).rows.shape == (0, 0)
