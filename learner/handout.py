"""A version handed out: a folder that plain transformers or torch loads, with a card that says what it is.

::

    FOLDER/
      README.md           the card: a snippet that answers, training, exam, numbers, lineage, checksums
      model.safetensors   the encoder's weights; of a text stream under the names that transformers gives them
      head.safetensors    the instant head, its random projection and its calibration
      classes.json        the class of each of the head's rows
      config.json         of a text stream: the transformer; with tokenizer.json and tokenizer_config.json
      telemetry.json      of telemetry: the network's shape; with telemetry.py, its code, which needs torch alone

Nothing in it is a pickle, and nothing of it needs trimtab. The folder appears whole or not at all, and is never written
over. What is handed out is out of reach of whatever is forgotten later.
"""

from __future__ import annotations

import html
import inspect
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import file_digest
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from learner import telemetry
from learner.account import checks
from learner.encoders import CONFIG, TOKENIZER, WEIGHTS
from learner.exam import Verdict
from learner.heads import LinearHead
from learner.registry import BrokenVersion, Fault, HeadRef, Registry, VersionManifest
from learner.spec import EncoderSpec, TelemetryConfig, TextConfig
from replay.history import Training
from stream.errors import Misconfigured

CARD, MODEL, HEAD, CLASSES = "README.md", "model.safetensors", "head.safetensors", "classes.json"
NETWORK, SHAPE = "telemetry.py", "telemetry.json"
ANCESTORS = 20
"""Ancestors that a card names."""


@dataclass(frozen=True, slots=True)
class Served:
    """What labels said of the answers that a version served, up to a time.

    Args:
        classes: by the class that was answered, how many of its answers were right, and of how many.
    """

    until: datetime
    classes: Mapping[str, tuple[int, int]]


def hand_out(
    registry: Registry,
    stream: str,
    name: str,
    folder: Path,
    *,
    training: Training | None = None,
    served: Served | None = None,
) -> list[str]:
    """Write a version, or a revision as it was served, as a folder; returns the names of its files, sorted.

    Args:
        name: such as `v12`, with the head that it was made with, or `v12.34`.
        folder: to write; it may be there if it is empty.
        training: what the learner's database knows of the examples; without it the card has the manifest's numbers.
        served: what labels said of its answers, where the database is here.

    Raises:
        Misconfigured: the folder is not empty, or the version was made before the first label.
        BrokenVersion: something of it is missing, altered or was pruned; the message says what to do.
        RetryLater: the registry cannot be reached.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise Misconfigured(f"{folder} is there and not empty: name a folder that is not, for nothing is overwritten")
    what = f"revision {name} of stream {stream!r}"
    ref = registry.revision(stream, name)
    manifest = registry.version(stream, ref.version)
    if ref.head is None:
        others = [one for one in registry.revisions(stream) if one.startswith(f"{ref.version}.")]
        instead = (
            f"export a revision, such as {others[-1]}" if others else "it can be exported once labels were learned"
        )
        raise Misconfigured(f"{what} was made before the first label and has no head: {instead}")
    try:
        spec, files = registry.encoder(ref.encoder, what)
        tensors = registry.head(ref.head, what)
    except BrokenVersion as error:
        pruned = registry.pruned(stream, ref.version)
        if error.fault is not Fault.MISSING or pruned is None:
            raise
        when = f"its weights were removed on {pruned:%Y-%m-%d %H:%M} UTC"
        raise BrokenVersion(what, Fault.PRUNED, when, "choose one that is stored: `trimtab versions list`") from error
    try:
        head = LinearHead.from_tensors(tensors)
    except (ValueError, KeyError, IndexError) as error:
        raise BrokenVersion(what, Fault.MALFORMED, f"its head cannot be rebuilt: {error}", "choose another") from error
    building = folder.with_name(f".building-{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        pooled = _write_text(spec, files, building) if spec.kind == "text" else _write_telemetry(spec, files, building)
        _write_head(head, building)
        snippet = _snippet(spec, pooled)
        card = "\n".join(_card(registry, manifest, ref, head, training, served, snippet, building))
        (building / CARD).write_text(card + "\n", encoding="utf-8")
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return sorted(path.name for path in folder.iterdir())


def snippet_of(card: str) -> str:
    """The Python that a card tells its reader to run."""
    return card.partition("```python\n")[2].partition("\n```\n")[0] + "\n"


def _write_text(spec: EncoderSpec, files: Mapping[str, Path], folder: Path) -> bool:
    """A folder for transformers; whether its model has a pooling layer to leave out."""
    from transformers import AutoConfig, AutoModel

    weights = safetensors.torch.load_file(files[WEIGHTS])
    renamed = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(renamed, folder / MODEL, metadata={"format": "pt"})
    config = json.loads(files[CONFIG].read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    # transformers would round the weights to whatever the model was first published in.
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(files[TOKENIZER], folder / TOKENIZER)
    vocabulary = {one["id"]: one["content"] for one in json.loads(files[TOKENIZER].read_bytes())["added_tokens"]}
    shape = TextConfig.model_validate(spec.config)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_tokens,
        "pad_token": vocabulary.get(0, "[PAD]"),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**config))
    return "add_pooling_layer" in inspect.signature(type(model).__init__).parameters


def _write_telemetry(spec: EncoderSpec, files: Mapping[str, Path], folder: Path) -> bool:
    """A folder for torch: the weights as they are stored, and the network's own code."""
    shutil.copyfile(files[WEIGHTS], folder / MODEL)
    shape = TelemetryConfig.model_validate(spec.config)
    described = {**shape.model_dump(mode="json"), "dimension": shape.dimension}
    (folder / SHAPE).write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / NETWORK).write_text(inspect.getsource(telemetry), encoding="utf-8")
    return False


