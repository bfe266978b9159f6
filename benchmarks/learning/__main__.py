"""Measure trimtab on your own data, beside what you could pick instead.

  python -m benchmarks.learning --protocol class-incremental --train FILE --text-column text --label-column label
  python -m benchmarks.learning --protocol prequential --train FILE --feature-columns a,b --label-column y --order given
  python -m benchmarks.learning suite            the tables of docs/learning.md

Nothing is tuned to the data: trimtab runs with the defaults of its YAML. Measured cells are kept in .cache/learning,
so a run that was cut off goes on where it ended.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.learning import outcome
from benchmarks.learning.cells import CACHE, INSTANT, RIVALS, STRATEGIES, TRIMTAB, Entry, Kept, Runner, Task
from benchmarks.learning.protocols import shares
from benchmarks.learning.reading import Columns, Examples, Unusable, hold_out, read

PLAIN = ("majority", "no_change", "train_once", "joint", INSTANT, "river", TRIMTAB)
"""Rows that are run without being asked for, cheapest first."""
QUICK_EXAMPLES = 1_500


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments[:1] == ["suite"]:
        from benchmarks.learning import suite

        return suite.main(arguments[1:])
    options = _parser().parse_args(arguments)
    console = Console(stderr=True, highlight=False)
    try:
        task, notes = _task(options)
        entries = _entries(options)
    except Unusable as refusal:
        console.print(f"[red]{refusal}", soft_wrap=True)
        return 2
    for note in notes:
        console.print(note, soft_wrap=True)
    runner = Runner(
        Kept(None if options.no_cache else CACHE / "cells"),
        None if options.no_cache else CACHE,
        say=lambda line: console.print(line, soft_wrap=True),
        device=options.device,
        minutes=options.budget,
    )
    rows = {}
    for entry in entries:
        rows[entry] = list(runner.row(task, entry))
        # After each row, so that a run that is cut off has left what it had.
        result = outcome.result(f"learning ({task.protocol})", rows)
        if options.json is not None and result.rows:
            result.write(options.json)
    Console(width=150).print(outcome.table(task, rows, len(task.seeds)))
    left = [name for name in STRATEGIES if name not in {entry.name for entry in entries}]
    if left:
        console.print(f"not run: {', '.join(left)} (add --strategies)")
    return 1 if runner.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocol", choices=("class-incremental", "prequential"), required=True)
    parser.add_argument(
        "--train", type=Path, required=True, metavar="FILE", help="CSV, JSON lines (plain or gzip), Parquet"
    )
    parser.add_argument("--test", type=Path, metavar="FILE", help="without it, class-incremental holds a part out")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text-column", metavar="NAME")
    what.add_argument(
        "--feature-columns",
        nargs="+",
        metavar="NAME",
        help="numbers, one channel each; also as a,b,c; * for all others",
    )
    parser.add_argument("--label-column", required=True, metavar="NAME")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--time-column", metavar="NAME", help="put the rows in its order")
    order.add_argument("--order", choices=("given",), help="the rows are in order")
    parser.add_argument("--experience-column", metavar="NAME", help="its values, in order, are the experiences")
    parser.add_argument("--experiences", type=_positive, default=10, metavar="N")
    parser.add_argument("--label-delay", type=_natural, default=0, metavar="N", help="events before a label comes")
    parser.add_argument("--shots", type=_positive, metavar="N", help="labels of each new class: the few-shot protocol")
    parser.add_argument("--new-classes", type=_positive, default=10, metavar="N", help="new classes with --shots")
    parser.add_argument("--store", type=_positive, metavar="N", help="examples in the replay store, not the default")
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N")
    parser.add_argument("--strategies", action="store_true", help="every strategy too, each as slow as trimtab itself")
    parser.add_argument("--only", metavar="NAMES", help="only these rows, separated by commas")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="no cell is begun after so long")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads of a fine-tune, not the default")
    parser.add_argument(
        "--quick", action="store_true", help=f"one seed, {QUICK_EXAMPLES:,} examples: shows that it works"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well, after every row")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep measured cells and embeddings")
    return parser


def _task(options: argparse.Namespace) -> tuple[Task, list[str]]:
    columns = Columns(
        label=options.label_column,
        text=options.text_column,
        features=tuple(options.feature_columns or ()),
        time=options.time_column,
        experience=options.experience_column,
    )
    train = read(options.train, columns)
    in_order = options.order == "given" or options.time_column is not None
    notes: list[str] = []
    if options.protocol == "prequential" and not in_order:
        notes.append("no --time-column and no --order: the rows are taken in the file's order")
    if options.quick and len(train) > QUICK_EXAMPLES:
        step = len(train) / QUICK_EXAMPLES
        train = train.take([int(number * step) for number in range(QUICK_EXAMPLES)])
    test: Examples | None = None
    if options.test is not None:
        # Its own columns of time and experience do not matter.
        test = read(
            options.test, replace(columns, time=None, experience=None, features=train.channels or columns.features)
        )
        known = set(train.labels)
        asked = [place for place, label in enumerate(test.labels) if label in known]
        if len(asked) < len(test):
            notes.append(f"{len(test) - len(asked):,} test examples of classes that are never taught are left out")
            test = test.take(asked)
        if not asked:
            raise Unusable(f"{options.test} has no example of a class in {options.train}")
    elif options.protocol != "prequential":
        train, test = hold_out(train)
    if len(train.classes) < 2:
        raise Unusable(f"{options.train} has one class only, {train.labels[0]!r}: there is nothing to tell apart")
    if test is not None and not len(test):
        raise Unusable(f"{options.train}: no class has two examples, so none can be held out; name a file with --test")
    notes += [*train.notes, *(test.notes if test is not None and options.test is not None else ())]
    few = options.shots is not None and options.protocol == "class-incremental"
    experiences = options.experiences
    if options.protocol == "class-incremental" and not few and not train.groups and len(train.classes) < experiences:
        notes.append(f"{len(train.classes)} classes make {len(train.classes)} experiences, not {experiences}")
        experiences = len(train.classes)
    if few and options.new_classes > max(1, len(train.classes) // 3):
        notes.append(
            f"{max(1, len(train.classes) // 3)} new classes, not {options.new_classes}: a third of all at most"
        )
    notes.append(f"train: {len(train):,} examples, {shares(train.labels)}")
    if test is not None:
        notes.append(f"test: {len(test):,} examples, {shares(test.labels)}")
    task = Task(
        name=options.train.name,
        protocol="few-shot" if few else options.protocol,
        train=train,
        test=test,
        experiences=experiences,
        delay=options.label_delay,
        shots=options.shots or 5,
        new_classes=options.new_classes,
        in_order=in_order,
        seeds=(0,) if options.quick else tuple(range(options.seeds)),
        threads=options.threads,
    )
    return task, notes


def _entries(options: argparse.Namespace) -> list[Entry]:
    known = (*PLAIN, *STRATEGIES)
    names = list(PLAIN) + (list(STRATEGIES) if options.strategies else [])
    if options.only:
        names = [name.strip() for name in options.only.split(",") if name.strip()]
        wrong = [name for name in names if name not in known]
        if wrong:
            raise Unusable(f"--only: there is no row {wrong[0]!r}; there are {', '.join(known)}")
    store = {} if options.store is None else {"replay": {"size": options.store}}
    return [Entry(name, overrides={} if name in RIVALS else store) for name in names]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a number from 1 on")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("a number from 0 on")
    return number


if __name__ == "__main__":
    sys.exit(main())
