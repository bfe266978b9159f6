"""The command line.

Whatever goes wrong for a reason that a person can mend is one sentence on stderr and a non-zero exit: 2 where
something must be changed first, 1 otherwise. What a command needs is imported by that command, so that
`trimtab --help` is quick.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from typer.core import TyperGroup

from deploy import cli_begin, cli_files
from deploy.cli_begin import ColumnOption, columns_given
from deploy.terminal import (
    ConfigOption,
    Format,
    JsonOption,
    ListFormat,
    StreamArgument,
    held_back,
    only_stream,
    print_json,
    print_rows,
)
from deploy.terminal import end as _end
from deploy.terminal import known_stream as _known_stream
from deploy.terminal import read_settings as _settings
from deploy.terminal import table as _table
from stream.errors import Misconfigured, Stop, TrimtabError

if TYPE_CHECKING:
    from deploy.messages import BadLine, Letter
    from deploy.rollback import Blast
    from deploy.settings import Settings
    from learner.control import Action, ControlAnswer, ControlRequest, HeldLabels
    from learner.registry import PruneReport, Registry, VersionManifest
    from stream.events import Prediction

SHOWN_CLASSES = 30


class Sentences(TyperGroup):
    """A group whose commands end in a sentence where others would end in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; known errors become a line on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except TrimtabError as error:
            _end(str(error), 2 if isinstance(error, Stop) else 1)
        except BrokenPipeError:
            # Whoever read our output, such as `head`, has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            if error.filename is None and not isinstance(error, ConnectionError | TimeoutError):
                raise
            what = f"{error.filename}: " if error.filename is not None else "the connection failed: "
            _end(f"{what}{error.strerror or error}", 2 if error.filename is not None else 1)


app = typer.Typer(
    cls=Sentences,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Classify every event of a Kafka stream, learn from late labels, forget nothing.\n\n"
    "Every command reads trimtab.yaml, or the file that --config or TRIMTAB_CONFIG names; a variable such as "
    "TRIMTAB_KAFKA__BOOTSTRAP_SERVERS overrides one key of it.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check the settings file, or print what it may hold.")
topics_app = typer.Typer(no_args_is_help=True, help="Create the topics that trimtab needs.")
versions_app = typer.Typer(no_args_is_help=True, help="List, show, promote, roll back or prune the models of a stream.")
letters_app = typer.Typer(
    no_args_is_help=True, help="Look at the messages that could not be used, and send them again."
)
quarantine_app = typer.Typer(
    no_args_is_help=True, help="Look at the labels that were set aside, and learn them after all or drop them."
)
classes_app = typer.Typer(no_args_is_help=True, help="List the classes of a stream, rename one, or make two one.")
app.add_typer(config_app, name="config", rich_help_panel="Set up")
app.add_typer(topics_app, name="topics", rich_help_panel="Set up")
app.add_typer(versions_app, name="versions", rich_help_panel="Learning")
app.add_typer(quarantine_app, name="quarantine", rich_help_panel="Learning")
app.add_typer(classes_app, name="classes", rich_help_panel="Learning")
app.add_typer(letters_app, name="dead-letters", rich_help_panel="Messages")

TIMES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
"""How a time is given on the command line."""

ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the audit.")]
ByTopicOption = Annotated[
    bool, typer.Option("--by-topic", help="Ask by the control topic instead of HTTP; the answer is on the audit topic.")
]
UrlOption = Annotated[
    str | None,
    typer.Option("--learner", metavar="URL", help="Where the learner answers; from the settings if left out."),
]
IdsArgument = Annotated[
    list[int] | None, typer.Argument(metavar="ID...", help="Ids as `trimtab quarantine list` shows them.")
]
LabellerFilter = Annotated[str | None, typer.Option("--labeller", help="Only labels by this labeller.")]
ClassFilter = Annotated[str | None, typer.Option("--class", help="Only labels that name this class.")]
HeldFilter = Annotated[
    str | None, typer.Option("--for", help="Only labels set aside for this reason, such as labeller_untrusted.")
]
AllOption = Annotated[bool, typer.Option("--all", help="Every label of the stream that waits.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")]
PlaceArgument = Annotated[
    str, typer.Argument(metavar="PLACE", help="Place of the dead letter, PARTITION:OFFSET, as listed.")
]
ReasonFilter = Annotated[
    str | None, typer.Option("--reason", help="Only those refused for this reason, such as ragged.")
]


cli_begin.add_to(app)
cli_files.add_to(app, versions_app)