def _write_head(head: LinearHead, folder: Path) -> None:
    tensors = {
        "weight": head.weight,
        "bias": head.bias,
        "log_prior": head.log_prior,
        "background": head.background,
        "temperature": np.array([head.temperature], np.float32),
        "usual": np.array([head.usual], np.float32),
        "bound": np.array([head.lift.bound], np.float32),
    }
    if (projection := head.lift.projection()) is not None:
        tensors["projection"] = projection
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(whole, folder / HEAD)
    (folder / CLASSES).write_text(json.dumps(head.classes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


_TEXT = '''
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedTokenizerFast

FOLDER = Path(".")  # where this card lies

tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER)
encoder = AutoModel.from_pretrained(FOLDER{pooling}).eval()


def embed(texts):
    """Texts -> embeddings (n, {dimension}): the mean over a text's tokens, brought to length 1."""
    ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    mask = ids != 0
    states = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    weight = mask.unsqueeze(-1).to(states.dtype)
    mean = (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    return torch.nn.functional.normalize(mean.float(), dim=1)
'''

_TELEMETRY = '''
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

FOLDER = Path(".")  # where this card lies
sys.path.insert(0, str(FOLDER))

from telemetry import TelemetryModule

shape = SimpleNamespace(**json.loads((FOLDER / "telemetry.json").read_text(encoding="utf-8")))
encoder = TelemetryModule(shape).eval()
encoder.load_state_dict(load_file(FOLDER / "model.safetensors"))


def embed(windows):
    """Windows (n, channels, steps) in the order of shape.channels, NaN where a value is missing -> (n, {dimension})."""
    return encoder(torch.as_tensor(windows, dtype=torch.float32))
'''

_ANSWER = '''
head = load_file(FOLDER / "head.safetensors")
classes = json.loads((FOLDER / "classes.json").read_text(encoding="utf-8"))


@torch.inference_mode()
def predict(events):
    """For each event its class, the probability of every class, and how new it is, in [0, 1]: 0.5 is rare."""
    bound = head["bound"].item()
    features = embed(events).clamp(-bound, bound)
    if "projection" in head:
        features = (features @ head["projection"]).clamp(0, bound)
    likelihood = features @ head["weight"].T + head["bias"]
    scores = (likelihood + head["log_prior"]) / head["temperature"]
    best = scores.argmax(dim=1)
    background = features @ head["background"][:-1] + head["background"][-1]
    lead = background - likelihood.gather(1, best[:, None])[:, 0] - head["usual"]
    novelty = torch.sigmoid(lead / head["temperature"])
    return [
        {"class": classes[row], "probabilities": dict(zip(classes, shares)), "novelty": new}
        for row, shares, new in zip(best.tolist(), scores.softmax(dim=1).tolist(), novelty.tolist())
    ]


print(predict(EXAMPLE))
'''


def _snippet(spec: EncoderSpec, pooled: bool) -> str:
    if spec.kind == "text":
        parts = _TEXT.replace("{pooling}", ", add_pooling_layer=False" if pooled else "")
        example = '["a text of yours"]'
    else:
        shape = TelemetryConfig.model_validate(spec.config)
        parts, example = _TELEMETRY, f"torch.zeros(1, {len(shape.channels)}, {shape.window})"
    whole = parts.replace("{dimension}", str(spec.dimension)) + _ANSWER.replace("EXAMPLE", example)
    return whole.strip()


def _card(
    registry: Registry,
    manifest: VersionManifest,
    ref: HeadRef,
    head: LinearHead,
    training: Training | None,
    served: Served | None,
    snippet: str,
    folder: Path,
) -> Iterator[str]:
    """The lines of the card."""
    stream, text = manifest.stream, manifest.encoder.kind == "text"
    kind = "texts" if text else "windows of telemetry"
    library = "transformers" if text else "pytorch"
    yield from ("---", "# license: yours to fill in, see the section Licence", f"library_name: {library}")
    yield f"model_name: {json.dumps(f'{stream} {ref.name}')}"
    yield from ("tags:", "- trimtab", "- continual-learning", f"- {'text' if text else 'time-series'}-classification")
    yield from ("---", "", f"# {_plain(stream)} {ref.name}", "")
    yield (
        f"A classifier of {kind} into {len(head.classes)} classes, learned from the labels of the stream "
        f"{_plain(stream)} by [trimtab](https://pypi.org/project/trimtab/)."
    )
    yield f"Made on {manifest.created_at:%Y-%m-%d} UTC; {_standing(registry, manifest)}."
    yield ""
    yield from ("## Use", "", "In this folder, with " + ("transformers, torch" if text else "torch"))
    yield "and safetensors installed; it needs nothing of trimtab, and gives the answer that a worker of it gave in"
    yield "float32, but for the last digits."
    yield from ("", "```python", *snippet.splitlines(), "```", "")
    yield from _trained(manifest, ref, training)
    yield from _examined(manifest.verdict)
    if served is not None:
        yield from _answered(manifest, served)
    yield from _lineage(registry, manifest)
    yield from ("## Limits", "")
    yield "- It learns no more: what was labelled since is in later revisions of the stream."
    yield "- It knows the classes below, and answers one of them whatever it is given. Look at `novelty`."
    yield "- Probabilities and novelty were calibrated on this stream's labels, and hold for what is like them."
    yield "- An event that is forgotten in trimtab after this export is not taken out of this folder."
    yield ""
    yield from ("## Classes", "", ", ".join(_plain(name) for name in head.classes), "")
    yield from ("## Licence", "")
    yield "To be filled in by whoever hands this on: the licence of these weights, and of the data behind them. The"
    yield "model that training began from keeps its own."
    if not text:
        yield f"`{NETWORK}` is part of trimtab, and under Apache-2.0."
    yield from ("", "## Files", "", "`sha256sum -c` takes these lines:", "", "```")
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            yield f"{file_digest(file, 'sha256').hexdigest()}  {path.name}"
    yield from ("```", "", f"In the registry: encoder `{ref.encoder}`, head `{ref.head}`.")


def _trained(manifest: VersionManifest, ref: HeadRef, training: Training | None) -> Iterator[str]:
    lineage = manifest.lineage
    summary: Mapping[str, Any] = lineage.settings.get("summary", {})
    yield from ("## Training", "")
    if lineage.snapshot is None:
        yield f"- The encoder is the one that the stream began with (strategy `{lineage.strategy}`), not fine-tuned."
    else:
        yield f"- Fine-tuned with strategy `{lineage.strategy}`, seed {lineage.seed}, from {manifest.parent}."
        if cause := lineage.settings.get("cause"):
            yield f"- Why it was made: {_plain(str(cause))}."
        if summary:
            yield (
                f"- Examples: {summary.get('new', 0):,} new, {summary.get('replayed', 0):,} from the replay store, "
                f"{summary.get('held_out', 0):,} held out; {summary.get('epochs', 0)} epochs, "
                f"{summary.get('updates', 0):,} updates."
            )
        yield f"- Snapshot of the examples: `{lineage.snapshot}`."
    if training is not None and training.first is not None and training.last is not None:
        yield (
            f"- The events it was trained on were observed from {training.first:%Y-%m-%d %H:%M:%S} to "
            f"{training.last:%Y-%m-%d %H:%M:%S} UTC ({training.here:,} of {training.size:,} are still in the store)."
        )
    elif lineage.snapshot is not None:
        yield "- Range of the data: not known where this was exported, because the learner's database is not there."
    if lineage.label_offsets:
        offsets = ", ".join(f"{place} before {offset}" for place, offset in sorted(lineage.label_offsets.items()))
        yield f"- Labels read: {offsets}."
    own = "the head it was made with" if ref.revision == 0 else "the head as it was served"
    yield f"- Head: {ref.name}, {own}, stored on {ref.stored_at:%Y-%m-%d %H:%M:%S} UTC."
    if lineage.packages:
        yield f"- Packages: {', '.join(f'{name} {version}' for name, version in sorted(lineage.packages.items()))}."
    yield ""
    if training is not None and training.classes:
        rows = [[_plain(name), f"{count:,}"] for name, count in sorted(training.classes.items())]
        yield from (*_table(["class", "examples trained on"], rows), "")


def _examined(verdict: Verdict | None) -> Iterator[str]:
    yield from ("## Exam", "")
    if verdict is None:
        yield from ("There was none: the first version of a stream has nothing to be held against.", "")
        return
    outcome = "Passed" if verdict.promote else "Refused"
    yield (
        f"{outcome}, on {verdict.n:,} labelled events that neither version was trained on. The champion had "
        f"{verdict.champion_accuracy:.1%} right, this version {verdict.candidate_accuracy:.1%}; as the mean of the "
        f"classes' recalls {verdict.champion_balanced:.1%} and {verdict.candidate_balanced:.1%}."
    )
    yield ""
    yield from (f"- {_plain(reason)}" for reason in verdict.reasons)
    if verdict.unjudged:
        yield f"- Too few examples to judge: {', '.join(_plain(name) for name in verdict.unjudged)}"
    rules = [
        ["yes" if one.passed else "no", *map(_plain, (one.rule, one.found, one.allowed))] for one in checks(verdict)
    ]
    yield from ("", *_table(["passed", "asked", "found", "allowed"], rows=rules), "")
    classes = [
        [
            _plain(one.label),
            f"{one.n:,}",
            f"{one.champion_recall:.3f}",
            f"{one.candidate_recall:.3f}",
            f"{one.p_value:.2g}",
            one.outcome.replace("_", " "),
        ]
        for one in verdict.classes
    ]
    columns = ["class", "examples", "recall before", "recall", "p of no worse", "found"]
    yield from (*_table(columns, classes), "")


def _answered(manifest: VersionManifest, served: Served) -> Iterator[str]:
    right, total = (sum(pair[place] for pair in served.classes.values()) for place in (0, 1))
    yield from ("## In service", "")
    if not total:
        yield from (f"No label has come for an answer of {manifest.name} by {served.until:%Y-%m-%d %H:%M} UTC.", "")
        return
    yield (
        f"Of the answers of {manifest.name}, all its revisions together, {total:,} had a label by "
        f"{served.until:%Y-%m-%d %H:%M} UTC: {right:,} were right ({right / total:.1%})."
    )
    rows = [
        [_plain(name), f"{count:,}", f"{good / count:.3f}"] for name, (good, count) in sorted(served.classes.items())
    ]
    yield from ("", *_table(["class answered", "labelled", "precision"], rows), "")


def _lineage(registry: Registry, manifest: VersionManifest) -> Iterator[str]:
    rows: list[list[str]] = []
    one: VersionManifest | None = manifest
    while one is not None and len(rows) < ANCESTORS:
        exam, lineage = "none", one.lineage
        if one.verdict is not None:
            exam = f"{'passed' if one.verdict.promote else 'refused'}, {one.verdict.candidate_accuracy:.3f}"
        snapshot = f"`{lineage.snapshot[:16]}`" if lineage.snapshot else "none"
        rows.append([one.name, f"{one.created_at:%Y-%m-%d}", lineage.strategy, str(len(one.classes)), exam, snapshot])
        parent = one.parent
        try:
            one = registry.version(manifest.stream, parent) if parent else None
        except BrokenVersion as error:
            rows.append([str(parent), "", "", "", _plain(error.detail), ""])
            one = None
    yield from ("## Lineage", "", "Each was trained from the one below it.", "")
    yield from (*_table(["version", "made", "strategy", "classes", "exam", "snapshot"], rows), "")


def _standing(registry: Registry, manifest: VersionManifest) -> str:
    """Whether and when it was in service, by the registry."""
    lines = registry.champions(manifest.stream)
    if not any(line.version == manifest.name for line in lines):
        return "it was never in service"
    if lines[-1].version == manifest.name:
        return f"in service since {lines[-1].since:%Y-%m-%d %H:%M} UTC"
    before, after = next(pair for pair in reversed(list(pairwise(lines))) if pair[0].version == manifest.name)
    why = f", because {_plain(after.why)}" if after.why else ""
    return f"in service from {before.since:%Y-%m-%d %H:%M} to {after.since:%Y-%m-%d %H:%M} UTC{why}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def _plain(text: str) -> str:
    """Text as it is, whatever Markdown or HTML it looks like; one line."""
    marked = "".join(f"\\{sign}" if sign in "\\`*_[]|#~" else sign for sign in " ".join(text.split()))
    return html.escape(marked, quote=False)
