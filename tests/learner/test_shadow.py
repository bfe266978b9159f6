"""After a promotion the loser answers along: a worse champion gives its place back by itself, an equal one keeps it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load
from scipy.integrate import quad

from learner.app import close_duel
from learner.control import ControlAnswer
from learner.encoders import Encoder, build_telemetry_encoder
from learner.exam import ExamSettings
from learner.heads import HeadSums, quantise
from learner.joining import Joiner, JoinTopics
from learner.online import EncoderShelf, OnlineLearner, StreamPlan
from learner.registry import Lineage, Registry, VersionManifest
from learner.shadow import Duel, Outcome, ShadowSettings, Tally
from monitoring.drift import DriftMonitor
from monitoring.metrics import Metrics
from replay.store import LearnerStore, StoreSettings, Transaction
from stream.batches import Batch
from stream.events import Decoder, Label, Place, Prediction, Record, StreamRules, Telemetry, encode

NOW = datetime(2024, 5, 1, tzinfo=UTC)
STREAM = "probe"
CLASSES = ("slow", "middle", "fast")


def duel(classes: Sequence[str] = CLASSES) -> Duel:
    return Duel(champion="v2", loser="v1", encoder="sha", classes=list(classes), began_at=NOW)


def outcomes(champion: Iterable[bool], loser: Iterable[bool], labels: Iterable[str]) -> list[Outcome]:
    rows = zip(champion, loser, labels, strict=True)
    return [Outcome(f"e{row}", label, bool(c), bool(s)) for row, (c, s, label) in enumerate(rows)]


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_capital_is_the_stated_mixture(won: int, lost: int) -> None:
    """The closed form is what is used; the integral over all bets is what the guarantee is proven for."""
    expected, _ = quad(lambda p: 2 * (2 * p) ** lost * (2 * (1 - p)) ** won, 0.5, 1.0)
    assert math.exp(Tally(won=won, lost=lost).log_capital) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_capital_is_a_fair_bet_at_every_step() -> None:
    """What makes it safe to look after every label: from any state the mean of the next is the present."""
    for won in range(12):
        for lost in range(12):
            here = math.exp(Tally(won=won, lost=lost).log_capital)
            after = [math.exp(t.log_capital) for t in (Tally(won=won + 1, lost=lost), Tally(won=won, lost=lost + 1))]
            assert sum(after) / 2 == pytest.approx(here)


def test_an_equal_champion_is_rolled_back_no_more_often_than_stated() -> None:
    """Looked at after every label for 200 labels, over ten classes, with one answer in five different.

    Of 200 duels at alpha 0.1 at most 20 are to be expected; there are fewer, as bets lose a little.
    """
    rng = np.random.default_rng(7)
    settings = ShadowSettings(labels=200, alpha=0.1)
    names = [f"class-{number}" for number in range(10)]
    fallen = 0
    for _ in range(200):
        differ = rng.random(200) < 0.2
        one = rng.random(200) < 0.5
        same = rng.random(200) < 0.8
        found = outcomes(np.where(differ, one, same), np.where(differ, ~one, same), rng.choice(names, 200))
        fallen += bool(duel(names).after(found, settings, 0.0).reason)
    assert fallen / 200 <= 0.1
    assert fallen > 0, "a test that can never fire guards nothing"


def test_a_worse_champion_is_found_over_all_labels_and_in_one_class() -> None:
    """Both ways of being worse, with words that say which; a champion that wins as much as it loses stays."""
    settings = ShadowSettings()
    rows = range(60)
    worse = duel().after(outcomes([row % 2 == 0 for row in rows], [True for _ in rows], ["slow"] * 60), settings, 0.05)
    assert worse.reason.startswith("v2 is worse than v1 on the labels since: of ")
    assert worse.total.seen < 60, "it ends as soon as it is decided"
    # One class is lost to the loser; in the others the champion wins as many.
    champion = [row % 2 == 0 for row in range(80)]
    one = duel().after(
        outcomes(champion, [not c for c in champion], ["fast" if not c else "slow" for c in champion]), settings, 0.05
    )
    assert "worse than v1 on labels of class 'fast': of 1" in one.reason
    even = duel().after(outcomes(champion, [not c for c in champion], ["slow"] * 80), settings, 0.05)
    assert not even.reason


def test_a_duel_is_bounded_in_labels_and_survives_as_text() -> None:
    """It costs a second embedding for each label, so it must end; and a restart must find it as it was."""
    settings = ShadowSettings(labels=10)
    found = duel().after(outcomes([True] * 30, [True] * 30, ["slow", "new", "newer"] * 10), settings, 0.05)
    assert found.total.seen == 10
    assert found.over(settings)
    assert not found.reason
    assert Duel.model_validate_json(found.model_dump_json()) == found
    assert sum(found.stakes(["slow", "middle", "fast", *(f"new-{n}" for n in range(1_000))]).values()) < 1.0


class Log:
    """The log in memory: events by place."""

    def __init__(self) -> None:
        self.records: dict[Place, Record] = {}

    def read(self, places: Iterable[Place]) -> dict[Place, Record]:
        return {place: self.records[place] for place in places if place in self.records}


class Bench:
    """A learner's store, joiner and learning line, without Kafka."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.rng, self.count = folder, Log(), np.random.default_rng(3), 0
        self.open()

    def open(self) -> None:
        """Begin, or begin again: everything but the log is read from the disk."""
        self.store = LearnerStore(f"sqlite:///{self.folder}/learner.db", settings=StoreSettings(exam_from=10))
        self.registry = Registry(str(self.folder / "registry"))
        epoch = self.store.claim("test", NOW)
        plan = StreamPlan(STREAM, "telemetry", ("x",), lambda: rich(0), shadow=ShadowSettings(labels=200))
        self.metrics = metrics = Metrics()
        shelf = EncoderShelf(self.registry, "cpu")
        self.learner = OnlineLearner(plan, self.store, self.registry, shelf, epoch, "model-versions", metrics)
        self.learner.open(NOW)
        self.joiner = Joiner(
            self.store,
            epoch,
            Decoder([StreamRules(STREAM, "telemetry", ("x",))]),
            self.log,  # type: ignore[arg-type]
            {STREAM: self.learner},
            {STREAM: DriftMonitor()},
            JoinTopics("predictions", "labels", "dead-letters"),
            {},
            metrics,
            lambda: NOW + timedelta(seconds=self.count),
        )
        self.joiner.starts([("predictions", 0), ("labels", 0)])

    def labels(self, many: int) -> None:
        """So many events that were answered and labelled, ten a step."""
        for start in range(self.count, self.count + many, 10):
            records = [record for row in range(start, start + 10) for record in self._labelled(row)]
            ends = {("predictions", 0): start + 10, ("labels", 0): start + 10}
            self.count = start + 10
            self.joiner.step(Batch(records, {}, ends, 1))

    def _labelled(self, row: int) -> tuple[Record, Record]:
        name = CLASSES[row % 3]
        steps = np.arange(32)
        frequency = {"slow": 1.0, "middle": 1.6, "fast": 2.5}[name]
        wave = np.sin(self.rng.random() * 6 + frequency * steps / 3) + 0.6 * self.rng.normal(size=32)
        event = Telemetry(
            event_id=f"e-{row}", stream=STREAM, observed_at=NOW, channels=["x"], values=[[float(v) for v in wave]]
        )
        ref = Place(topic="telemetry", partition=0, offset=row)
        self.log.records[ref] = Record("telemetry", 0, row, event.event_id.encode(), encode(event))
        answer = Prediction(
            event_id=event.event_id,
            stream=STREAM,
            label="slow",
            probabilities={"slow": 1.0},
            novelty=0.5,
            model_version="v1.1",
            ref=ref,
            observed_at=NOW,
            predicted_at=NOW,
        )
        label = Label(event_id=event.event_id, stream=STREAM, label=name, labeller="ann", labelled_at=NOW)
        return (
            Record("predictions", 0, row, event.event_id.encode(), encode(answer)),
            Record("labels", 0, row, event.event_id.encode(), encode(label)),
        )

    def promote(self, encoder: Encoder) -> str:
        """Put a version with this encoder into service, as an exam that let it through would."""
        spec = encoder.sealed()
        digest = self.registry.put_encoder(spec, encoder.files())
        manifest = VersionManifest(
            stream=STREAM, parent="v1", created_at=NOW, encoder=spec, lineage=Lineage(strategy="replay")
        )
        name = self.registry.commit(manifest)
        manifest = self.registry.version(STREAM, name)

        def record(tx: Transaction) -> None:
            tx.add_version(STREAM, encoder=digest, head="", state="promoted", parent=1, number=manifest.number)

        self.learner.put_in_service(manifest, {}, "test", NOW, record, shadow=True)
        return name


