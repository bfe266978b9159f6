"""The instant head: exact sums in any order, and a sensible classifier from any of them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.heads import (
    LEVELS,
    HeadSums,
    Lift,
    LinearHead,
    Prior,
    Quantised,
    calibrate,
    dequantise,
    fit_temperature,
    leave_one_out,
    quantise,
    solve,
)

DIMENSION = 5
Examples = list[tuple[list[int], str]]

examples = st.lists(
    st.tuples(
        st.lists(st.integers(-LEVELS, LEVELS), min_size=DIMENSION, max_size=DIMENSION),
        st.sampled_from(["quiet", "storm", "déjà\nvu", '"']),
    ),
    min_size=1,
    max_size=12,
)


def rows(taught: Examples) -> tuple[Quantised, list[str]]:
    """Examples as the arguments of `add`."""
    q = np.array([row for row, _ in taught], dtype=np.int16).reshape(len(taught), DIMENSION)
    return q, [label for _, label in taught]


def sums_of(taught: Examples) -> HeadSums:
    """The sums of all of them, learned at once."""
    sums = HeadSums(DIMENSION, 2.0)
    sums.add(*rows(taught))
    return sums


def clusters(
    per_class: int, classes: int = 3, dimension: int = 8, seed: int = 0, spread: float = 0.1
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Embeddings around one corner a class."""
    chance = np.random.default_rng(seed)
    labels = [f"class {c}" for c in range(classes) for _ in range(per_class)]
    corners = np.eye(max(classes, dimension))[:classes, :dimension]
    x = np.repeat(corners, per_class, axis=0) + chance.normal(0, spread, (len(labels), dimension))
    return x.astype(np.float32), labels


def bits(sums: HeadSums) -> bytes:
    """All that sums hold, as bytes."""
    saved: bytes = safetensors.numpy.save(sums.tensors())
    return saved


def finite(head: LinearHead | None, embeddings: npt.NDArray[np.float32]) -> LinearHead:
    """The head, after its answers were found to be probabilities."""
    assert head is not None
    answer = head.answer(embeddings, len(head.classes))
    assert np.isfinite(answer.probabilities).all()
    assert np.allclose(answer.probabilities.sum(axis=1), 1.0, atol=1e-5)
    assert ((answer.novelty >= 0) & (answer.novelty <= 1)).all()
    return head


@given(taught=examples, data=st.data())
def test_any_order_of_adding_and_subtracting_gives_the_same_bits(taught: Examples, data: st.DataObject) -> None:
    """Two learners that met the same messages in another order must announce the same head."""
    withdrawn = data.draw(st.sets(st.integers(0, len(taught) - 1)))
    steps = [(i, +1) for i in range(len(taught))] + [(i, -1) for i in withdrawn]
    sums, seen = HeadSums(DIMENSION, 2.0), set()
    while steps:
        possible = [step for step in steps if step[1] > 0 or step[0] in seen]
        step = data.draw(st.sampled_from(possible))
        steps.remove(step)
        q, labels = rows([taught[step[0]]])
        if step[1] > 0:
            sums.add(q, labels)
            seen.add(step[0])
        else:
            sums.subtract(q, labels)
    left = sums_of([example for i, example in enumerate(taught) if i not in withdrawn])
    assert sums == left
    assert bits(sums) == bits(left)


@given(taught=examples, more=examples)
def test_subtracting_undoes_adding(taught: Examples, more: Examples) -> None:
    """A corrected label must leave nothing of the wrong one behind."""
    sums = sums_of(taught)
    sums.add(*rows(more))
    sums.subtract(*rows(more))
    assert bits(sums) == bits(sums_of(taught))


@given(taught=examples, more=examples)
def test_merging_is_learning_both(taught: Examples, more: Examples) -> None:
    """Sums of two partitions, joined, are those of one learner that had both."""
    merged = sums_of(taught)
    merged.merge(sums_of(more))
    assert merged == sums_of(taught + more)


