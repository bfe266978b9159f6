"""The commands of the first ten minutes: `init`, `doctor`, and `predict`, which asks about one text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deploy.terminal import (
    ConfigOption,
    Format,
    ListFormat,
    end,
    held_back,
    known_stream,
    print_json,
    print_rows,
    read_settings,
    table,
)
from stream.errors import DeadLetter, Misconfigured

if TYPE_CHECKING:
    from deploy.begin import Checked, Guess, Wish
    from deploy.settings import Settings

ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="WHAT=NAME", help="What a column holds, such as text=Body; may be repeated."),
]


def add_to(app: typer.Typer) -> None:
    """Put these commands on the command line."""
    app.command(rich_help_panel="Set up")(init)
    app.command(rich_help_panel="Set up")(doctor)
    app.command(rich_help_panel="Messages")(predict)


def columns_given(column: list[str] | None) -> dict[str, str]:
    """What was given as `--column WHAT=NAME`."""
    found: dict[str, str] = {}
    for one in column or ():
        what, sign, name = one.partition("=")
        if not (what and sign and name):
            end(f"--column {one!r}: give WHAT=NAME, such as text=Body", 2)
        found[what] = name
    return found


def init(
    file: Annotated[Path | None, typer.Argument(help="Example: a CSV, JSON lines or Parquet file.")] = None,
    kind: Annotated[
        Literal["text", "telemetry"] | None, typer.Option(help="What the events are; by the file when left out.")
    ] = None,
    stream: Annotated[str | None, typer.Option(help="Name of the stream; the file's when left out.")] = None,
    kafka: Annotated[str | None, typer.Option(help="HOST:PORT of Kafka.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Put before the name of every topic.")] = None,
    topic: Annotated[str | None, typer.Option(help="A topic of its own for the stream's events.")] = None,
    channels: Annotated[str | None, typer.Option(help="Of telemetry, with commas between; by the file else.")] = None,
    column: ColumnOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The settings file to write.")] = Path("trimtab.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a settings file that is there.")] = False,
    ask: Annotated[
        bool | None, typer.Option("--ask/--no-ask", help="Ask what no option says; on a terminal it does.")
    ] = None,
) -> None:
    """Write a first settings file with comments, check it against an example file, and say what to run."""
    from deploy.begin import check_file, guess, parsed, written
    from deploy.tables import columns_of, match_columns
    from stream.events import utc_now

    if output.exists() and not force:
        end(f"{output} is there already: give --force to replace it, or --output for another name", 2)
    asking = sys.stdin.isatty() if ask is None else ask
    given = columns_given(column)
    if file is None and asking:
        answer = typer.prompt("Example file (CSV, JSON lines, Parquet; empty for none)", default="", show_default=False)
        file = Path(answer) if answer else None
    seen = None if file is None else guess(file, given)
    wish = _wish(seen, kind, stream, kafka, prefix, topic, channels, asking)
    settings = parsed(written(wish))
    checked: Checked | None = None
    if file is not None:
        columns = (
            seen.columns if seen is not None and seen.kind == wish.kind else match_columns(columns_of(file), given)
        )
        checked = check_file(file, settings, wish.stream, columns, utc_now())
        if not checked.events:
            end(f"{file}: nothing of it can be used as {wish.kind}\n{held_back(checked.bad, 'rows')}", 2)
        wish = _with_classes(wish, len(checked.classes))
    output.write_text(written(wish), encoding="utf-8")
    typer.echo(f"Wrote {output}: stream {wish.stream} ({wish.kind}), Kafka at {settings.kafka.bootstrap_servers}.")
    if checked is not None:
        _say_file(str(file), checked)
    _say_next(wish, settings, None if file is None else str(file), given, output)


def doctor(
    config: ConfigOption = None,
    format: ListFormat = "text",  # noqa: A002
) -> None:
    """Look at settings, broker, topics, database, registry, GPU, versions and clock; exit 1 where one is wrong."""
    from deploy.doctor import examine

    found = list(examine(config))
    if format != "text":
        print_rows((one.as_json() for one in found), format)
    else:
        table(["", "what", "found"], [[one.state, one.check, one.found] for one in found])
        for one in found:
            if one.mend and one.state != "ok":
                typer.echo(f"\n{one.check}: {one.mend}")
    if any(one.state == "wrong" for one in found):
        raise typer.Exit(1)


def predict(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Name of a text stream, as in the settings.")],
    text: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to ask about.")],
    config: ConfigOption = None,
    event_id: Annotated[str | None, typer.Option("--id", help="The event's id; one is made up when left out.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to wait for the answer.", min=0.1, max=600)] = 30,
    format: Format = "text",  # noqa: A002
) -> None:
    """Publish one text as an event, wait for its prediction and print it. The event stays in the stream."""
    from uuid import uuid4

    from deploy.messages import ask
    from deploy.settings import rules
    from stream.events import Decoder, Record, Report, encode, utc_now

    settings = read_settings(config)
    if settings.streams[known_stream(settings, stream)].kind != "text":
        raise Misconfigured(
            f"stream {stream!r} takes windows of numbers: publish a file of them with `trimtab publish`"
        )
    event = Report(
        event_id=event_id or uuid4().hex[:16],
        stream=stream,
        source="trimtab predict",
        observed_at=utc_now(),
        text=" ".join(text),
    )
    decoder, topic = Decoder(rules(settings)), settings.topic_of(stream)
    try:
        decoder.event(Record(topic, 0, 0, None, encode(event)))
    except DeadLetter as refusal:
        end(str(refusal), 2)
    answer = ask(settings.kafka, (topic, settings.topics.name("predictions")), event, seconds)
    if answer is None:
        end(f"no prediction of {event.event_id} came within {seconds:g} s: is a worker running (`trimtab worker`)?", 1)
    if format == "json":
        print_json(json.loads(answer.value or b"null"))
        return
    found = decoder.prediction(answer)
    if found.label is None:
        typer.echo(f"{found.event_id}: nothing was learned yet ({found.model_version})")
        return
    best = ", ".join(f"{name} {share:.2f}" for name, share in found.probabilities.items())
    typer.echo(f"{found.event_id}: {found.label} ({best}; novelty {found.novelty:.2f}; {found.model_version})")


def _wish(
    seen: Guess | None,
    kind: Literal["text", "telemetry"] | None,
    stream: str | None,
    kafka: str | None,
    prefix: str | None,
    topic: str | None,
    channels: str | None,
    asking: bool,
) -> Wish:
    """What no option says is asked, or guessed from the file."""
    from deploy.begin import Wish

    if kind is None:
        likely: str = "telemetry" if channels else "text" if seen is None else seen.kind
        if asking:
            likely = typer.prompt("Events are text or telemetry", default=likely)
            if likely not in ("text", "telemetry"):
                end(f"{likely!r}: events are text or telemetry", 2)
        kind = "telemetry" if likely == "telemetry" else "text"
    if stream is None:
        likely = "events" if seen is None else seen.stream
        stream = typer.prompt("Name of the stream", default=likely) if asking else likely
    if kind == "telemetry" and channels is None:
        likely = ",".join(seen.channels) if seen is not None else ""
        channels = typer.prompt("Channels, with commas between", default=likely or None) if asking else likely
    if kafka is None:
        kafka = typer.prompt("Kafka, as HOST:PORT", default=Wish.bootstrap) if asking else Wish.bootstrap
    if prefix is None:
        question = "Put before the name of every topic (empty for nothing)"
        prefix = typer.prompt(question, default="", show_default=False) if asking else ""
    if topic is None and asking:
        usual = "reports" if kind == "text" else "telemetry"
        topic = typer.prompt("Topic of its events", default=usual)
        topic = None if topic == usual else topic
    names = tuple(name.strip() for name in (channels or "").split(",") if name.strip())
    if kind == "telemetry" and not names:
        end("telemetry needs channels: give --channels NAME,NAME or an example file with columns of numbers", 2)
    return Wish(kind, stream, kafka, topic, prefix, names if kind == "telemetry" else ())


def _with_classes(wish: Wish, classes: int) -> Wish:
    from dataclasses import replace

    return replace(wish, classes=classes)


def _say_file(file: str, checked: Checked) -> None:
    held = ", ".join(f"{what} from {column!r}" for what, column in checked.columns.items())
    labels = checked.classes.total()
    typer.echo(f"{file}: {checked.events} events, {labels} of them labelled, {len(checked.classes)} classes ({held}).")
    if checked.bad:
        typer.echo(held_back(checked.bad, "rows"))
    if checked.few:
        typer.echo(
            f"Note: {len(checked.few)} of {len(checked.classes)} classes have fewer than 10 labels. They are predicted "
            "all the same; an exam judges a class from its tenth label on."
        )


def _say_next(wish: Wish, settings: Settings, file: str | None, given: dict[str, str], output: Path) -> None:
    local = settings.kafka.bootstrap_servers.partition(":")[0] in ("127.0.0.1", "localhost")
    port = settings.kafka.bootstrap_servers.rpartition(":")[2]
    lines = ["trimtab topics create", "trimtab learner &", "trimtab worker &"]
    if local:
        port_option = "" if port == "9092" else f" --port {port}"
        lines.insert(0, f"trimtab broker{port_option} &   # leave out where a Kafka runs there already")
    if file is not None:
        options = "".join(f" --column {what}={_quoted(name)}" for what, name in given.items())
        lines.append(f"trimtab publish {_quoted(file)}{options}")
    lines.append(
        f'trimtab predict {wish.stream} "a text to ask about"'
        if wish.kind == "text"
        else "trimtab predictions --follow"
    )
    if output != Path("trimtab.yaml"):
        lines.insert(0, f"export TRIMTAB_CONFIG={_quoted(str(output))}")
    typer.echo("\n".join(["Now run:", *(f"  {line}" for line in lines), "What is wrong, if anything: trimtab doctor"]))


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
