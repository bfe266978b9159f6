"""What the modules of commands share: options by one name, tables, and the one way to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from stream.errors import Misconfigured

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.messages import BadLine
    from deploy.settings import Settings

SHOWN_BAD_LINES = 20

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Settings file; TRIMTAB_CONFIG or trimtab.yaml when left out.")
]
Format = Annotated[Literal["text", "json"], typer.Option("--format", help="For people, or one JSON document.")]
ListFormat = Annotated[
    Literal["text", "json", "jsonl"],
    typer.Option("--format", help="For people; one JSON document, a list; or one JSON object a line."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="The same as --format json.")]
StreamArgument = Annotated[str, typer.Argument(metavar="STREAM", help="Name of the stream, as in the settings.")]


def end(sentence: str, code: int) -> NoReturn:
    """Say on stderr why, and end with the code."""
    typer.echo(f"trimtab: {sentence}", err=True)
    raise typer.Exit(code)


def read_settings(path: Path | None) -> Settings:
    """The settings, as every command reads them."""
    from deploy.settings import load_settings

    return load_settings(path)


def known_stream(settings: Settings, stream: str) -> str:
    """The stream, if the settings have it.

    Raises:
        Misconfigured: they do not; the message names the nearest, or all.
    """
    if stream in settings.streams:
        return stream
    near = get_close_matches(stream, settings.streams, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(settings.streams))}"
    raise Misconfigured(f"the settings have no stream {stream!r}; {hint}")


def only_stream(settings: Settings, stream: str | None) -> str:
    """The stream that is named; may be left out where there is one only.

    Raises:
        Misconfigured: it is not in the settings, or was left out where there are several.
    """
    if stream is not None:
        return known_stream(settings, stream)
    if len(settings.streams) > 1:
        raise Misconfigured(f"there are several streams: give --stream, one of {', '.join(sorted(settings.streams))}")
    return next(iter(settings.streams))


def held_back(bad: Sequence[BadLine], what: str = "lines") -> str:
    """The lines of a file that were not taken, by number, as many as anyone reads."""
    shown = [f"  line {line.number}: {line.why}" for line in bad[:SHOWN_BAD_LINES]]
    more = [f"  and {len(bad) - SHOWN_BAD_LINES} more"] if len(bad) > SHOWN_BAD_LINES else []
    return "\n".join([f"{len(bad)} {what} were held back:", *shown, *more])


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for whole lines."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=240)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns; cells are text, whatever is in them."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    console().print(made)


def print_json(found: Any) -> None:
    """Print one JSON document."""
    typer.echo(_json(found))


def print_rows(rows: Iterable[Mapping[str, Any]], form: Literal["json", "jsonl"]) -> None:
    """Print rows as one JSON list or one object a line, each as soon as it is there.

    A list is closed only after its last row: what an error cut short is no JSON.
    """
    count = 0
    for count, row in enumerate(rows, 1):
        before = "" if form == "jsonl" else "[" if count == 1 else ","
        typer.echo(f"{before}{_json(row)}")
    if form == "json":
        typer.echo("]" if count else "[]")


def _json(found: Any) -> str:
    """JSON in the letters that people know; where half a character makes that impossible, escaped."""
    text = json.dumps(found, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(found)
    return text