def main() -> None:
    """The console script."""
    app(prog_name="trimtab")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    """Options before any command."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"trimtab {installed('trimtab')}")
        raise typer.Exit


# Processes


@app.command(rich_help_panel="Run")
def worker(
    config: ConfigOption = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one.", min=0, max=65535)] = None,
    member_id: Annotated[str | None, typer.Option(help="This replica's lasting name in the consumer group.")] = None,
    group: Annotated[str | None, typer.Option(help="Another consumer group, as a pinned twin needs.")] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STREAM=VERSION", help="Serve one revision, such as intents=v1.37, whatever is announced."
        ),
    ] = None,
    predictions: Annotated[str | None, typer.Option(help="Another topic (its whole name) for the predictions.")] = None,
) -> None:
    """Answer events: one prediction for each. Run as many as the topics have partitions.

    With --pin a worker becomes a frozen twin to compare with: give it --group and --predictions of its own.
    """
    pinned: dict[str, str] = {}
    for one in pin or ():
        stream, sign, version = one.partition("=")
        if not (stream and sign and version):
            _end(f"--pin {one!r}: give STREAM=VERSION, such as intents=v1.37", 2)
        pinned[stream] = version
    if pinned and not (group and predictions):
        _end("--pin needs --group and --predictions too, so that a frozen twin takes no events and answers nobody", 2)
    settings = _settings(config)
    from deploy.wiring import run_worker

    raise typer.Exit(
        run_worker(settings, pin=pinned, predictions=predictions, group=group, port=port, member_id=member_id)
    )


@app.command(rich_help_panel="Run")
def learner(
    config: ConfigOption = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one.", min=0, max=65535)] = None,
) -> None:
    """Join labels with predictions, learn, examine and announce versions."""
    settings = _settings(config)
    from deploy.wiring import run_learner

    raise typer.Exit(run_learner(settings, port=port))


@app.command(rich_help_panel="Run")
def broker(
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 9092,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    log: Annotated[Path | None, typer.Option(help="File for its output.")] = None,
) -> None:
    """Run the embedded broker for a first try: in memory, gone when it ends. Not for anything you want to keep."""
    from deploy.broker import EmbeddedBroker

    with EmbeddedBroker(port, host, log) as running:
        typer.echo(f"Embedded broker at {running.bootstrap}, in memory only. Ctrl-C ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            code = running.wait()
            _end(f"the embedded broker ended by itself with code {code}", 1)


@app.command(rich_help_panel="Run")
def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave everything running at the end, and print the addresses.")
    ] = False,
    report: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("demo-report"),
    seed: Annotated[int, typer.Option(help="Another seed shows other questions in another order.", min=0)] = 0,
) -> None:
    """Watch a pipeline learn from late labels on real data: broker, worker and learner, in about three minutes."""
    from deploy import demo as demonstration

    raise typer.Exit(demonstration.run(keep=keep, report=report, seed=seed))


# Settings


@config_app.command("check")
def config_check(
    file: Annotated[Path | None, typer.Argument(help="The file; TRIMTAB_CONFIG or trimtab.yaml when left out.")] = None,
) -> None:
    """Check a settings file, with the environment's overrides, and the files that it names. Reaches no network."""
    from deploy.settings import settings_path, unreadable

    settings = _settings(file)
    lacking = unreadable(settings)
    if lacking:
        _end("\n".join([f"{settings_path(file)} is well-formed, but:", *(f"  {line}" for line in lacking)]), 2)
    streams = ", ".join(f"{name} ({stream.kind})" for name, stream in settings.streams.items())
    typer.echo(f"{settings_path(file)} is fine. Kafka at {settings.kafka.bootstrap_servers}; streams: {streams}.")
    if settings.control.key() is None and not settings.control.protected_by_acls:
        typer.echo("Note: requests on the control topic are refused, for there is no control.secret_file; HTTP works.")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the settings file, for an editor to complete and check it."""
    from deploy.settings import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


# Topics and messages


@topics_app.command("create")
def topics_create(config: ConfigOption = None) -> None:
    """Create the topics that are missing and check those that are there."""
    settings = _settings(config)
    from stream.kafka import create_topics

    created = create_topics(settings.kafka, settings.topics, settings.named_topics)
    typer.echo(f"Created {', '.join(created)}." if created else "All topics are there, and fit.")


@app.command(rich_help_panel="Messages")
def publish(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="JSON lines, one message each, or - for standard input; or a CSV or Parquet file."
        ),
    ],
    topic: Annotated[
        str | None,
        typer.Option(
            "--topic",
            "-t",
            help="Of JSON lines: topic without the prefix: reports, telemetry, labels or a stream's own.",
        ),
    ] = None,
    stream: Annotated[
        str | None, typer.Option("--stream", help="Of a table: the stream; may be left out where there is one only.")
    ] = None,
    column: ColumnOption = None,
    config: ConfigOption = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Hold back lines that would become dead letters, and name them by number."
        ),
    ] = True,
) -> None:
    """Publish events or labels from a file, keyed by event id.

    JSON lines with --topic are messages as they are on the wire. Rows of a table are events of one stream, and where
    they name a class, labels too; columns are known by their names, or by --column text=NAME.
    """
    settings = _settings(config)
    from deploy.messages import Publisher, check_topic, publish_entries, publish_lines
    from deploy.settings import rules
    from stream.events import Decoder

    bad: list[BadLine] = []
    if topic is None:
        from deploy.begin import table_entries

        entries, (events, labels_too) = table_entries(
            Path(file), settings, only_stream(settings, stream), columns_given(column)
        )
        check_topic(settings.kafka, events, labels_too)
        with Publisher(settings.kafka) as publisher:
            for line in publish_entries(entries, (events, labels_too), publisher, Decoder(rules(settings))):
                bad.extend([] if line is None else [line])
        typer.echo(f"Published {publisher.sent} messages to {events} and {labels_too}.", err=True)
    else:
        whole, labels = _published_topic(settings, topic)
        with _opened(file) as (lines, size):
            check_topic(settings.kafka, whole)
            with Publisher(settings.kafka) as publisher:
                decoder = Decoder(rules(settings)) if check else None
                found = publish_lines(_with_progress(lines, size, file), whole, publisher, decoder, labels)
                bad.extend(line for line in found if line is not None)
        typer.echo(f"Published {publisher.sent} messages to {whole}.", err=True)
    if bad:
        _end(held_back(bad), 1)


@app.command(rich_help_panel="Messages")
def predictions(
    config: ConfigOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until Ctrl-C.")] = False,
    latest: Annotated[bool, typer.Option("--latest", help="Only what comes from now on; goes with --follow.")] = False,
    stream: Annotated[str | None, typer.Option(help="Only this stream.")] = None,
    topic: Annotated[str | None, typer.Option(help="Another topic (its whole name), such as a frozen twin's.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", help="End after so many.", min=1)] = None,
    format: ListFormat = "text",  # noqa: A002
) -> None:
    """Print what was predicted, partition by partition in the order of the log."""
    settings = _settings(config)
    from deploy.messages import read
    from deploy.settings import rules
    from stream.errors import DeadLetter
    from stream.events import Decoder

    if stream is not None:
        _known_stream(settings, stream)
    decoder = Decoder(rules(settings))

    def wanted() -> Iterator[tuple[Prediction, bytes]]:
        # Whoever ends it with Ctrl-C has a whole document too.
        with contextlib.suppress(KeyboardInterrupt):
            for record in read(
                settings.kafka, topic or settings.topics.name("predictions"), follow=follow, latest=latest and follow
            ):
                try:
                    prediction = decoder.prediction(record)
                except DeadLetter as refusal:
                    typer.echo(f"{record.topic}[{record.partition}]@{record.offset}: {refusal}", err=True)
                    continue
                if stream is None or prediction.stream == stream:
                    yield prediction, record.value or b""

    found = islice(wanted(), limit)
    if format != "text":
        print_rows((json.loads(value) for _, value in found), format)
        return
    for prediction, _ in found:
        typer.echo(_line(prediction))


@app.command(rich_help_panel="Messages")
def audit(
    config: ConfigOption = None,
    since: Annotated[
        datetime | None, typer.Option("--from", formats=TIMES, help="Only events and labels from then on, in UTC.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option("--to", formats=TIMES, help="Only events and labels from before then, in UTC.")
    ] = None,
    as_json: JsonOption = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Hold the log, the learner's database and the registry against each other; exit 1 where a promise was broken.

    Run it where the learner's database can be read. Nothing is written.
    """
    from deploy.audit import run_audit

    settings = _settings(config)
    found = run_audit(settings, _registry(settings), _in_utc(since), _in_utc(until))
    if as_json or format == "json":
        print_json(found.as_json())
    else:
        counts = {name: value for name, value in found.as_json().items() if isinstance(value, int) and name != "kept"}
        rows = [[name.replace("_", " "), f"{value:,}"] for name, value in counts.items()]
        rows += [[f"dead letters, {reason}", f"{value:,}"] for reason, value in found.dead_letters.items()]
        _table(["what", "how many"], rows)
        for breach in found.breaches:
            typer.echo(f"BROKEN: {breach}", err=True)
        if found.kept:
            typer.echo("Every promise was kept.")
    if not found.kept:
        raise typer.Exit(1)


@app.command(rich_help_panel="Messages")
def explain(
    event_id: Annotated[str, typer.Argument(metavar="EVENT_ID", help="The event's id.")],
    stream: Annotated[
        str | None, typer.Option("--stream", help="Name of the stream; may be left out where one only knows the event.")
    ] = None,
    config: ConfigOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Look through whole topics, however long that takes.")
    ] = False,
    as_json: JsonOption = False,
    format: Format = "text",  # noqa: A002
    url: UrlOption = None,
) -> None:
    """Explain a prediction: the event, every answer to it, what speaks for it, its labels, who learned from it.

    Where the learner's database cannot be read from here, the learner is asked. Nothing is written.
    """
    settings = _settings(config)
    if stream is not None:
        _known_stream(settings, stream)
    found = _explained(settings, stream, event_id, everything, url)
    if as_json or format == "json":
        print_json(found)
        return
    from deploy.explain import lines

    typer.echo(f"{found['event_id']} of stream {found['stream']}")
    for title, rows in lines(found, _clock):
        typer.echo(f"\n{title}")
        for row in rows:
            typer.echo(f"  {row}")


@letters_app.command("list")
def letters_list(
    config: ConfigOption = None,
    reason: ReasonFilter = None,
    format: ListFormat = "text",  # noqa: A002
) -> None:
    """List the dead letters: place, when, why, and where they were first."""
    found = [one for one in _letters(_settings(config)) if reason in (None, one.reason)]
    if format != "text":
        print_rows(map(_told, found), format)
        return
    if not found:
        typer.echo("There are no dead letters." if reason is None else f"There are no dead letters for {reason}.")
        return
    _table(
        ["place", "at", "reason", "field", "event", "first place", "detail"],
        [
            [
                f"{one.place.partition}:{one.place.offset}",
                one.at[:19],
                one.reason,
                one.field,
                one.event_id,
                f"{one.original.topic}[{one.original.partition}]@{one.original.offset}",
                one.detail,
            ]
            for one in found
        ],
    )


