"""The ways in and out: labels as files that other tools read and write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from deploy.cli_begin import ColumnOption, columns_given
from deploy.terminal import SHOWN_BAD_LINES, ConfigOption, end, only_stream, read_settings
from stream.errors import Misconfigured

if TYPE_CHECKING:
    from deploy.messages import BadLine, Publisher
    from deploy.settings import Settings
    from replay.store import LearnerStore

T = TypeVar("T")

LABEL_COLUMNS = ("event_id", "label", "labeller", "labelled_at", "confidence", "withdrawn")

StreamOption = Annotated[
    str | None, typer.Option("--stream", help="Name of the stream; may be left out where there is one only.")
]

labels_app = typer.Typer(no_args_is_help=True, help="Labels as a file: export what was said, import what others say.")


def add_to(app: typer.Typer) -> None:
    """Put these commands on the command line."""
    app.add_typer(labels_app, name="labels", rich_help_panel="Messages")


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
