"""The console's numbers by their definition, its memory by its bound, and what it says of a stream."""

from __future__ import annotations

import http.client
import itertools
import random
import re
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from deploy.console.curves import FEWEST, RECENT, accuracy, delays, heat, thinned
from deploy.console.front import Front
from deploy.console.query import forgetting, keeping_up, moving, right, seen
from deploy.console.site import assets
from deploy.console.watch import Neighbour, Ring
from replay.history import Judged
from stream.events import Report, Telemetry, encode

START = datetime(2024, 5, 1, tzinfo=UTC)


def judged(count: int, seed: int = 0) -> list[Judged]:
    """Answers every second, whose labels come one to a hundred seconds later, in the order of the labels."""
    chance, rows = random.Random(seed), []
    for number in range(count):
        asked = START + timedelta(seconds=number)
        label = chance.choices("abc", (5, 3, 1))[0]
        predicted = label if chance.random() < 0.7 else chance.choice("abc")
        came = asked + timedelta(seconds=chance.uniform(1, 100))
        rows.append(Judged(str(number), label, predicted, f"v{1 + number // 300}.{number}", asked, asked, came, came))
    return sorted(rows, key=lambda one: one.scored_at)


def share(pairs: list[tuple[Any, Any]]) -> float:
    return round(sum(a == b for a, b in pairs) / len(pairs), 4)


def test_the_rivals_know_only_the_labels_that_had_come() -> None:
    """A baseline that is told each label at once wins against every model whose labels are late."""
    rows = judged(400)
    now = accuracy(rows, {})["now"]
    no_change, majority = [], []
    for one in rows:
        assert one.predicted_at is not None
        known = [other.label for other in rows if other.scored_at < one.predicted_at]
        no_change.append((one.label, known[-1] if known else None))
        most = max(set(known), key=known.count) if known else None
        majority.append((one.label, most))
    assert now["n"] == 400
    assert now["served"] == share([(one.label, one.predicted) for one in rows])
    assert now["no_change"] == share(no_change)
    # Of classes that lead together either may stand.
    assert now["majority"] == pytest.approx(share(majority), abs=0.02)


def test_a_frozen_twin_is_compared_on_what_it_answered() -> None:
    """A twin that was started late must neither be punished for that nor rewarded."""
    rows = judged(600)
    frozen = {one.event_id: one.label if int(one.event_id) % 4 else "x" for one in rows[300:]}
    found = accuracy(rows, frozen)
    both = [(one.label, frozen[one.event_id]) for one in rows[-RECENT:] if one.event_id in frozen]
    assert found["now"]["frozen"] == share(both)
    assert found["curve"]["frozen"][0] is None
    assert accuracy(rows, {})["now"]["frozen"] is None


def test_a_share_of_few_answers_is_not_shown() -> None:
    """Three right of four is no accuracy, and a chart of it would be taken for one."""
    found = accuracy(judged(FEWEST - 1), {})
    assert found["now"]["served"] is None
    assert found["curve"]["t"] == []
    assert accuracy([], {})["now"]["n"] == 0
    assert heat([], {}, 0.1)["classes"] == []
    assert delays([])["now"]["p50"] is None


def test_a_class_that_fell_below_its_budget_comes_first() -> None:
    """The heat map is read from the top, at night."""
    rows = judged(700)
    best = {"a": 0.75, "b": 1.0, "c": 0.2}
    found = heat(rows, best, 0.15)
    assert found["versions"] == ["v1", "v2", "v3"]
    assert next(row["class"] for row in found["classes"]) == "b"
    assert [row["class"] for row in found["classes"] if row["forgotten"]] == ["b"]
    for row in found["classes"]:
        for version, cell in zip((1, 2, 3), row["cells"], strict=True):
            its = [o for o in rows if o.label == row["class"] and o.model_version.startswith(f"v{version}.")]
            assert cell == [sum(o.label == o.predicted for o in its), len(its)]
    check = forgetting(found, 500)
    assert (check.level, "b fell more than 15%" in check.says) == ("look", True)


def test_many_classes_and_versions_stay_a_page() -> None:
    """A thousand classes over a hundred versions must not become a table of a hundred thousand cells."""
    rows = [
        Judged(str(n), f"class {n % 1000}", None, f"v{n // 60}.1", START, START, START, START + timedelta(seconds=n))
        for n in range(6_000)
    ]
    found = heat(rows, {}, 0.1)
    assert len(found["classes"]) <= 60
    assert len(found["versions"]) <= 30
    assert found["more"] == 1_000 - len(found["classes"])


def test_a_ring_covers_a_whole_life_in_bounded_memory() -> None:
    """The page is left open for weeks; its chart must begin when the learner did."""
    ring = Ring(["x"], size=100)
    for second in range(10_000):
        ring.add(float(second), {"x": float(second)})
        assert len(ring.columns()["t"]) <= 100
    times = ring.columns()["t"]
    assert times == ring.columns()["x"]
    assert len(times) >= 40
    steps = {b - a for a, b in itertools.pairwise(times)}  # type: ignore[operator]
    assert len(steps) == 1, "points of equal spacing"
    assert times[0] < 300  # type: ignore[operator]
    assert times[-1] > 9_700  # type: ignore[operator]