def test_two_hundred_thousand_adds_and_subtracts_leave_no_error() -> None:
    """A stream that runs for years must not collect rounding errors."""
    chance = np.random.default_rng(0)
    q = chance.integers(-LEVELS, LEVELS + 1, (1000, DIMENSION)).astype(np.int16)
    labels = [str(c) for c in chance.integers(0, 7, len(q))]
    sums = HeadSums(DIMENSION, 1.0)
    sums.add(q[:10], labels[:10])
    start = bits(sums)
    for turn in range(100):
        order = chance.permutation(len(q))
        for part in np.array_split(order, 1 + turn % 3):
            sums.add(q[part], [labels[i] for i in part])
        for part in np.array_split(chance.permutation(order), 1 + turn % 5):
            sums.subtract(q[part], [labels[i] for i in part])
    assert bits(sums) == start


def test_sums_are_the_integer_sums() -> None:
    """Floats that hold integers must hold the right ones: compared with Python's own arithmetic."""
    q = np.array([[LEVELS, -LEVELS, 1], [3, 4, 5]], dtype=np.int16)
    sums = HeadSums(3, 1.0)
    sums.add(q, ["a", "a"])
    exact = [[sum(int(row[i]) * int(row[j]) for row in q) for j in range(3)] for i in range(3)]
    assert sums.gram.tolist() == exact
    assert sums.class_sums().tolist() == [[LEVELS + 3, 4 - LEVELS, 6]]


def test_a_class_that_lost_all_examples_is_gone() -> None:
    """After its only label is withdrawn a class must not be answered any more."""
    q, labels = rows([([1, 2, 3, 4, 5], "a"), ([5, 4, 3, 2, 1], "b")])
    sums = HeadSums(DIMENSION, 1.0)
    sums.add(q, labels)
    sums.subtract(q[:1], labels[:1])
    assert sums.classes == ("b",)
    assert sums.counts == {"b": 1}


@pytest.mark.parametrize(
    ("row", "label"), [([1, 1, 1, 1, 1], "never seen"), ([9, 9, 9, 9, 9], "a")], ids=["class", "example"]
)
def test_taking_what_was_never_given_is_refused(row: list[int], label: str) -> None:
    """A ledger that disagrees with the sums must be noticed, and must not leave them half changed."""
    sums = sums_of([([1, 2, 3, 4, 5], "a"), ([1, 1, 1, 1, 1], "b")])
    before = bits(sums)
    with pytest.raises(ValueError, match="never given"):
        sums.subtract(*rows([(row, label)]))
    assert bits(sums) == before


def test_sums_that_would_stop_being_exact_are_refused() -> None:
    """Beyond 2^53 a float64 skips integers, silently: the head must say so instead."""
    sums = HeadSums(1, 1.0)
    sums.add(np.full((1 << 16, 1), LEVELS, dtype=np.int16), ["a"] * (1 << 16))
    # Doubling reaches the limit, 8.4 million examples at the very bound, without as many additions.
    for _ in range(7):
        sums.merge(sums.copy())
    before = bits(sums)
    with pytest.raises(OverflowError):
        sums.merge(sums.copy())
    assert bits(sums) == before


@pytest.mark.parametrize(
    "q",
    [np.zeros((1, 4), np.int16), np.zeros((2, DIMENSION), np.int16), np.zeros((1, DIMENSION), np.int32)],
    ids=["dimension", "labels", "type"],
)
def test_wrong_shapes_are_refused(q: npt.NDArray[np.int16]) -> None:
    """An embedding of another encoder must never be mixed in."""
    with pytest.raises(ValueError, match="expected int16"):
        HeadSums(DIMENSION, 1.0).add(q, ["a"])


def test_sums_of_another_encoder_do_not_merge() -> None:
    """Steps of another bound are other units."""
    with pytest.raises(ValueError, match="cannot join"):
        HeadSums(DIMENSION, 1.0).merge(HeadSums(DIMENSION, 2.0))