@letters_app.command("show")
def letters_show(place: PlaceArgument, config: ConfigOption = None) -> None:
    """Show one dead letter: why it was refused, its headers and its bytes."""
    settings = _settings(config)
    one = _letter_at(settings, place)
    for name, value in _told(one).items():
        typer.echo(f"{name:>14}  {value}")
    for header, content in one.original.headers:
        typer.echo(f"{'header':>14}  {header}: {_readable(content)}")
    record = _original(settings, one)
    typer.echo(f"{'key':>14}  {_readable(record.key)}")
    typer.echo(f"{'bytes':>14}  {len(record.value or b'')}\n")
    typer.echo(_readable(record.value))


@letters_app.command("replay")
def letters_replay(
    places: Annotated[
        list[str] | None, typer.Argument(metavar="[PLACE]...", help="Places, PARTITION:OFFSET, as listed.")
    ] = None,
    config: ConfigOption = None,
    all_: Annotated[bool, typer.Option("--all", help="All of them, or all of one --reason.")] = False,
    reason: ReasonFilter = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
) -> None:
    """Send dead letters to their first topic again, as they were: after the settings or the labels were mended.

    The dead letters themselves stay where they are until their topic's retention ends, so one can be sent twice.
    """
    if bool(places) == all_:
        _end("name the places to send again, or give --all", 2)
    settings = _settings(config)
    from deploy.messages import Publisher, check_topic

    wanted = [_letter_at(settings, place) for place in places or ()]
    if all_:
        wanted = [one for one in _letters(settings) if reason in (None, one.reason)]
    if not wanted:
        typer.echo("There is nothing to send.")
        return
    ours = {*settings.event_topics, settings.topics.name("labels"), settings.topics.name("predictions")}
    strange = sorted({one.original.topic or "no topic" for one in wanted} - ours)
    if strange:
        _end(f"some came from {', '.join(strange)}, which is none of the topics that these settings read", 2)
    if not yes:
        typer.confirm(f"Send {len(wanted)} messages again?", abort=True)
    records = [_original(settings, one) for one in wanted]
    check_topic(settings.kafka, *{record.topic for record in records})
    with Publisher(settings.kafka) as publisher:
        for record in records:
            publisher.send(record.topic, record.key, record.value, record.headers)
    typer.echo(f"Sent {len(records)} messages again.")


# Learning


@app.command(rich_help_panel="Learning")
def retrain(
    stream: StreamArgument,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    strategy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Train by this one, such as ewc_replay, for once.")
    ] = None,
    observed_from: Annotated[
        datetime | None, typer.Option(formats=TIMES, help="Train only on events observed from then on, in UTC.")
    ] = None,
    observed_to: Annotated[
        datetime | None, typer.Option(formats=TIMES, help="Train only on events observed before then, in UTC.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing; say what would be done, or why it would be refused.")
    ] = False,
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Ask for a fine-tune of a stream now. One that is going on is finished first."""
    _ask(
        config,
        "retrain",
        stream,
        reason,
        by_topic,
        url,
        strategy=strategy,
        observed_from=_in_utc(observed_from),
        observed_to=_in_utc(observed_to),
        dry_run=dry_run,
    )


@app.command(rich_help_panel="Learning")
def forget(
    event_ids: Annotated[list[str], typer.Argument(metavar="EVENT_ID...", help="Up to 40 event ids.", max=40)],
    stream: Annotated[
        str | None, typer.Option("--stream", help="Name of the stream; may be left out where there is one only.")
    ] = None,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Forget events for good: unlearn them, delete them wherever that can be done, and say where it cannot."""
    streams = sorted(_settings(config).streams)
    if stream is None and len(streams) != 1:
        raise Misconfigured(f"an event id is unique within its stream only: give --stream, one of {', '.join(streams)}")
    _ask(config, "forget", stream or streams[0], reason, by_topic, url, event_ids=event_ids)