def rich(seed: int) -> Encoder:
    """Enough components to tell the classes apart."""
    return build_telemetry_encoder(["x"], seed, window=32, dimension=48, learned=4)


def poor() -> Encoder:
    """Four components, which are too few."""
    return build_telemetry_encoder(["x"], 1, window=32, dimension=4, learned=1)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


def test_a_worse_champion_is_rolled_back_by_itself(bench: Bench) -> None:
    """The exam can be wrong, and the world can change: live labels have the last word, and the reason is kept."""
    bench.labels(90)
    assert bench.promote(poor()) == "v2"
    assert bench.learner.duel is not None
    bench.labels(20)
    before = bench.learner.duel
    assert before is not None
    assert before.total.seen == 20
    bench.store.close()
    bench.open()
    assert bench.learner.duel == before, "a restart finds the duel as it was"
    while bench.learner.overruled is None and bench.count < 320:
        bench.labels(10)
    assert bench.learner.overruled is not None
    why = bench.learner.overruled.reason
    bench.learner.pause(NOW)
    close_duel(bench.learner, "audit", bench.metrics, NOW)
    assert bench.learner.version == "v2", "what was pinned by hand stays"
    bench.learner.resume(NOW)
    close_duel(bench.learner, "audit", bench.metrics, NOW)
    (told,) = [message for message in bench.store.outbox() if message.topic == "audit"]
    assert told.value is not None
    assert ControlAnswer.model_validate_json(told.value).reason == why
    counted = bench.metrics.registry.get_sample_value
    assert counted("trimtab_versions_total", {"stream": STREAM, "outcome": "overruled"}) == 1
    assert bench.learner.version == "v1"
    assert bench.learner.serving.version == "v1"
    assert bench.learner.duel is None
    assert why.startswith("v2 is worse than v1")
    state = next(row for row in bench.store.versions(STREAM) if row.number == 2)
    assert (state.state, state.detail["rolled_back"]) == ("rolled_back", why)
    reign = bench.store.champion(STREAM)
    assert reign is not None
    assert reign.cause == f"rolled back by itself: {why}"
    assert bench.registry.champions(STREAM)[-1].why == why