@given(taught=examples)
def test_sums_survive_storage(taught: Examples) -> None:
    """A learner that restarts must go on from the same bits, whatever the class names are."""
    sums = sums_of(taught)
    loaded = HeadSums.from_tensors(safetensors.numpy.load(bits(sums)))
    assert loaded == sums
    assert (loaded.bound, loaded.counts) == (sums.bound, sums.counts)


def test_quantising_is_rounding_within_the_bound() -> None:
    """What is learned lies within half a step of what was embedded."""
    x = np.array([[-2.0, -1.0, 0.1, 0.5, 3.0]], dtype=np.float32)
    q = quantise(x, 2.0)
    assert q.dtype == np.int16
    assert q[0, 0] == -LEVELS
    assert q[0, 4] == LEVELS
    assert np.abs(dequantise(q, 2.0) - np.clip(x, -2, 2)).max() <= 1.0 / LEVELS + 1e-6
    with pytest.raises(ValueError, match="not a number"):
        quantise(np.array([[math.nan]]), 1.0)


def test_no_class_no_head() -> None:
    """Before the first label a stream answers null, not a guess."""
    assert solve(HeadSums(DIMENSION, 1.0)) is None


def test_the_head_separates_what_is_separate() -> None:
    """The plain case: far clusters, all right, sure, and not novel."""
    x, labels = clusters(20)
    sums = HeadSums(8, 2.0)
    sums.add(quantise(x, 2.0), labels)
    head = finite(solve(sums), x)
    assert head.predict(x) == labels
    answer = head.answer(x, 2)
    assert [best for best, _ in answer.labels] == labels
    assert answer.probabilities.shape == (len(x), 2)
    assert answer.probabilities[:, 0].min() > 0.9
    assert answer.novelty.max() < 0.5


def test_novelty_rises_where_nothing_was_learned() -> None:
    """A user looks at novelty to find what the classes do not cover."""
    x, labels = clusters(20)
    sums = HeadSums(8, 2.0)
    sums.add(quantise(x, 2.0), labels)
    head = finite(solve(sums), x)
    middle = x.mean(axis=0, keepdims=True)
    assert head.answer(x, 1).novelty.max() < head.answer(middle, 1).novelty[0]
    assert head.answer(middle, 1).novelty[0] > 0.9


