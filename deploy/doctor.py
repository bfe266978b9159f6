"""Whatever a pipeline needs, looked at one thing after the other: what is wrong, and how to mend it.

Nothing is written. A part that cannot be looked at
because another is wrong says so and is no second fault.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from deploy.settings import Settings, load_settings, settings_path, unreadable
from learner.control import FRESH
from learner.registry import BrokenVersion
from replay.schema import masked
from stream.errors import Misconfigured, RetryLater, Stop, TrimtabError

State = Literal["ok", "note", "wrong"]

LEAST_FREE = 2**30
"""Bytes below which a disk is called nearly full: a fine-tune writes a few encoders."""
CLOCKS_APART = timedelta(seconds=30)
"""Of two machines; beyond `learner.control.FRESH` requests are refused, and this leaves time to mend it."""
HTTP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one thing.

    Args:
        check: which thing: `settings`, `broker`, `topics`, `database`, `registry`, `gpu`, `versions`, `clock`,
            `disk`, `learner`.
        state: `wrong` where something does not work as it is; `note` where it may be meant so.
        found: a sentence.
        mend: what to do; empty where nothing needs doing.
    """

    check: str
    state: State
    found: str
    mend: str = ""

    def as_json(self) -> dict[str, str]:
        """Its fields."""
        return asdict(self)


def examine(path: Path | None) -> Iterator[Finding]:
    """Look at everything that the settings name, and at this machine.

    Args:
        path: the settings file; see `deploy.settings.settings_path`.
    """
    yield from _guarded("versions", _packages)
    try:
        settings = load_settings(path)
    except Misconfigured as refusal:
        yield Finding("settings", "wrong", str(refusal), "write one with `trimtab init`, or mend the lines named")
        return
    lacking = unreadable(settings)
    yield from (Finding("settings", "wrong", line, "make the file, or change the key") for line in lacking)
    if not lacking:
        yield Finding("settings", "ok", f"{settings_path(path)} can be used")
    broker = list(_guarded("broker", lambda: _broker(settings)))
    yield from broker
    if all(finding.state != "wrong" for finding in broker):
        yield from _guarded("topics", lambda: _topics(settings))
    else:
        yield Finding("topics", "note", "not looked at: no broker answers")
    yield from _guarded("database", lambda: _database(settings))
    yield from _guarded("registry", lambda: _registry(settings))
    yield from _guarded("gpu", lambda: _gpu(settings))
    yield from _guarded("disk", lambda: _disks(settings))
    yield from _guarded("learner", lambda: _learner(settings))