def test_a_drawn_series_keeps_its_peaks_and_its_gaps() -> None:
    """A spike of one step is what a person labels by; a picture that leaves it out shows another event."""
    row: list[float | None] = [0.0] * 10_000
    row[7_777], row[3_333] = 9.0, -5.0
    row[4_000:6_000] = [None] * 2_000
    found = thinned(row, 400)
    assert len(found) <= 400
    assert {9.0, -5.0, None} <= set(found)
    assert found.index(-5.0) < found.index(None) < found.index(9.0)
    assert thinned([1.0, None, 2.0], 400) == [1.0, None, 2.0]


def test_an_event_is_shown_as_its_labeller_needs_it() -> None:
    """Text as text, a window as its channels; and what is no event any more as the bytes that lie there."""
    text = Report(event_id="a", stream="s", observed_at=START, text="x" * 20_001)
    assert seen(encode(text)) == {"text": "x" * 20_000, "more": 1}
    names = [str(number) for number in range(40)]
    window = Telemetry(event_id="a", stream="s", observed_at=START, channels=names, values=[[1.0, None]] * 40)
    shown = seen(encode(window))
    assert shown is not None
    assert (len(shown["channels"]), shown["more"]) == (32, 8)
    assert shown["channels"][1] == {"name": "1", "values": [1.0, None]}
    for torn in (None, b"", b"{", b"\xff", b'{"text": 1}', b"[" * 10_000):
        assert seen(torn) is None


def test_a_model_that_a_rival_beats_is_not_called_good() -> None:
    """The console must not praise what repeating the last label does better."""
    now = {"served": 0.9, "frozen": None, "no_change": 0.95, "majority": 0.3, "n": 500}
    assert right(now).level == "look"
    assert "no change would be right more often" in right(now).says
    assert right({**now, "n": 40}).level == "none"
    assert right({**now, "no_change": 0.5}).level == "good"
    assert right({**now, "served": None, "n": 3}).level == "none"


def test_drift_is_named_by_what_drifted() -> None:
    """Drift of the errors and of the inputs call for different things."""
    assert "the errors" in moving({"input": "none", "prediction": "warning", "error": "drift"}).says
    assert moving({"input": "none", "prediction": "none", "error": "none"}).level == "good"


def test_silence_and_a_stop_are_told_apart() -> None:
    """No event to answer is well; events that wait and nobody who answers are not."""
    there = Neighbour("http://a", at=100.0)
    behind = Neighbour("http://a", at=100.0, lag={"reports": 7.0})
    gone = Neighbour("http://b", at=50.0, why="connection refused")
    assert keeping_up(99.0, [there], {}, 100.0).level == "good"
    assert keeping_up(1.0, [there], {}, 1_000.0).level == "none"
    assert keeping_up(1.0, [behind], {}, 1_000.0).level == "bad"
    assert keeping_up(99.0, [gone], {}, 100.0).level == "bad"
    assert keeping_up(99.0, [there, gone], {}, 100.0).level == "look"
    assert keeping_up(None, [], {}, 100.0).level == "none"
    assert keeping_up(99.0, [there], {"source": "no broker"}, 100.0).level == "bad"


def test_the_demo_s_address_answers_before_the_learner_and_leads_to_it() -> None:
    """The first second of a demo is when its address is clicked."""
    with socket.socket() as later:
        later.bind(("127.0.0.1", 0))
        with Front(later.getsockname()[1]) as front:
            front.says = "<b>loading</b>"
            before = get(front.url)
            assert before.status == 200
            assert "&lt;b&gt;loading" in before.read().decode()
            later.listen()
            after = get(front.url)
            assert after.status == 302
            assert after.headers["Location"] == f"http://127.0.0.1:{later.getsockname()[1]}/console/"


def get(url: str) -> http.client.HTTPResponse:
    """An answer, without following where it leads."""
    connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=10)
    connection.request("GET", "/")
    return connection.getresponse()


def test_the_page_names_no_other_address() -> None:
    """It works where nothing else can be reached, and tells nobody who looks at it."""
    files = assets()
    own = {name: asset.body.decode() for name, asset in files.items() if name != "LICENSES.txt"}
    for name, text in own.items():
        outside = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", re.sub(r"^/\*.*?\*/", "", text))) - {
            "http://www.w3.org"
        }
        assert not outside, (name, outside)
    loaded = set(re.findall(r'(?:src|href)="([^"#]+)"', own["index.html"]))
    loaded |= {name for text in own.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert loaded <= set(files)
    for library in ("preact.js", "uplot.js"):
        assert library in files["LICENSES.txt"].body.decode()
    assert sum(len(asset.body) for asset in files.values()) < 250_000