def test_the_head_is_the_textbook_discriminant() -> None:
    """The closed form is checked against a covariance that is inverted the long way."""
    x, labels = clusters(30, spread=0.4)
    sums = HeadSums(8, 2.0)
    q = quantise(x, 2.0)
    sums.add(q, labels)
    head = solve(sums, prior="uniform", shrinkage=1e-6, temperature=1.0, pooled=False)
    assert head is not None
    exact = dequantise(q, 2.0).astype(np.float64)
    means = exact.reshape(3, 30, 8).mean(axis=1)
    rest = exact - np.repeat(means, 30, axis=0)
    inverse = np.linalg.inv(rest.T @ rest / (len(x) - 3))
    gaps = exact[:, None] - means[None]
    distance = -0.5 * np.einsum("ncd,de,nce->nc", gaps, inverse, gaps)
    expected = np.exp(distance - distance.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    scores = head.scores(exact.astype(np.float32))
    found = np.exp(scores - scores.max(axis=1, keepdims=True))
    assert np.allclose(found / found.sum(axis=1, keepdims=True), expected, atol=1e-3)


@pytest.mark.parametrize("prior", ["uniform", "sqrt", "empirical"])
@pytest.mark.parametrize(
    "taught",
    [
        [([1000, 0, 0, 0, 0], "a")],
        [([1000, 0, 0, 0, 0], "a"), ([900, 10, 0, 0, 0], "a")],
        [([0, 0, 0, 0, 0], "a")] * 3,
        [([7, 7, 7, 7, 7], "a"), ([7, 7, 7, 7, 7], "b")],
        [([100, 7, 7, 7, 7], "a"), ([-100, 7, 7, 7, 7], "b")] * 4,
        [([100, 7, 7, 7, 7], "a")] * 50 + [([-100, 7, 7, 7, 7], "b")],
        [([LEVELS] * 5, "a"), ([-LEVELS] * 5, "b")],
    ],
    ids=["one example", "one class", "zeros", "same place", "constant features", "duplicates", "at the bound"],
)
def test_every_degenerate_teaching_gives_a_finite_head(taught: Examples, prior: Prior) -> None:
    """Streams begin with one label, and sensors get stuck: neither may break the head."""
    sums = sums_of(taught)
    q, labels = rows(taught)
    x = dequantise(q, 2.0)
    head = finite(solve(sums, prior=prior), np.vstack([x, np.full((1, 5), 2.0), np.zeros((1, 5))]).astype(np.float32))
    if len({tuple(row) for row, _ in taught}) == len(sums.classes) > 1:
        assert head.predict(x) == labels
    assert len(leave_one_out(sums, q, labels, prior=prior)) == len(taught)
    assert 1.0 <= fit_temperature(sums, q, labels, prior=prior) <= 64.0


@given(taught=examples)
@settings(max_examples=50)
def test_any_teaching_gives_a_finite_head(taught: Examples) -> None:
    """Whatever is taught, the worker must get numbers from it."""
    q, _ = rows(taught)
    finite(solve(sums_of(taught)), dequantise(q, 2.0))


def test_one_class_is_answered_with_probability_one_and_no_opinion_on_novelty() -> None:
    """With a single class there is nothing to compare with; the head says so by 0.5."""
    head = solve(sums_of([([10, 0, 0, 0, 0], "a"), ([0, 10, 0, 0, 0], "a")]))
    assert head is not None
    answer = head.answer(np.ones((2, DIMENSION), np.float32), 5)
    assert answer.labels == [("a",), ("a",)]
    assert answer.probabilities.tolist() == [[1.0], [1.0]]
    assert answer.novelty.tolist() == [0.5, 0.5]


def test_no_embeddings_no_answers() -> None:
    """An empty batch is not an error."""
    head = solve(sums_of([([1, 0, 0, 0, 0], "a"), ([0, 1, 0, 0, 0], "b")]))
    assert head is not None
    answer = head.answer(np.zeros((0, DIMENSION), np.float32), 3)
    assert (answer.labels, answer.probabilities.shape, answer.novelty.shape) == ([], (0, 2), (0,))


def test_a_class_of_few_examples_is_not_drowned() -> None:
    """New classes start small: five examples beside a hundred of each other class must do."""
    x, labels = clusters(100, classes=4)
    kept = [i for i, label in enumerate(labels) if label != "class 3" or i % 20 == 0]
    sums = HeadSums(8, 2.0)
    sums.add(quantise(x[kept], 2.0), [labels[i] for i in kept])
    head = finite(solve(sums), x)
    assert sums.counts["class 3"] == 5
    assert np.mean([found == label for found, label in zip(head.predict(x), labels, strict=True)]) > 0.99


def test_the_prior_moves_the_border_towards_the_rare_class() -> None:
    """With the empirical prior a frequent class takes more of what lies between; with the uniform one it does not."""
    x, labels = clusters(200, classes=2, dimension=2, spread=0.5)
    kept = [i for i, label in enumerate(labels) if label == "class 0" or i % 20 == 0]
    sums = HeadSums(2, 4.0)
    sums.add(quantise(x[kept], 4.0), [labels[i] for i in kept])
    shares = []
    for prior in ("uniform", "sqrt", "empirical"):
        head = solve(sums, prior=prior)
        assert head is not None
        shares.append(head.predict(x).count("class 0"))
    assert shares == sorted(shares)
    assert shares[0] < shares[2]


@pytest.mark.parametrize("prior", ["uniform", "sqrt", "empirical"])
@pytest.mark.parametrize("shrinkage", [1e-6, 1.0])
@pytest.mark.parametrize("pooled", [False, True])
def test_leave_one_out_is_leaving_one_out(prior: Prior, shrinkage: float, pooled: bool) -> None:
    """The closed form must say what the long way says: forget the example, solve again, ask."""
    x, labels = clusters(12, spread=0.5, seed=3)
    labels[-1] = "a class of one"
    q = quantise(x, 2.0)
    sums = HeadSums(8, 2.0)
    sums.add(q, labels)
    slow = []
    for i in range(len(labels)):
        sums.subtract(q[i : i + 1], labels[i : i + 1])
        head = solve(sums, prior=prior, shrinkage=shrinkage, pooled=pooled)
        assert head is not None
        slow.extend(head.predict(dequantise(q[i : i + 1], 2.0)))
        sums.add(q[i : i + 1], labels[i : i + 1])
    fast = leave_one_out(sums, q, labels, prior=prior, shrinkage=shrinkage, pooled=pooled)
    # The closed form holds the shrinkage fixed, of the covariance as of the means, so a single example at a border
    # may differ.
    differing = sum(a != b for a, b in zip(fast, slow, strict=True))
    assert differing <= (0 if shrinkage < 1e-3 and not pooled else 1)
    assert fast[-1] != "a class of one"


def test_leave_one_out_of_the_only_example_is_none() -> None:
    """Without it the head would know no class at all."""
    sums = sums_of([([1, 2, 3, 4, 5], "a")])
    assert leave_one_out(sums, *rows([([1, 2, 3, 4, 5], "a")])) == [None]
    assert leave_one_out(sums, np.zeros((0, DIMENSION), np.int16), []) == []


def test_leave_one_out_of_an_unknown_class_is_refused() -> None:
    """Only what was added can be left out."""
    with pytest.raises(ValueError, match="not in the sums"):
        leave_one_out(sums_of([([1, 2, 3, 4, 5], "a")]), *rows([([1, 2, 3, 4, 5], "b")]))


def test_a_fitted_temperature_makes_probabilities_honest() -> None:
    """Few examples in many dimensions make a head far too sure; what it says of left-out ones must show that."""
    chance = np.random.default_rng(1)
    centres = chance.normal(0, 0.3, (4, 64))
    names = [str(i % 4) for i in range(2120)]
    x = (centres[[int(c) for c in names]] + chance.normal(0, 1.0, (2120, 64))).astype(np.float32)
    taught, asked = slice(0, 120), slice(120, None)
    q = quantise(x, 8.0)
    sums = HeadSums(64, 8.0)
    sums.add(q[taught], names[taught])

    def gap(temperature: float) -> float:
        head = solve(sums, shrinkage=1e-3, temperature=temperature)
        assert head is not None
        answer = head.answer(x[asked], 1)
        right = np.mean([found == name for (found,), name in zip(answer.labels, names[asked], strict=True)])
        return abs(float(answer.probabilities.mean() - right))

    fitted = fit_temperature(sums, q[taught], names[taught], shrinkage=1e-3)
    assert gap(1.0) > 0.2
    assert gap(fitted) < 0.1


def test_a_head_survives_storage_bit_for_bit() -> None:
    """Every worker must answer as the learner would."""
    x, labels = clusters(10)
    sums = HeadSums(8, 2.0)
    sums.add(quantise(x, 2.0), labels)
    head = solve(sums)
    assert head is not None
    loaded = LinearHead.from_tensors(safetensors.numpy.load(safetensors.numpy.save(head.tensors())))
    first, second = head.answer(x, 3), loaded.answer(x, 3)
    assert first.labels == second.labels
    assert first.probabilities.tobytes() == second.probabilities.tobytes()
    assert first.novelty.tobytes() == second.novelty.tobytes()


@pytest.mark.parametrize("broken", ["weight", "bias", "classes", "temperature", "usual", "lift", "width", "nan"])
def test_a_broken_head_is_refused(broken: str) -> None:
    """A head that is torn or not finite must never reach a worker's slot."""
    head = solve(sums_of([([1, 0, 0, 0, 0], "a"), ([0, 1, 0, 0, 0], "b")]))
    assert head is not None
    tensors = head.tensors()
    match broken:
        case "weight":
            tensors["weight"] = tensors["weight"][:1]
        case "nan":
            tensors["bias"] = np.full_like(tensors["bias"], math.nan)
        case "temperature":
            tensors["temperature"] = np.array([0.0])
        case "usual":
            tensors["usual"] = np.array([math.nan])
        case "width":
            tensors["lift"] = np.array([5.0, 1.0, 7.0])
        case _:
            del tensors[broken]
    with pytest.raises(ValueError):
        LinearHead.from_tensors(tensors)


def test_equal_sums_solve_to_equal_heads() -> None:
    """Two learners with the same sums announce the same digest."""
    x, labels = clusters(10)
    q = quantise(x, 2.0)
    forward, backward = HeadSums(8, 2.0), HeadSums(8, 2.0)
    forward.add(q, labels)
    for i in reversed(range(len(labels))):
        backward.add(q[i : i + 1], labels[i : i + 1])
    heads = [solve(forward), solve(backward)]
    assert heads[0] is not None
    assert heads[1] is not None
    assert safetensors.numpy.save(heads[0].tensors()) == safetensors.numpy.save(heads[1].tensors())


def test_features_have_the_same_bits_in_any_batch() -> None:
    """The ledger keeps embeddings only: what is subtracted in a year must be what is added today, batch or no batch."""
    chance = np.random.default_rng(0)
    q = chance.integers(-LEVELS, LEVELS + 1, (300, 48)).astype(np.int16)
    lift = Lift(48, 2.0, 96)
    whole = lift.integers(q)
    assert whole.shape == (300, 96)
    assert (whole == np.rint(whole)).all()
    assert (whole.min(), whole.max()) == (0.0, LEVELS)
    for part in (1, 7, 64):
        pieces = [lift.integers(q[i : i + part]) for i in range(0, len(q), part)]
        assert np.concatenate(pieces).tobytes() == whole.tobytes()


def test_the_projection_never_changes() -> None:
    """A head announced by one release is asked by another, so the features are part of the format."""
    assert Lift(3, 1.0, 2).integers(np.array([[1000, 0, 0], [0, 1000, 0], [0, 0, -1000]], np.int16)).tolist() == [
        [445.0, 0.0],
        [0.0, 453.0],
        [0.0, 117.0],
    ]


def test_asking_and_learning_see_the_same_features() -> None:
    """Workers compute features in float32 from the embedding as it comes; rounding may be all that differs."""
    x = np.random.default_rng(0).normal(0, 0.3, (50, 48)).astype(np.float32)
    lift = Lift(48, 2.0, 96)
    step = 2.0 / LEVELS
    assert np.abs(lift.integers(quantise(x, 2.0)) * step - lift.floats(x)).max() < 5 * step


def rings(n: int, seed: int) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Two classes, one around the other: no line tells them apart."""
    chance = np.random.default_rng(seed)
    angle, inner = chance.uniform(0, 2 * math.pi, n), np.arange(n) % 2 == 0
    radius = np.where(inner, 0.4, 1.2) + chance.normal(0, 0.1, n)
    flat = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return flat.astype(np.float32), ["inner" if i else "outer" for i in inner]


@pytest.mark.parametrize(("width", "least", "most"), [(0, 0.3, 0.7), (64, 0.95, 1.0)])
def test_a_wide_head_separates_what_no_line_does(width: int, least: float, most: float) -> None:
    """This is what random features are for, and what a head without them cannot do."""
    x, labels = rings(400, 0)
    sums = HeadSums(2, 2.0, width)
    sums.add(quantise(x, 2.0), labels)
    asked, expected = rings(400, 1)
    head = finite(solve(sums), asked)
    right = np.mean([found == label for found, label in zip(head.predict(asked), expected, strict=True)])
    assert least <= right <= most


def test_a_wide_head_unlearns_exactly_and_survives_storage() -> None:
    """Random features must cost none of the promises that the sums make."""
    x, labels = clusters(10)
    q = quantise(x, 2.0)
    taught = HeadSums(8, 2.0, 32)
    taught.add(q[:15], labels[:15])
    before = bits(taught)
    for i in reversed(range(15, 30)):
        taught.add(q[i : i + 1], labels[i : i + 1])
    taught.subtract(q[15:], labels[15:])
    assert bits(taught) == before
    assert bits(HeadSums.from_tensors(safetensors.numpy.load(before))) == before
    with pytest.raises(ValueError, match="cannot join"):
        taught.merge(HeadSums(8, 2.0))
    head = solve(taught)
    assert head is not None
    assert (head.dimension, head.weight.shape[1]) == (8, 32)
    loaded = LinearHead.from_tensors(head.tensors())
    assert loaded.scores(x).tobytes() == head.scores(x).tobytes()


def test_means_of_few_examples_borrow_from_the_others() -> None:
    """A new class with five labels is mostly noise in many dimensions; shrinking must find more of it."""
    chance = np.random.default_rng(5)
    directions = chance.normal(0, 1.0, (6, 96))
    means = chance.normal(0, 0.8, (20, 6)) @ directions
    names = [f"class {c:02}" for c in range(20)]
    taught = np.repeat(np.arange(20), [5] * 4 + [80] * 16)
    asked = np.repeat(np.arange(20), 50)
    x = (means[taught] + chance.normal(0, 2.2, (len(taught), 96))).astype(np.float32)
    fresh = (means[asked] + chance.normal(0, 2.2, (len(asked), 96))).astype(np.float32)
    sums = HeadSums(96, 32.0)
    sums.add(quantise(x, 32.0), [names[c] for c in taught])
    recall = {}
    for pooled in (False, True):
        head = solve(sums, pooled=pooled)
        assert head is not None
        hits = np.array([found == names[c] for found, c in zip(head.predict(fresh), asked, strict=True)])
        recall[pooled] = (hits[asked < 4].mean(), hits[asked >= 4].mean())
    assert recall[True][0] > recall[False][0] + 0.1
    assert recall[True][1] > recall[False][1] - 0.03


def test_calibrating_with_the_solution_is_calibrating_before_it() -> None:
    """Both share a factorisation; what is announced must not depend on that."""
    chance = np.random.default_rng(5)
    labels = [str(number % 3) for number in range(90)]
    q = quantise(np.array([[int(label)] * 8 for label in labels]) + chance.normal(0, 0.6, (90, 8)), 4.0)
    sums = HeadSums(8, 4.0, 16)
    sums.add(q, labels)
    shared = solve(sums, prior="uniform", calibrate_on=(q, labels))
    alone = solve(sums, prior="uniform", calibration=calibrate(sums, q, labels, prior="uniform"))
    assert shared is not None
    assert alone is not None
    assert shared.temperature != getattr(solve(sums, prior="uniform"), "temperature", None)
    assert {name: array.tobytes() for name, array in shared.tensors().items()} == {
        name: array.tobytes() for name, array in alone.tensors().items()
    }


@pytest.mark.parametrize("width", [0, 64])
def test_calibrated_novelty_means_a_share_of_known_events(width: int) -> None:
    """Above 0.5 must lie about one known event in twenty, and most of what belongs to no class."""
    centres = np.random.default_rng(2).normal(0, 0.5, (5, 24))

    def around(seed: int, n: int, which: list[int]) -> tuple[npt.NDArray[np.float32], list[str]]:
        chance = np.random.default_rng(seed)
        classes = np.array([which[i % len(which)] for i in range(n)])
        return (centres[classes] + chance.normal(0, 0.3, (n, 24))).astype(np.float32), [str(c) for c in classes]

    x, labels = around(0, 400, [0, 1, 2, 3])
    q = quantise(x, 4.0)
    sums = HeadSums(24, 4.0, width)
    sums.add(q, labels)
    head = solve(sums, calibration=calibrate(sums, q, labels))
    assert head is not None
    known = head.answer(around(1, 2000, [0, 1, 2, 3])[0], 1).novelty
    unknown = head.answer(around(2, 500, [4])[0], 1).novelty
    assert 0.02 < (known > 0.5).mean() < 0.10
    assert (unknown > 0.5).mean() > 0.5