def test_an_equal_champion_stays_and_its_shadow_goes_on_learning(bench: Bench) -> None:
    """An encoder of another seed is as good; the loser, taught every label too, must not lose for lack of them.

    Its head, followed label by label over a restart, is that of one who learned the same examples at once.
    """
    bench.labels(60)
    expected = bench.learner.sums.copy()
    bench.promote(rich(5))
    bench.labels(60)
    bench.store.close()
    bench.open()
    bench.labels(60)
    shadow, duel = bench.learner._shadow, bench.learner.duel
    assert shadow is not None
    assert duel is not None
    # What the exam took since leaves both heads.
    since = bench.store.examples(STREAM, exam=False, event_ids=duel.tried)
    assert 60 < len(since) < 120
    loser = rich(0)
    embedded = quantise(loser.embed([row.payload for row in since]), loser.spec.bound)
    expected.add(embedded, [row.label for row in since])
    assert shadow.sums.counts == expected.counts
    np.testing.assert_allclose(shadow.sums.class_sums(), expected.class_sums(), atol=60)
    bench.labels(90)
    assert bench.learner.overruled is None
    duel = bench.learner.duel
    assert duel is not None
    assert duel.over(bench.learner.plan.shadow)
    assert not duel.reason
    close_duel(bench.learner, "audit", bench.metrics, NOW)
    assert (bench.learner.duel, bench.learner.version) == (None, "v2")
    assert bench.store.recall(f"shadow/{STREAM}") == "null"


def test_a_refused_version_may_be_examined_again_as_labels_arrive(bench: Bench) -> None:
    """What was refused on few labels gets another look on more, taught what is known by then, and each look counts."""
    bench.labels(150)
    worse, spec = poor(), poor().sealed()
    bench.registry.put_encoder(spec, worse.files())
    lineage = Lineage(strategy="replay")
    name = bench.registry.commit(
        VersionManifest(stream=STREAM, parent="v1", created_at=NOW, encoder=spec, lineage=lineage)
    )
    manifest = bench.registry.version(STREAM, name)
    first, known = bench.learner.examine_again(manifest, ExamSettings(), NOW)
    assert not first.promote
    assert set(known) == {row.event_id for row in bench.store.examples(STREAM)}
    again, _ = bench.learner.examine_again(manifest, ExamSettings(), NOW)
    assert (first.look, again.look) == (2, 3)
    itself = bench.registry.version(STREAM, "v1")
    assert bench.learner.examine_again(itself, ExamSettings(), NOW)[0].promote


def test_what_is_forgotten_is_not_remembered_by_the_loser(bench: Bench) -> None:
    """A head kept for comparison is a copy of what was learned; it goes where someone asks to be forgotten."""
    bench.labels(60)
    bench.promote(rich(5))
    bench.labels(30)
    duel = bench.learner.duel
    assert duel is not None
    saved = bench.store.sums(STREAM, duel.encoder)
    assert saved is not None
    bench.learner.forget([duel.tried[0]], NOW)
    assert bench.learner.duel is None
    empty = bench.store.sums(STREAM, duel.encoder)
    assert empty is not None
    assert HeadSums.from_tensors(load(empty[1])).total == 0
    bench.store.close()
    bench.open()
    assert bench.learner.duel is None