@app.command(rich_help_panel="Learning")
def label(
    stream: StreamArgument,
    event_id: Annotated[str, typer.Argument(help="The event's id.")],
    name: Annotated[str, typer.Argument(metavar="CLASS", help="What the event is; a new name is a new class.")],
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Say what an event is, as the user who types it. To correct it, say it again."""
    _ask(config, "label", stream, reason, by_topic, url, event_ids=[event_id], label=name)


@app.command(rich_help_panel="Learning")
def pause(
    stream: StreamArgument,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Keep serving the present revision; labels are stored, and learned after `trimtab resume`."""
    _ask(config, "pause", stream, reason, by_topic, url)


@app.command(rich_help_panel="Learning")
def resume(
    stream: StreamArgument,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Go on learning after a pause, or after a rollback to a revision."""
    _ask(config, "resume", stream, reason, by_topic, url)


@app.command(rich_help_panel="Learning")
def rollback(
    stream: StreamArgument,
    since: Annotated[
        str,
        typer.Option(
            "--since",
            metavar="TIME|VERSION",
            help="The version that should not have been promoted, such as v13; the first revision that went wrong, "
            "such as v13.40; or a time in UTC, such as 2026-03-01T02:00:00.",
        ),
    ],
    config: ConfigOption = None,
    reissue: Annotated[
        bool, typer.Option("--reissue", help="Correct its predictions too; asked again, it goes on where it ended.")
    ] = False,
    rate: Annotated[float, typer.Option(help="The most corrections a second.", min=1, max=100_000)] = 200.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how far it reached.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
    format: Format = "text",  # noqa: A002
    reason: ReasonOption = "",
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Go back to what served before, having said how many predictions the bad version made, and of which classes.

    It needs Kafka and the registry; with the learner's database it says which answers labels have shown to be wrong.
    """
    as_json = as_json or format == "json"
    settings = _settings(config)
    _known_stream(settings, stream)
    moment = _moment(since)
    from getpass import getuser

    from deploy.rollback import blast, correct, in_service
    from deploy.wiring import open_store

    def read(count: int) -> None:
        typer.echo(f"{count:,} predictions read", err=True)

    store = open_store(settings) if _store_is_here(settings) else None
    try:
        found = blast(settings, stream, moment, store, read)
        if not as_json:
            _tell_blast(found)
        if dry_run:
            if as_json:
                print_json(found.as_json())
            return
        doing = [] if found.over else [f"roll {stream} back to {found.way.target}"]
        doing += [f"correct {len(found.radius.open):,} predictions"] if reissue and found.radius.open else []
        if doing and not yes:
            typer.confirm(f"{' and '.join(doing).capitalize()}?", abort=True, err=True)
        if found.over:
            typer.echo(f"{found.serving} is in service already.", err=True)
        else:
            _ask(config, "rollback", stream, reason, by_topic, url, err=as_json, version=found.way.target)
            _until_served(lambda: in_service(settings, stream), lambda name: name not in found.way.suspects)
        done = None
        if reissue:
            done = correct(
                settings,
                found.way,
                rate,
                store,
                lambda so_far, total: _tell_progress(so_far.corrected, total),
                who=getuser(),
                why=reason,
            )
    finally:
        if store is not None:
            store.close()
    if as_json:
        print_json({**found.as_json(), "reissued": None if done is None else vars(done)})
    elif done is not None:
        by = ", ".join(sorted(done.by)) or "nobody"
        typer.echo(
            f"Corrected {done.corrected:,} predictions, by {by}; {done.changed:,} are of another class than before."
        )
        for count, why in (
            (done.gone, "events are no longer in their topic"),
            (done.failed, "events make the model fail"),
            (done.forgotten, "events were forgotten on request"),
        ):
            if count:
                typer.echo(f"Not corrected: {count:,} {why}.")


@versions_app.command("list")
def versions_list(
    stream: Annotated[str | None, typer.Argument(help="Name of the stream; all of them when left out.")] = None,
    config: ConfigOption = None,
    format: ListFormat = "text",  # noqa: A002
) -> None:
    """List the versions of a stream, newest first, as the registry has them."""
    settings = _settings(config)
    registry = _registry(settings)
    rows: list[dict[str, Any]] = []
    for name in [_known_stream(settings, stream)] if stream else sorted(settings.streams):
        champion = registry.champion(name)
        forgotten = _forgotten(settings, name)
        overruled = _overruled(registry, name)
        for manifest in reversed(registry.versions(name)):
            pruned = registry.pruned(name, manifest.name)
            rows.append(
                {
                    "stream": name,
                    "version": manifest.name,
                    "in_service": manifest.name == champion,
                    "created_at": manifest.created_at.isoformat(timespec="seconds"),
                    "parent": manifest.parent,
                    "strategy": manifest.lineage.strategy,
                    "classes": len(manifest.classes),
                    "exam": _exam(manifest),
                    "rolled_back": overruled.get(manifest.name),
                    "pruned_at": pruned.isoformat(timespec="seconds") if pruned else None,
                    "rebuildable": _rebuildable(forgotten, manifest),
                }
            )
    if format != "text":
        print_rows(rows, format)
    elif not rows:
        typer.echo(f"The registry {settings.registry.url} has no versions yet.")
    else:
        _table(
            ["stream", "version", "", "created", "parent", "strategy", "classes", "exam", "rebuildable"],
            [
                [
                    row["stream"],
                    row["version"],
                    _standing(row),
                    row["created_at"][:19],
                    row["parent"] or "",
                    row["strategy"],
                    str(row["classes"]),
                    row["exam"],
                    row["rebuildable"],
                ]
                for row in rows
            ],
        )


@versions_app.command("show")
def versions_show(
    stream: StreamArgument,
    version: Annotated[str, typer.Argument(help="Such as v12.")],
    config: ConfigOption = None,
    format: Format = "text",  # noqa: A002
) -> None:
    """Show where a version comes from and what its exam found, class by class."""
    settings = _settings(config)
    registry = _registry(settings)
    manifest = registry.version(_known_stream(settings, stream), version)
    from learner.account import checks
    from learner.finetune import Retrain

    rebuildable = _rebuildable(_forgotten(settings, stream), manifest)
    fate = _fate(settings, registry, stream, manifest)
    asked = [] if manifest.verdict is None else checks(manifest.verdict)
    if format == "json":
        more = {"rebuildable": rebuildable, "fate": fate, "checks": [vars(check) for check in asked]}
        print_json({**manifest.model_dump(mode="json"), **more})
        return
    lineage = manifest.lineage
    typer.echo(
        f"{stream} {manifest.name}, made {manifest.created_at:%Y-%m-%d %H:%M:%S} UTC "
        f"from {manifest.parent or 'nothing'}"
    )
    why = _overruled(registry, stream).get(version)
    typer.echo(f"  {'in service' if registry.champion(stream) == manifest.name else 'not in service'}")
    if why:
        typer.echo(f"  rolled back by itself: {why}")
    typer.echo(f"  strategy {lineage.strategy}, seed {lineage.seed}, snapshot {lineage.snapshot or 'none'}")
    if lineage.settings.get("retrain"):
        typer.echo(f"  named by hand: {Retrain.model_validate(lineage.settings['retrain'])}")
    typer.echo(
        f"  encoder {manifest.encoder_digest[:19]}, {manifest.encoder.kind}, {manifest.encoder.dimension} components"
    )
    typer.echo(
        f"  {len(manifest.classes)} classes; packages {_pairs(lineage.packages)}; "
        f"label offsets {_pairs(lineage.label_offsets)}"
    )
    if rebuildable:
        typer.echo(f"  {rebuildable}")
    typer.echo("\nWhat became of it")
    for line in fate:
        typer.echo(f"  {line}")
    verdict = manifest.verdict
    if verdict is None:
        typer.echo("  no exam: a base version")
        return
    typer.echo(f"\nExam: {_exam(manifest)}, on {verdict.n} examples it was never trained on")
    for why in verdict.reasons:
        typer.echo(f"  {why}")
    if verdict.unjudged:
        typer.echo(f"  could not be judged: {', '.join(verdict.unjudged)}")
    typer.echo(f"\nWhat the exam asked, at its look {verdict.look}")
    _table(
        ["", "asked", "found", "allowed"],
        [["yes" if one.passed else "NO", one.rule, one.found, one.allowed] for one in asked],
    )
    typer.echo()
    _table(
        ["class", "examples", "champion", "candidate", "outcome"],
        [
            [one.label, str(one.n), f"{one.champion_recall:.3f}", f"{one.candidate_recall:.3f}", one.outcome]
            for one in verdict.classes
        ],
    )


@versions_app.command("diff")
def versions_diff(
    stream: StreamArgument,
    before: Annotated[str, typer.Argument(metavar="A", help="A version such as v12, or a revision such as v12.34.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The one to compare it with.")],
    config: ConfigOption = None,
    limit: Annotated[int, typer.Option(help="Events shown at most; --json has all.", min=0)] = 20,
    as_json: JsonOption = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Show which classes B answers better and worse than A on the exam's examples, and which answers changed.

    A version is taken with a head of what the store holds now, as a rollback would bring it; a revision as it was
    served.
    Run it where the learner's database can be read.
    """
    settings = _settings(config)
    _known_stream(settings, stream)
    if not _store_is_here(settings):
        raise Misconfigured(f"learner.store {settings.learner.store} is not here: run it where the learner runs")
    from deploy.wiring import device_of, open_store
    from learner.account import Examiner

    store, plan = open_store(settings), settings.streams[stream]
    try:
        examiner = Examiner(
            store,
            _registry(settings),
            prior=plan.prior,
            random_features=plan.random_features,
            device=device_of(settings.learner.device),
            told=lambda what: typer.echo(what, err=True),
        )
        found = examiner.compare(stream, before, after, plan.exam)
    finally:
        store.close()
    if as_json or format == "json":
        print_json({"stream": stream, **found.as_json()})
        return
    if not found.n:
        typer.echo("The exam has no examples yet: a class gives some from its tenth label on.")
        return
    if found.same_encoder and "." not in before + after:
        typer.echo(f"{before} and {after} have one encoder, so with one head they are the same: compare revisions.")
        return
    old, new = found.accuracy
    counts = {kind: sum(one.kind == kind for one in found.changed) for kind in ("gained", "lost", "wrong")}
    typer.echo(
        f"{stream}: {old:.1%} right with {before}, {new:.1%} with {after}, of {found.n} exam examples: "
        f"{counts['lost']} lost, {counts['gained']} gained, {counts['wrong']} wrong with both and otherwise\n"
    )
    _table(
        ["class", "examples", before, after, "lost", "gained", after + " is"],
        [
            [
                one.label,
                str(one.n),
                f"{one.before:.3f}",
                f"{one.after:.3f}",
                str(one.lost),
                str(one.gained),
                one.outcome.replace("_", " "),
            ]
            for one in found.classes
            if one.lost or one.gained
        ],
    )
    unchanged = sum(not (one.lost or one.gained) for one in found.classes)
    if unchanged:
        typer.echo(f"{unchanged} classes as they were")
    if found.changed[:limit]:
        typer.echo()
        _table(
            ["event", "its class", before, after, ""],
            [[one.event_id, one.label, one.before or "", one.after or "", one.kind] for one in found.changed[:limit]],
        )
    if len(found.changed) > limit:
        typer.echo(f"and {len(found.changed) - limit} more events; --limit or --json shows them")


@versions_app.command("rebuild")
def versions_rebuild(
    stream: StreamArgument,
    version: Annotated[
        str, typer.Argument(help="Such as v12; or a revision such as v12.34, whose head is solved again.")
    ],
    config: ConfigOption = None,
    as_json: JsonOption = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Make a version again from its lineage and compare its weights; exit 1 where they are not the same.

    Run it where the learner's database can be read. It trains, and changes nothing that is served.
    """
    settings = _settings(config)
    _known_stream(settings, stream)
    if not _store_is_here(settings):
        raise Misconfigured(f"learner.store {settings.learner.store} is not here: run it where the learner runs")
    if "." in version:
        _rebuild_revision(settings, stream, version, as_json)
        return
    from tempfile import TemporaryDirectory

    from deploy.wiring import events_back, open_store
    from learner.rebuild import TOLERANCE, Rebuilder

    store = open_store(settings)
    # It will hold examples, so it lies beside those of the learner's own jobs, and goes at the end.
    settings.learner.jobs.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix="rebuild-", dir=settings.learner.jobs) as work:
            found = Rebuilder(
                store,
                _registry(settings),
                {name: its.kind for name, its in settings.streams.items()},
                lambda name, places: events_back(settings, name, places),
                Path(work),
                told=lambda what: typer.echo(what, err=True),
            ).rebuild(stream, version)
    finally:
        store.close()
    if as_json or format == "json":
        print_json({"stream": stream, **vars(found)})
    else:
        said = {
            "same": "the same, bit for bit",
            "near": f"within the tolerance of {TOLERANCE:.0%}: {found.largest:.2e} off at most, in {found.tensor}",
            "other": f"not the same: {found.largest:.2e} off in {found.tensor}, {TOLERANCE:.0%} is allowed",
        }
        snapshot = "its snapshot is proven by its digest" if found.proven else "its snapshot is not proven"
        typer.echo(
            f"{version} of {stream}, made again of {found.examples} examples, is {said[found.outcome]}; {snapshot}."
        )
        for note in found.notes:
            typer.echo(f"  {note}")
    if found.outcome == "other":
        raise typer.Exit(1)


def _rebuild_revision(settings: Settings, stream: str, name: str, as_json: bool) -> None:
    from deploy.wiring import open_store, reviver
    from learner.rebuild import TOLERANCE

    store = open_store(settings)
    try:
        found = reviver(settings, store, _registry(settings)).revive(stream, name)
    finally:
        store.close()
    if as_json:
        row = {name: value for name, value in vars(found).items() if name != "head"}
        typer.echo(json.dumps({"stream": stream, **row}, ensure_ascii=False))
    else:
        off = "" if found.largest is None else f"{found.largest:.2e} off at most"
        said = {
            "same": "the same head by its checksum",
            "near": f"within the tolerance of {TOLERANCE:.0%} of the head that is stored: {off}",
            "other": f"not the head that is stored: {off}, {TOLERANCE:.0%} is allowed",
            "unproven": "another head by its checksum, and that which was announced is not stored any more",
        }
        typer.echo(f"{name} of {stream}, made again of {found.examples} examples, is {said[found.outcome]}.")
        for note in found.notes:
            typer.echo(f"  {note}")
    if found.outcome in ("other", "unproven"):
        raise typer.Exit(1)


@versions_app.command("promote")
def versions_promote(
    stream: StreamArgument,
    version: Annotated[str, typer.Argument(help="Such as v12.")],
    config: ConfigOption = None,
    reason: ReasonOption = "",
    force: Annotated[
        bool, typer.Option("--force", help="Even one that did not pass its exam; the audit says so.")
    ] = False,
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Put a version into service."""
    _ask(config, "promote", stream, reason, by_topic, url, version=version, force=force)


@versions_app.command("rollback")
def versions_rollback(
    stream: StreamArgument,
    version: Annotated[
        str, typer.Argument(help="A version such as v12, refitted with what was learned since; or v12.34, exactly.")
    ],
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Put an earlier version or revision back. A revision comes back exactly as it was, and pauses learning."""
    _ask(config, "rollback", stream, reason, by_topic, url, version=version)


@versions_app.command("prune")
def versions_prune(
    stream: Annotated[str | None, typer.Argument(help="Name of the stream; all of them when left out.")] = None,
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
    format: ListFormat = "text",  # noqa: A002
) -> None:
    """Remove weights that nothing needs. What is in service, the last before it, and what predictions name stay."""
    settings = _settings(config)
    registry = _registry(settings)
    names = [_known_stream(settings, stream)] if stream else sorted(settings.streams)
    pruned: list[PruneReport] = []
    for name in names:
        keep = _served_versions(settings, name)
        options = {
            "predecessors": settings.registry.keep_champions,
            "revisions": settings.registry.keep_revisions,
        }
        plan = registry.prune(name, keep, dry_run=True, **options)  # type: ignore[arg-type]
        going = f"{len(plan.versions)} versions, {len(plan.revisions)} revisions and {plan.bytes / 2**20:.1f} MiB"
        said = [f"{name}: removed {going}"]
        if dry_run:
            said = [f"{name}: would remove {going}{': ' + ', '.join(plan.versions) if plan.versions else ''}"]
            said += [f"  keeps {kept}: {why}" for kept, why in plan.kept.items()]
        elif not (plan.versions or plan.revisions or plan.blobs):
            said = [f"{name}: there is nothing to remove"]
        else:
            if not yes:
                typer.confirm(f"{name}: remove {going}?", abort=True, err=format != "text")
            plan = registry.prune(name, keep, dry_run=False, **options)  # type: ignore[arg-type]
        pruned.append(plan)
        if format == "text":
            for line in said:
                typer.echo(line)
    if format != "text":
        print_rows(({**one.model_dump(mode="json"), "bytes": one.bytes} for one in pruned), format)


@app.command("requests", rich_help_panel="Learning")
def label_requests(
    stream: StreamArgument,
    config: ConfigOption = None,
    format: ListFormat = "text",  # noqa: A002
    url: UrlOption = None,
) -> None:
    """Labels that the learner asks for and has not got, those that would teach most first."""
    page = _page(config, stream, "requests", url, {})
    if format != "text":
        print_rows(page["requests"], format)
        return
    _table(
        ["event", "why", "score", "answer", "by", "asked", "where it lies"],
        [
            [
                row["event_id"],
                row["why"],
                f"{row['score']:.3f}",
                row["label"] or "",
                row["model_version"],
                row["asked_at"][:19],
                "{topic}[{partition}]@{offset}".format(**row["ref"]),
            ]
            for row in page["requests"]
        ],
    )
    typer.echo(
        f"\nOpen: {page['open']}; answered: {page['answered']}; {page['left']} of {page['per_day']} left for 24 hours"
    )


@app.command("asked", rich_help_panel="Learning")
def asked(
    request_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="The request's id.")] = None,
    config: ConfigOption = None,
    format: ListFormat = "text",  # noqa: A002
    url: UrlOption = None,
) -> None:
    """What was asked of the learner, by the topic, HTTP or here, and what became of it."""
    import urllib.parse

    path = "requests" if request_id is None else f"requests/{urllib.parse.quote(request_id, safe='')}"
    base, status, content = _call(_settings(config), url, "", "", None, path=path)
    if status != 200:
        _end(f"the learner at {base} answered {status}: {_refusal(content)}", 1)
    found = json.loads(content)
    rows = found if request_id is None else [found]
    if format == "json" and request_id is not None:
        print_json(found)
        return
    if format != "text":
        print_rows(rows, format)
        return
    columns = ("id", "action", "stream", "state", "who", "message")
    _table([*columns, "taken"], [[*(row[name] for name in columns), row["at"][:19]] for row in rows])


@quarantine_app.command("list")
def quarantine_list(
    stream: StreamArgument,
    labeller: LabellerFilter = None,
    name: ClassFilter = None,
    held_for: HeldFilter = None,
    limit: Annotated[int, typer.Option(help="Labels shown at most.", min=1, max=1_000)] = 100,
    after: Annotated[int, typer.Option(help="Only ids above this, to read on.", min=0)] = 0,
    config: ConfigOption = None,
    format: ListFormat = "text",  # noqa: A002
    url: UrlOption = None,
) -> None:
    """Labels that wait, oldest first, with the reason; and how the labellers stand."""
    given = {"labeller": labeller, "label": name, "reason": held_for, "limit": limit, "after": after}
    page = _page(config, stream, "quarantine", url, {key: value for key, value in given.items() if value is not None})
    if format != "text":
        print_rows(page["labels"], format)
        return
    _table(
        ["id", "reason", "labeller", "class", "event", "labelled", "why"],
        [
            [
                str(row["id"]),
                row["reason"],
                row["labeller"],
                row["label"],
                row["event_id"],
                row["labelled_at"],
                row["detail"],
            ]
            for row in page["labels"]
        ],
    )
    typer.echo(f"\nWaiting: {_pairs(page['waiting'])}")
    if page["labellers"]:
        _table(
            ["labeller", "believed", "labels", "contradicted", "beyond the others", "why"],
            [
                [
                    row["labeller"],
                    "yes" if row["believed"] else f"no, since {row['since']}",
                    str(row.get("labels", "")),
                    f"{row['contradicted']} of {row['judged']}" if "judged" in row else "",
                    f"{row['excess']:+.1%}" if row.get("excess") is not None else "",
                    row["why"],
                ]
                for row in page["labellers"]
            ],
        )


@quarantine_app.command("show")
def quarantine_show(
    stream: StreamArgument,
    number: Annotated[int, typer.Argument(metavar="ID", help="As `trimtab quarantine list` shows it.", min=1)],
    config: ConfigOption = None,
    url: UrlOption = None,
) -> None:
    """One label that waits, whole."""
    rows = _page(config, stream, "quarantine", url, {"after": number - 1, "limit": 1})["labels"]
    if not rows or rows[0]["id"] != number:
        _end(f"no label {number} of stream {stream!r} is in quarantine", 1)
    typer.echo(json.dumps(rows[0], indent=2, ensure_ascii=False))


@quarantine_app.command("release")
def quarantine_release(
    stream: StreamArgument,
    ids: IdsArgument = None,
    labeller: LabellerFilter = None,
    name: ClassFilter = None,
    held_for: HeldFilter = None,
    everything: AllOption = False,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Learn labels after all. With --labeller alone, the labeller is believed again as well."""
    held = _held(ids, labeller, name, held_for, everything)
    _ask(config, "release", stream, reason, by_topic, url, held=held)


@quarantine_app.command("drop")
def quarantine_drop(
    stream: StreamArgument,
    ids: IdsArgument = None,
    labeller: LabellerFilter = None,
    name: ClassFilter = None,
    held_for: HeldFilter = None,
    everything: AllOption = False,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Delete labels that wait. They are learned only if they are sent again."""
    _ask(config, "drop", stream, reason, by_topic, url, held=_held(ids, labeller, name, held_for, everything))


@classes_app.command("list")
def classes_list(
    stream: StreamArgument,
    config: ConfigOption = None,
    format: ListFormat = "text",  # noqa: A002
    url: UrlOption = None,
) -> None:
    """Classes with what was learned of them, and names that are nearly the same as another."""
    rows = _page(config, stream, "classes", url, {})
    if format != "text":
        print_rows(rows, format)
        return
    _table(
        ["class", "labels", "recall", "scored", "first seen", "nearly the same", "was"],
        [
            [
                row["class"],
                str(row["labels_learned"]),
                "" if row["recall"] is None else f"{row['recall']:.3f}",
                str(row["scored"]),
                row["first_seen"][:19],
                ", ".join(row["alike"]),
                ", ".join(row["was"]),
            ]
            for row in rows
        ],
    )


@classes_app.command("rename")
def classes_rename(
    stream: StreamArgument,
    old: Annotated[str, typer.Argument(help="The name that goes.")],
    new: Annotated[str, typer.Argument(help="A name that no class has.")],
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Name a class otherwise, in all that was learned; later labels of the old name are taken for the new one."""
    _ask(config, "rename", stream, reason, by_topic, url, old=old, new=new)


@classes_app.command("merge")
def classes_merge(
    stream: StreamArgument,
    old: Annotated[str, typer.Argument(help="The class that goes.")],
    new: Annotated[str, typer.Argument(help="The class that it becomes part of.")],
    config: ConfigOption = None,
    reason: ReasonOption = "",
    yes: YesOption = False,
    by_topic: ByTopicOption = False,
    url: UrlOption = None,
) -> None:
    """Make one class of two. It cannot be undone: which example was of which is not kept."""
    if not yes:
        typer.confirm(f"{stream}: merge {old!r} into {new!r} for good?", abort=True)
    _ask(config, "merge", stream, reason, by_topic, url, old=old, new=new)


def _in_utc(at: datetime | None) -> datetime | None:
    return at if at is None or at.tzinfo is not None else at.replace(tzinfo=UTC)


def _published_topic(settings: Settings, topic: str) -> tuple[str, bool]:
    """The whole name of a topic that people may publish to, and whether it takes labels."""
    kinds = {"labels": settings.topics.name("labels")}
    kinds |= {name: settings.topics.event_topic(name) for name in settings.named_topics}
    kinds |= {"reports": settings.topics.name("reports"), "telemetry": settings.topics.name("telemetry")}
    found = kinds.get(topic) or next((whole for whole in kinds.values() if whole == topic), None)
    if found is None:
        raise Misconfigured(f"--topic {topic!r} takes no events or labels; there are: {', '.join(sorted(kinds))}")
    return found, found == kinds["labels"]


@contextlib.contextmanager
def _opened(file: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """The file and its size in bytes, or standard input, whose size nobody knows."""
    if file == "-":
        yield sys.stdin.buffer, None
        return
    path = Path(file)
    if not path.is_file():
        raise Misconfigured(f"there is no file {file}: name one of JSON lines, or - for standard input")
    with path.open("rb") as lines:
        yield lines, path.stat().st_size


def _with_progress(lines: BinaryIO, size: int | None, name: str) -> Iterator[bytes]:
    """The lines, with a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("standard input" if name == "-" else name, total=size)
        for line in lines:
            yield line
            progress.advance(task, len(line))


def _line(prediction: Prediction) -> str:
    best = prediction.probabilities.get(prediction.label or "", 0.0)
    label = "(nothing learned yet)" if prediction.label is None else f"{prediction.label} {best:.2f}"
    return (
        f"{prediction.predicted_at:%Y-%m-%d %H:%M:%S}  {prediction.stream:<12} {prediction.event_id:<24} {label:<32} "
        f"novelty {prediction.novelty:.2f}  {prediction.model_version}"
    )


def _letters(settings: Settings) -> list[Letter]:
    from deploy.messages import letter, read

    return [letter(record) for record in read(settings.kafka, settings.topics.name("dead_letters"))]


def _letter_at(settings: Settings, place: str) -> Letter:
    from deploy.messages import check_topic, letter, read_at
    from stream.events import Place

    partition, sign, offset = place.partition(":")
    if not (sign and partition.isdecimal() and offset.isdecimal()):
        _end(f"{place!r} is no place: give PARTITION:OFFSET as `trimtab dead-letters list` shows it", 2)
    topic = settings.topics.name("dead_letters")
    check_topic(settings.kafka, topic)
    record = read_at(settings.kafka, Place(topic=topic, partition=int(partition), offset=int(offset)))
    if record is None:
        _end(f"there is no dead letter at {place}, or its retention has ended", 1)
    return letter(record)


def _original(settings: Settings, one: Letter) -> Any:
    """The message as it was; one kept by reference is read at its first place."""
    if not one.by_reference:
        return one.original
    from deploy.messages import read_at

    record = read_at(settings.kafka, one.original.place)
    if record is None:
        first = f"{one.original.topic}[{one.original.partition}]@{one.original.offset}"
        _end(f"the message was too large to be copied, and its first place {first} no longer has it", 1)
    return record


def _told(one: Letter) -> dict[str, Any]:
    return {
        "place": f"{one.place.partition}:{one.place.offset}",
        "reason": one.reason,
        "field": one.field,
        "detail": one.detail,
        "event_id": one.event_id,
        "at": one.at,
        "first_topic": one.original.topic,
        "first_place": f"{one.original.partition}:{one.original.offset}",
        "by_reference": one.by_reference,
    }


def _readable(content: bytes | None) -> str:
    """Bytes for a terminal: JSON indented, plain text as it is, anything else as Python writes it."""
    if content is None:
        return "(none)"
    try:
        return json.dumps(json.loads(content), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        pass
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return repr(content)
    return text if text.isprintable() else repr(text)


def _pairs(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items()) or "none"


def _exam(manifest: VersionManifest) -> str:
    verdict = manifest.verdict
    if verdict is None:
        return ""
    outcome = "passed" if verdict.promote else "refused"
    return f"{outcome}, {verdict.candidate_accuracy:.3f} against {verdict.champion_accuracy:.3f}"


def _standing(row: dict[str, Any]) -> str:
    if row["in_service"]:
        return "in service"
    if row["rolled_back"]:
        return f"rolled back by itself: {row['rolled_back']}"
    return "pruned" if row["pruned_at"] else ""


def _overruled(registry: Registry, stream: str) -> dict[str, str]:
    """Why versions were rolled back by themselves, by version: the line after theirs says so."""
    history = registry.champions(stream)
    return {before.version: after.why for before, after in pairwise(history) if after.why}


def _registry(settings: Settings) -> Registry:
    from learner.registry import Registry

    cache_bytes = int(settings.registry.cache_gib * 2**30)
    return Registry(settings.registry.url, settings.registry.cache_dir, cache_bytes=cache_bytes)


def _served_versions(settings: Settings, stream: str) -> set[str]:
    """Every revision that a prediction names which may still be labelled or corrected, from the learner's store."""
    import sqlalchemy as sa

    from replay.schema import served

    query = sa.select(served.c.model_version).where(served.c.stream == stream).distinct()
    found = _from_store(settings, query)
    if found is None:
        raise Misconfigured(
            f"learner.store {settings.learner.store} is not here, so nobody knows which versions predictions still "
            "name: prune where the learner runs"
        )
    return {str(row[0]) for row in found}


def _moment(since: str) -> datetime | str:
    """What `--since` names: a version, a revision or a time."""
    import re

    if re.fullmatch(r"v[1-9][0-9]{0,8}(\.[0-9]{1,12})?", since):
        return since
    try:
        at = datetime.fromisoformat(since)
    except ValueError:
        _end(f"--since {since!r} is no version such as v13, and no time such as 2026-03-01T02:00:00", 2)
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _tell_blast(found: Blast) -> None:
    radius, way = found.radius, found.way
    suspects = ", ".join(
        f"{name} from {name}.{first} on" if first else name for name, first in way.suspects.since.items()
    )
    stream = way.suspects.stream
    typer.echo(f"{stream}: suspect are the answers of {suspects}. Back to {way.target}: {way.why}.")
    if not radius.total or radius.first is None or radius.last is None:
        typer.echo("They answered nothing that is still on the topic.")
        return
    versions = ", ".join(f"{name} {count:,}" for name, count in found.by_version.items())
    typer.echo(
        f"They made {radius.total:,} predictions ({versions}) from {radius.first:%Y-%m-%d %H:%M:%S} to "
        f"{radius.last:%Y-%m-%d %H:%M:%S} UTC; {radius.corrected:,} were corrected already, the answers to "
        f"{len(radius.open):,} events were not.\n"
    )
    rows = [
        [
            name or "(no class)",
            f"{count:,}",
            "" if right is None else f"{right:,}",
            "" if wrong is None else f"{wrong:,}",
        ]
        for name, count, right, wrong in found.by_class
    ]
    _table(["class", "predictions", "labelled, right", "labelled, wrong"], rows[:SHOWN_CLASSES])
    if len(rows) > SHOWN_CLASSES:
        typer.echo(f"and {len(rows) - SHOWN_CLASSES} more classes; --json has them")
    typer.echo()


def _tell_progress(done: int, total: int) -> None:
    typer.echo(f"{done:,} of {total:,} corrected", err=True)


def _until_served(serving: Callable[[], str | None], wanted: Callable[[str], bool], seconds: float = 60.0) -> None:
    """Return once what is wanted is announced."""
    import time

    patience = time.monotonic() + seconds
    while (name := serving()) is None or not wanted(name):
        if time.monotonic() > patience:
            _end(f"{name or 'nothing'} is still in service after {seconds:.0f} s: see what the topic audit says", 1)
        time.sleep(0.5)


def _fate(settings: Settings, registry: Registry, stream: str, manifest: VersionManifest) -> list[str]:
    """What became of a version, oldest first: refused, promoted, rolled back, and by what or whom."""
    import sqlalchemy as sa

    from replay.schema import champions, moment, versions

    c, v = champions.c, versions.c
    reigns = _from_store(settings, sa.select(c.version, c.cause, c.at).where(c.stream == stream).order_by(c.id))
    rows = _from_store(settings, sa.select(v.state, v.detail).where(v.stream == stream, v.number == manifest.number))
    said = []
    for row in rows or ():
        if row.state in ("refused", "waiting"):
            said.append(f"{row.state} when it was made: {'; '.join(row.detail.get('reasons', ()))}")
    # Without the database the registry knows when, and not why.
    known = (
        [(f"v{row.version}", moment(row.at), row.cause) for row in reigns]
        if reigns
        else [
            (one.version, one.since, one.why and f"the one before was rolled back: {one.why}")
            for one in registry.champions(stream)
        ]
    )
    for place, (name, at, cause) in enumerate(known):
        after = known[place + 1] if place + 1 < len(known) else None
        if name == manifest.name:
            until = f"until {after[1]:%Y-%m-%d %H:%M:%S}, then {after[0]}: {after[2]}" if after else "and still is"
            why = f" ({cause})" if cause else ""
            said.append(f"in service from {at:%Y-%m-%d %H:%M:%S} UTC{why}, {until}")
    return said or ["it was never in service"]


def _forgotten(settings: Settings, stream: str) -> dict[int, int] | None:
    """By version number, how many of the examples it was trained on are gone; None where the store is not here."""
    import sqlalchemy as sa

    from replay.schema import versions

    found = _from_store(settings, sa.select(versions.c.number, versions.c.detail).where(versions.c.stream == stream))
    return None if found is None else {number: detail.get("forgotten", 0) for number, detail in found}


def _rebuildable(forgotten: dict[int, int] | None, manifest: VersionManifest) -> str:
    """What stands in the way of making a version again; empty where nothing does."""
    if forgotten is None:
        return "unknown: learner.store is not here" if manifest.parent else ""
    count = forgotten.get(manifest.number, 0)
    return f"not rebuildable: {count} example{'' if count == 1 else 's'} forgotten" if count else ""


def _from_store(settings: Settings, query: Any) -> list[Any] | None:
    """Rows of the learner's store; None where its file is not here."""
    if not _store_is_here(settings):
        return None
    import sqlalchemy as sa

    from replay import schema

    url = settings.learner.store
    engine = schema.connect(url)
    try:
        with engine.connect() as connection:
            return list(connection.execute(query).all())
    except sa.exc.SQLAlchemyError as error:
        raise Misconfigured(f"learner.store {url!r} cannot be read: {error}") from None
    finally:
        engine.dispose()


def _explained(
    settings: Settings, stream: str | None, event_id: str, everything: bool, url: str | None
) -> dict[str, Any]:
    """What is known of an event, from here where the database is, else from the learner."""
    import urllib.parse

    streams = sorted(settings.streams)
    if url is None and _store_is_here(settings):
        from deploy.explain import LOOKED_AT, answering_from
        from deploy.wiring import explainer, open_registry, open_store
        from replay.history import History

        store = open_store(settings)
        try:
            if stream is None and len(streams) > 1:
                knowing = History(store).streams_of(event_id, streams)
                stream = _the_only(knowing or streams)
            registry = open_registry(settings)
            made = explainer(settings, store, registry, lambda name: answering_from(store, registry, name))
            return made.explain(stream or streams[0], event_id, None if everything else LOOKED_AT)
        finally:
            store.close()
    if everything:
        _end("--all reads whole topics: run it where the learner's database can be read", 2)
    name = stream or _the_only(streams)
    path = "/".join(urllib.parse.quote(part, safe="") for part in ("console", "api", "explain", name, event_id))
    base, status, content = _call(settings, url, name, "", None, path=path)
    if status != 200:
        _end(f"the learner at {base} answered {status}: {_refusal(content)}", 1)
    answer: dict[str, Any] = json.loads(content)
    return answer


def _the_only(streams: Sequence[str]) -> str:
    if len(streams) == 1:
        return streams[0]
    raise Misconfigured(f"an event id is unique within its stream only: give --stream, one of {', '.join(streams)}")


def _store_is_here(settings: Settings) -> bool:
    url = settings.learner.store
    return not url.startswith("sqlite:///") or Path(url.removeprefix("sqlite:///")).is_file()


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _ask(
    config: Path | None,
    action: Action,
    stream: str,
    reason: str,
    by_topic: bool,
    url: str | None,
    *,
    err: bool = False,
    **fields: Any,
) -> None:
    """Ask the learner for something, and end with what became of it.

    Args:
        fields: of the request, by its own names.
    """
    settings = _settings(config)
    _known_stream(settings, stream)
    from getpass import getuser

    from pydantic import ValidationError

    from learner.control import ControlRequest, first_wrong

    try:
        request = ControlRequest(action=action, stream=stream, reason=reason, who=getuser(), **fields)
    except ValidationError as error:
        _end(first_wrong(error), 2)
    if by_topic:
        _ask_by_topic(settings, request)
        typer.echo(
            f"Asked on {settings.topics.name('control')} as {request.id}; the answer will be on "
            f"{settings.topics.name('audit')}, and `trimtab asked {request.id}` tells it.",
            err=err,
        )
        return
    answer = _ask_by_http(settings, request, url)
    if answer.plan is not None and answer.plan.examples:
        _table(["class", "examples"], [[name, str(count)] for name, count in answer.plan.examples.items()])
    if not answer.accepted:
        _end(answer.message, 1)
    typer.echo(answer.message, err=err)
    for title, places in (("Cleaned", answer.cleaned), ("Not reached", answer.not_reached)):
        for place in places:
            typer.echo(f"{title}: {place}")


def _held(
    ids: Sequence[int] | None, labeller: str | None, label: str | None, reason: str | None, everything: bool
) -> HeldLabels:
    from pydantic import ValidationError

    from learner.control import HeldLabels

    try:
        return HeldLabels(ids=tuple(ids or ()), labeller=labeller, label=label, reason=reason, all=everything)
    except ValidationError as error:
        _end(error.errors(include_url=False)[0]["msg"].removeprefix("Value error, "), 2)


def _ask_by_topic(settings: Settings, request: ControlRequest) -> None:
    from deploy.messages import Publisher, check_topic
    from learner.control import SIGNATURE, sign
    from stream.events import encode

    key, value, topic = settings.control.key(), encode(request), settings.topics.name("control")
    if key is None and not settings.control.protected_by_acls:
        raise Misconfigured(
            "the control topic takes no requests: set control.secret_file, or control.protected_by_acls where the "
            "broker decides who may write"
        )
    check_topic(settings.kafka, topic)
    with Publisher(settings.kafka) as publisher:
        publisher.send(topic, request.stream.encode(), value, ((SIGNATURE, sign(value, key)),) if key else ())


def _ask_by_http(settings: Settings, request: ControlRequest, url: str | None) -> ControlAnswer:
    from pydantic import ValidationError

    from learner.control import ControlAnswer

    body = request.model_dump_json(exclude={"action", "stream"}).encode()
    base, status, content = _call(settings, url, request.stream, request.action, body)
    if status not in (200, 202, 409):
        _end(f"the learner at {base} answered {status}: {_refusal(content)}", 1)
    try:
        return ControlAnswer.model_validate_json(content)
    except ValidationError:
        _end(f"what answers at {base} is no learner: {content[:200]!r}", 1)


def _page(config: Path | None, stream: str, what: str, url: str | None, query: Mapping[str, Any]) -> Any:
    """What the learner shows of a stream."""
    import urllib.parse

    settings = _settings(config)
    _known_stream(settings, stream)
    wanted = f"{what}?{urllib.parse.urlencode(query)}" if query else what
    base, status, content = _call(settings, url, stream, wanted, None)
    if status != 200:
        _end(f"the learner at {base} answered {status}: {_refusal(content)}", 1)
    try:
        return json.loads(content)
    except ValueError:
        _end(f"what answers at {base} is no learner: {content[:200]!r}", 1)


def _call(
    settings: Settings, url: str | None, stream: str, what: str, body: bytes | None, *, path: str | None = None
) -> tuple[str, int, bytes]:
    """The learner's address, its status and what it says; a body makes it a POST, `path` is another page."""
    import urllib.error
    import urllib.parse
    import urllib.request

    http = settings.learner.http
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(http.host, http.host)
    base = (url or f"http://{host}:{http.port}").rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise Misconfigured(f"--learner {base!r}: give an address such as http://127.0.0.1:6070")
    token = http.secret()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    where = f"{base}/{path or 'streams/' + urllib.parse.quote(stream, safe='') + '/' + what}"
    try:
        with urllib.request.urlopen(urllib.request.Request(where, body, headers), timeout=60) as answer:
            return base, answer.status, answer.read()
    except urllib.error.HTTPError as refusal:
        return base, refusal.code, refusal.read()
    except OSError as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        ways = "Give --learner URL" if body is None else "Give --learner URL, or --by-topic"
        _end(
            f"no learner answers at {base} ({why}): is it running (`trimtab learner`), and is learner.http right? "
            f"{ways}",
            1,
        )


def _refusal(content: bytes) -> str:
    try:
        found = json.loads(content)
    except ValueError:
        return repr(content[:200])
    return str(found.get("error", found)) if isinstance(found, dict) else repr(content[:200])


if __name__ == "__main__":
    main()
