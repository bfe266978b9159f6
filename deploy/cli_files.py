"""The ways in and out: labels as files, versions as folders, that other tools read and write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from deploy.cli_begin import ColumnOption, columns_given
from deploy.terminal import (
    SHOWN_BAD_LINES,
    ConfigOption,
    StreamArgument,
    end,
    known_stream,
    only_stream,
    read_settings,
)
from stream.errors import Misconfigured

if TYPE_CHECKING:
    from deploy.messages import BadLine, Publisher
    from deploy.settings import Settings
    from learner.handout import Served
    from replay.history import Training
    from replay.store import LearnerStore

T = TypeVar("T")

LABEL_COLUMNS = ("event_id", "label", "labeller", "labelled_at", "confidence", "withdrawn")

StreamOption = Annotated[
    str | None, typer.Option("--stream", help="Name of the stream; may be left out where there is one only.")
]

labels_app = typer.Typer(no_args_is_help=True, help="Labels as a file: export what was said, import what others say.")


def add_to(app: typer.Typer, versions: typer.Typer) -> None:
    """Put these commands on the command line; `versions` is the group of that name."""
    app.add_typer(labels_app, name="labels", rich_help_panel="Messages")
    versions.command("export")(versions_export)


@labels_app.command("export")
def labels_export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="To write: .csv, .tsv, .jsonl or .parquet.")],
    stream: StreamOption = None,
    config: ConfigOption = None,
) -> None:
    """Write every label that the learner's database holds: the last word of each labeller on each event.

    Labels that wait in quarantine are not among them.
    """
    settings = read_settings(config)
    name = only_stream(settings, stream)
    from deploy.tables import write_rows
    from replay.history import History

    with closing(_store(settings)) as store:
        rows = (
            {
                "event_id": said.event_id,
                "label": said.label,
                "labeller": said.labeller,
                "labelled_at": said.labelled_at.isoformat(),
                "confidence": said.confidence,
                "withdrawn": said.label is None,
            }
            for said in History(store).labels(name)
        )
        count = write_rows(file, LABEL_COLUMNS, _counted(rows, str(file)))
    typer.echo(f"Wrote {count} labels of {name} to {file}.")


@labels_app.command("import")
def labels_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CSV, JSON lines or Parquet file.")],
    stream: StreamOption = None,
    column: ColumnOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every row and publish none.")] = False,
    config: ConfigOption = None,
) -> None:
    """Publish the labels of a file to the topic labels, as any labeller does; a second time nothing changes.

    Needed are event_id and label; labeller, labelled_at, confidence and withdrawn are optional. A label without a time
    was given when the file was last changed. A row that cannot be used is named, and the others are taken.
    """
    settings = read_settings(config)
    name = only_stream(settings, stream)
    from deploy.messages import Publisher, check_topic, publish_entries
    from deploy.settings import rules
    from deploy.tables import columns_of, match_columns, read_labels, read_rows
    from stream.events import Decoder

    topic = settings.topics.name("labels")
    columns = match_columns(columns_of(file), columns_given(column))
    changed = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    entries = read_labels(read_rows(file), name, columns, changed)
    rows = refused = 0
    shown: list[BadLine] = []
    if not dry_run:
        check_topic(settings.kafka, topic)
    publishing: AbstractContextManager[Publisher | None] = nullcontext() if dry_run else Publisher(settings.kafka)
    with publishing as publisher:
        found = publish_entries(entries, (topic, topic), publisher, Decoder(rules(settings)))
        for bad in _counted(found, str(file)):
            rows += 1
            if bad is not None:
                refused += 1
                if len(shown) < SHOWN_BAD_LINES:
                    shown.append(bad)
    good = rows - refused
    done = f"{good} would be published to {topic}" if dry_run else f"{good} were published to {topic}"
    typer.echo(f"Of {rows} rows of {file}, {done}; {refused} were refused.")
    if refused:
        more = [f"  and {refused - len(shown)} more"] if refused > len(shown) else []
        end(
            "\n".join([f"{refused} rows were refused:", *(f"  line {one.number}: {one.why}" for one in shown), *more]),
            1,
        )


def versions_export(
    stream: StreamArgument,
    version: Annotated[
        str, typer.Argument(help="A version such as v12, with the head it was made with; or v12.34, as it was served.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="To write; it must not be there, or be empty.")],
    config: ConfigOption = None,
) -> None:
    """Write a version as a folder that plain transformers (text) or torch (telemetry) loads, with a model card.

    The registry is enough; where the learner's database can be read, the card also says which dates it was trained on
    and what labels said of its answers. What is written is never taken back by `trimtab forget`.
    """
    settings = read_settings(config)
    known_stream(settings, stream)
    from deploy.wiring import open_registry
    from learner.handout import hand_out

    training, served = _told(settings, stream, version.partition(".")[0])
    files = hand_out(open_registry(settings), stream, version, folder, training=training, served=served)
    size = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(f"Wrote {version} of {stream} to {folder}: {', '.join(files)}; {size / 2**20:.1f} MiB.")
    typer.echo(f"{folder}/README.md has a snippet that answers with it. Its licence is yours to fill in there.")


def _told(settings: Settings, stream: str, version: str) -> tuple[Training | None, Served | None]:
    """What the learner's database tells of a version; nothing where it is not here, or does not know it."""
    from learner.handout import Served
    from replay.history import History
    from stream.events import utc_now

    try:
        opened = _store(settings)
    except Misconfigured as error:
        typer.echo(f"Note: the card leaves out what only the database knows: {error}", err=True)
        return None, None
    with closing(opened) as store:
        history = History(store)
        number = version.removeprefix("v")
        training = history.training(stream, int(number)) if number.isdecimal() and len(number) < 10 else None
        classes: dict[str, tuple[int, int]] = {}
        for revision, answered, right, many in history.verdicts(stream):
            if answered is not None and revision.partition(".")[0] == version:
                good, total = classes.get(answered, (0, 0))
                classes[answered] = good + many * right, total + many
        return training, Served(utc_now(), classes)


def _store(settings: Settings) -> LearnerStore:
    """The learner's database, which must be there already.

    Raises:
        Misconfigured: its file is not here.
    """
    from deploy.wiring import open_store
    from replay.schema import parsed

    where = parsed(settings.learner.store)
    if where.database and where.get_backend_name() == "sqlite" and not Path(where.database).is_file():
        raise Misconfigured(f"there is no learner's database at {where.database}: run this where the learner runs")
    return open_store(settings)


def _counted(rows: Iterable[T], name: str) -> Iterator[T]:
    """The rows, with their number so far on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,.0f} rows"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None)
        for row in rows:
            yield row
            progress.advance(task)