def _guarded(check: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a look finds; an error that leaves it is a finding too."""
    try:
        yield from look()
    except TrimtabError as error:
        yield Finding(check, "wrong", str(error), "" if isinstance(error, Stop) else "mend it, then ask again")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        yield Finding(check, "wrong", f"{where}{error.strerror or error}", "check the path and who may use it")


def _packages() -> Iterator[Finding]:
    """Python and the packages, against what the installed trimtab declares."""
    from packaging.requirements import Requirement

    wrong = []
    if sys.version_info[:2] != (3, 11):
        wrong.append(f"Python {platform.python_version()}, and 3.11 is needed")
    for line in metadata.requires("trimtab") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} {there}, and {requirement.specifier} is needed")
    if wrong:
        mend = "pip install -c constraints.txt -e . in a virtual environment of Python 3.11"
        yield Finding("versions", "wrong", "; ".join(wrong), mend)
        return
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("trimtab", "torch", "confluent-kafka"))
    yield Finding("versions", "ok", f"Python {platform.python_version()}, {shown}; every package fits")


def _broker(settings: Settings) -> Iterator[Finding]:
    from stream.kafka import check_broker

    kafka = settings.kafka
    try:
        check_broker(kafka)
    except RetryLater as away:
        mend = "start it (`trimtab broker` for a first try), or mend kafka.bootstrap_servers"
        yield Finding("broker", "wrong", str(away), mend)
    except Misconfigured as refused:
        yield Finding("broker", "wrong", str(refused), "mend the keys named under kafka:")
    else:
        yield Finding("broker", "ok", f"Kafka at {kafka.bootstrap_servers} answers ({kafka.security_protocol})")


def _topics(settings: Settings) -> Iterator[Finding]:
    from stream.kafka import check_topics

    try:
        partitions = check_topics(settings.kafka, settings.topics, settings.named_topics)
    except Misconfigured as wrong:
        # Each problem is one line with its own mending, which begins after a colon or a full stop.
        for line in str(wrong).splitlines():
            found, mend = _split(line.removeprefix("topics: "))
            yield Finding("topics", "wrong", found, mend)
        return
    event_topics = {name: partitions[name] for name in settings.event_topics if name in partitions}
    least = min(event_topics.values(), default=0)
    yield Finding(
        "topics", "ok", f"{len(partitions)} topics are there and fit; up to {least} workers can share the events"
    )
    if least < 2:
        yield Finding(
            "partitions",
            "note",
            f"{', '.join(sorted(event_topics))}: one partition, so one worker does all and a second one waits",
            "topics.partitions counts when topics are created",
        )


def _split(line: str) -> tuple[str, str]:
    """A problem as `stream.kafka` tells it, apart from what is to be done."""
    for mark in (". Create ", "; both need ", "; a worker reads "):
        found, sign, rest = line.partition(mark)
        if sign:
            return found, f"{mark[2:]}{rest}".strip().capitalize() if mark.startswith(". ") else f"{mark[2:]}{rest}"
    return line, ""


def _database(settings: Settings) -> Iterator[Finding]:
    import sqlalchemy as sa

    from replay import schema

    url = settings.learner.store
    shown = masked(url)
    where = schema.parsed(url)
    if where.get_backend_name() == "sqlite" and where.database:
        file = Path(where.database)
        if not file.is_file():
            yield _will_be_made("database", shown, file.parent)
            return
        if not os.access(file, os.W_OK):
            yield Finding("database", "wrong", f"{file} cannot be written", "start as the user who owns it")
            return
    engine = schema.connect(url)
    try:
        with engine.connect() as connection:
            yield from _clock_of(connection)
            if not sa.inspect(connection).has_table("meta"):
                yield Finding("database", "ok", f"{shown} answers; the learner makes its tables at its first start")
                return
            found = connection.scalar(sa.select(schema.meta.c.value).where(schema.meta.c.name == "schema"))
            owner = connection.execute(sa.select(schema.owners.c.owner, schema.owners.c.epoch)).first()
    except sa.exc.SQLAlchemyError as error:
        why = getattr(error, "orig", None) or error
        mend = "start it, mend learner.store, or let its user in; docs/operations.md#on-postgresql"
        if where.get_backend_name() == "sqlite":
            mend = "restore it from a backup; docs/operations.md#back-up-and-restore"
        yield Finding("database", "wrong", f"{shown} cannot be read: {why}".strip(), mend)
        return
    finally:
        engine.dispose()
    if found != schema.SCHEMA:
        yield Finding(
            "database",
            "wrong",
            f"{shown} has schema {found!r}, this version reads {schema.SCHEMA!r}",
            "use the trimtab that wrote it, or another learner.store",
        )
        return
    led = f"; epoch {owner.epoch}, led by {owner.owner!r}" if owner else ""
    yield Finding("database", "ok", f"{shown} can be read{led}")


def _clock_of(connection: Any) -> Iterator[Finding]:
    if connection.dialect.name != "postgresql":
        return
    from replay.schema import clock, moment

    yield _apart("the database's", moment(clock(connection)))


def _registry(settings: Settings) -> Iterator[Finding]:
    from deploy.wiring import open_registry

    url = settings.registry.url
    scheme, _, place = url.rpartition("://")
    if scheme in ("", "file", "local"):
        folder = Path(place)
        if not folder.is_dir():
            yield _will_be_made("registry", url, folder.parent)
            return
        if not os.access(folder, os.W_OK):
            yield Finding("registry", "wrong", f"{url} cannot be written", "start as the user who owns it")
            return
    try:
        registry = open_registry(settings)
        broken, served = [], []
        for stream in sorted(settings.streams):
            champion = registry.champion(stream)
            if champion is None:
                continue
            try:
                registry.verify(stream, champion)
                served.append(f"{stream} {champion}")
            except BrokenVersion as damage:
                broken.append(str(damage))
    except (ImportError, ValueError) as error:
        yield Finding("registry", "wrong", f"{url}: {error}", "install the package that fsspec names, or mend the url")
        return
    for fault in broken:
        yield Finding(
            "registry", "wrong", fault, "roll back (`trimtab versions rollback`), or restore the registry from a backup"
        )
    if not broken:
        yield Finding("registry", "ok", f"{url}: {', '.join(served) if served else 'no versions yet'}")


def _gpu(settings: Settings) -> Iterator[Finding]:
    import torch

    there = torch.cuda.is_available()
    name = torch.cuda.get_device_name(0) if there else "none"
    wanting = [
        block
        for block, device in (("worker", settings.worker.device), ("learner", settings.learner.device))
        if device == "cuda"
    ]
    if wanting and not there:
        built = torch.version.cuda or "no CUDA"
        yield Finding(
            "gpu",
            "wrong",
            f"{' and '.join(f'{block}.device' for block in wanting)}: cuda, and torch (built for {built}) sees no GPU",
            "check the driver with nvidia-smi, install a torch built for CUDA, or set device: auto",
        )
    else:
        yield Finding("gpu", "ok", f"GPU: {name}" if there else "no GPU; models compute on the CPU")


def _disks(settings: Settings) -> Iterator[Finding]:
    from deploy.wiring import disks

    full = False
    for name, path in disks(settings).items():
        usage = shutil.disk_usage(_there(path))
        if usage.free < LEAST_FREE:
            full = True
            yield Finding(
                "disk",
                "wrong",
                f"{name} ({path}): {usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.0f}",
                "make room: `trimtab versions prune`, or move it",
            )
    if not full:
        yield Finding("disk", "ok", "at least 1 GiB is free wherever state lies")


def _learner(settings: Settings) -> Iterator[Finding]:
    """The learner, where one answers, and its clock: it refuses requests that seem old."""
    http = settings.learner.http
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(http.host, http.host)
    url = f"http://{host}:{http.port}/readyz"
    try:
        with urllib.request.urlopen(url, timeout=HTTP_SECONDS) as answer:
            date, body, status = answer.headers.get("Date"), answer.read(10_000).decode(errors="replace"), answer.status
    except urllib.error.HTTPError as refusal:
        date, body, status = refusal.headers.get("Date"), refusal.read(10_000).decode(errors="replace"), refusal.code
    except OSError:
        yield Finding("learner", "note", f"no learner answers at {host}:{http.port}", "start it with `trimtab learner`")
        yield Finding("clock", "ok", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC; no other clock to compare with")
        return
    if status == 200:
        yield Finding("learner", "ok", f"ready at {host}:{http.port}")
    else:
        yield Finding("learner", "note", f"at {host}:{http.port} is not ready: {body.strip()}", "see its log")
    try:
        at = parsedate_to_datetime(date or "")
    except ValueError:
        return
    yield _apart("the learner's", at)


def _apart(whose: str, at: datetime) -> Finding:
    apart = abs(datetime.now(UTC) - at)
    if apart > CLOCKS_APART:
        return Finding(
            "clock",
            "wrong",
            f"this clock and {whose} are {apart.total_seconds():.0f} s apart; requests more than "
            f"{FRESH.total_seconds():.0f} s apart are refused",
            "set both by NTP",
        )
    return Finding("clock", "ok", f"this clock and {whose} are within {CLOCKS_APART.total_seconds():.0f} s")


def _will_be_made(check: str, what: str, folder: Path) -> Finding:
    """For state that is not there yet: whether it could be made."""
    there = _there(folder)
    if os.access(there, os.W_OK):
        return Finding(check, "ok", f"{what} is not there yet; the learner makes it")
    return Finding(check, "wrong", f"{what} is not there and {there} cannot be written", "make it, or move it")


def _there(path: Path) -> Path:
    """The nearest folder up from a path that is there."""
    found = path.absolute()
    while not found.exists():
        found = found.parent
    return found
