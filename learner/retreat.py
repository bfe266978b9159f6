"""Where to go back to, and whose answers are suspect, from what was in service when. Pure.

A retreat is named by a moment, by the version that should not have been promoted, or by the first revision that went
wrong. What is suspect is what was announced from then on and had not served before: a version that was put back
meanwhile is none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from learner.control import Refused
from learner.registry import Champion, HeadRef
from stream.reissue import Suspects

SKEW = timedelta(minutes=5)
"""How far the clocks of learner, workers and brokers may differ."""


@dataclass(frozen=True)
class Retreat:
    """Args:
    target: the version or the exact revision to go back to.
    since: from when on the topic of predictions has to be read.
    why: how `target` was chosen, in a sentence.
    began: when the first suspect was announced.
    """

    target: str
    suspects: Suspects
    since: datetime
    why: str
    began: datetime


def retreat(stream: str, champions: Sequence[Champion], revisions: Sequence[HeadRef], since: datetime | str) -> Retreat:
    """The way back.

    Args:
        champions: what went into service, oldest first.
        revisions: the revisions whose heads are stored, oldest first.
        since: a moment, a version such as `v13`, or a revision such as `v13.40`.

    Raises:
        Refused: there is nothing to go back from or to; the message says why.
    """
    if not champions:
        raise Refused(f"stream {stream!r} has had no version in service yet")
    if isinstance(since, str) and "." in since:
        return _from_revision(stream, champions, revisions, since)
    if isinstance(since, str):
        first = next((place for place, line in enumerate(champions) if line.version == since), None)
        if first is None:
            known = ", ".join(dict.fromkeys(line.version for line in champions))
            raise Refused(f"{since} of stream {stream!r} was never in service; there were: {known}")
    else:
        before = [line.version for line in champions if line.since < since]
        if not before:
            raise Refused(f"nothing was in service before {since:%Y-%m-%d %H:%M:%S} UTC")
        found = (place for place, line in enumerate(champions) if line.since >= since and line.version not in before)
        first = next(found, None)
        if first is None:
            return _within(stream, champions, revisions, since)
    if first == 0:
        raise Refused(f"{champions[0].version} is the first version of stream {stream!r}; there is none to go back to")
    return Retreat(
        champions[first - 1].version,
        Suspects(stream, dict.fromkeys(_new_from(champions, first), 0)),
        champions[first].since - SKEW,
        f"{champions[first - 1].version} was in service before {champions[first].version}",
        champions[first].since,
    )


def leaving(stream: str, champions: Sequence[Champion], target: str | None) -> Retreat:
    """What is left behind by going back to a version, put back by hand or not: all that served since it last did.

    Args:
        champions: what went into service, oldest first.
        target: the version to go back to; None is the one that served before the present one.

    Raises:
        Refused: there is nothing to go back to, or it is in service.
    """
    if not champions:
        raise Refused(f"stream {stream!r} has had no version in service yet")
    present = champions[-1].version
    others = [place for place, line in enumerate(champions) if line.version != present]
    if target is None and not others:
        raise Refused(f"{present} is the first version of stream {stream!r}; there is none to go back to")
    target = target or champions[others[-1]].version
    if target == present:
        raise Refused(f"{target} of stream {stream!r} is in service")
    # Where it never served, only the present one is left for it.
    last = max((place for place in others if champions[place].version == target), default=others[-1] if others else -1)
    left = dict.fromkeys((line.version for line in champions[last + 1 :]), 0)
    since = champions[last + 1].since
    why = f"{target} served until {since:%Y-%m-%d %H:%M:%S} UTC"
    # What it answered when it served before is none of this.
    back = not left.keys().isdisjoint(line.version for line in champions[: last + 1])
    return Retreat(target, Suspects(stream, left), since if back else since - SKEW, why, since)


def _new_from(champions: Sequence[Champion], first: int) -> list[str]:
    """The versions that went into service from here on and never before."""
    before = {line.version for line in champions[:first]}
    return list(dict.fromkeys(line.version for line in champions[first:] if line.version not in before))


def _from_revision(stream: str, champions: Sequence[Champion], revisions: Sequence[HeadRef], name: str) -> Retreat:
    version, number = name.partition(".")[0], int(name.partition(".")[2])
    first = next((place for place, line in enumerate(champions) if line.version == version), None)
    if first is None:
        raise Refused(f"{version} of stream {stream!r} was never in service")
    own = [ref for ref in revisions if ref.version == version]
    earlier = [ref for ref in own if ref.revision < number]
    if not earlier:
        raise Refused(f"no revision of {version} before {name} is stored any more; give --since {version}")
    at = next((ref.stored_at for ref in own if ref.revision >= number), champions[first].since)
    return Retreat(
        earlier[-1].name,
        Suspects(stream, {version: number} | dict.fromkeys(_new_from(champions, first + 1), 0)),
        at - SKEW,
        f"{earlier[-1].name} is the last revision before {name} that is stored",
        at,
    )


def _within(stream: str, champions: Sequence[Champion], revisions: Sequence[HeadRef], since: datetime) -> Retreat:
    """No version is new since then: go back within the one that was in service."""
    version = next(line.version for line in reversed(champions) if line.since < since)
    later = [ref for ref in revisions if ref.version == version and ref.stored_at >= since]
    if not later:
        raise Refused(f"nothing was announced since {since:%Y-%m-%d %H:%M:%S} UTC; {version} answers as it did")
    return _from_revision(stream, champions, revisions, later[0].name)
