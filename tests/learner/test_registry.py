"""Whatever happens to the files, a version is served whole or refused by name, and nothing needed is removed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from learner.exam import examine
from learner.registry import (
    BrokenVersion,
    Fault,
    Lineage,
    Pointer,
    Registry,
    VersionManifest,
    spec_digest,
)
from learner.spec import EncoderSpec
from stream.errors import Misconfigured, RetryLater

HOUR = timedelta(hours=1)


class Clock:
    """A clock that a test sets; it starts at the machine's time, by which files are dated."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["file", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    """The same promises on a disk and on an object store."""
    if request.param == "file":
        yield Registry(f"file://{tmp_path}/registry", now=clock)
        return
    yield Registry("memory://registry", tmp_path / "cache", now=clock)
    memory = fsspec.filesystem("memory")
    if memory.exists("/registry"):
        memory.rm("/registry", recursive=True)


def blob_path(registry: Registry, digest: str) -> str:
    return registry._blob(digest)


def overwrite(registry: Registry, path: str, data: bytes) -> None:
    """What a broken disk or a careless hand does."""
    registry._fs.pipe_file(path, data)


def head(seed: int, classes: int = 3, dimension: int = 4) -> dict[str, np.ndarray]:
    """Tensors like a head's, different for each seed."""
    return {"weight": np.random.default_rng(seed).normal(size=(classes, dimension)).astype(np.float32)}


def encoder(seed: int) -> tuple[EncoderSpec, dict[str, bytes]]:
    """An encoder's spec and files; the tokenizer is the same for each seed."""
    files = {
        "weights.safetensors": save({"w": np.full((8, 8), seed, dtype=np.float32)}),
        "tokenizer.json": b'{"version": "1.0"}',
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return EncoderSpec(kind="text", dimension=4, bound=1.0, config={"max_tokens": 16}, files=digests), files


def commit(
    registry: Registry, seed: int, stream: str = "s", parent: str | None = None, at: datetime | None = None
) -> str:
    """A whole version with an encoder and a head of its own."""
    spec, files = encoder(seed)
    registry.put_encoder(spec, files)
    manifest = VersionManifest(
        stream=stream,
        parent=parent,
        created_at=at or datetime.now(UTC),
        encoder=spec,
        head=registry.put_head(head(seed)),
        classes=("a", "b", "c"),
        lineage=Lineage(snapshot="ab" * 32, label_offsets={"labels:0": 17}, strategy="replay", seed=seed),
        verdict=examine(["a"], ["a"], ["a"]),
    )
    return registry.commit(manifest)


def test_a_version_comes_back_as_it_was_written(registry: Registry) -> None:
    """A manifest is what explains a model a year later; every field has to survive."""
    name = commit(registry, 1)
    found = registry.verify("s", name)
    assert (name, found.name, found.lineage.label_offsets) == ("v1", "v1", {"labels:0": 17})
    assert found.verdict is not None
    assert found.verdict.promote
    spec, files = registry.encoder(found.encoder_digest)
    assert spec == found.encoder == encoder(1)[0]
    assert {file: path.read_bytes() for file, path in files.items()} == encoder(1)[1]
    assert found.head is not None
    np.testing.assert_array_equal(registry.head(found.head)["weight"], head(1)["weight"])
    assert registry.versions("s") == [found]
    assert registry.streams() == ["s"]


def test_shared_content_is_stored_once(registry: Registry) -> None:
    """Streams share one frozen encoder; ten streams must not take ten times its size."""
    commit(registry, 1, "s")
    before = len(registry._fs.find(f"{registry._root}/blobs"))
    commit(registry, 1, "t")
    assert len(registry._fs.find(f"{registry._root}/blobs")) == before


@pytest.mark.parametrize("damage", ["missing", "torn", "altered", "empty"])
@pytest.mark.parametrize("part", ["weights.safetensors", "tokenizer.json", "spec", "head"])
def test_a_damaged_blob_is_refused_by_name(registry: Registry, damage: str, part: str) -> None:
    """Half a model answers wrongly in silence; it is refused, and the message says which it is and what to do."""
    name = commit(registry, 1)
    manifest = registry.version("s", name)
    digests = {**manifest.encoder.files, "spec": manifest.encoder_digest, "head": manifest.head or ""}
    path = blob_path(registry, digests[part])
    whole = registry._fs.cat_file(path)
    if damage == "missing":
        registry._fs.rm_file(path)
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        overwrite(registry, path, {"torn": whole[: len(whole) // 2], "altered": flipped, "empty": b""}[damage])
    with pytest.raises(BrokenVersion) as caught:
        registry.verify("s", name)
    assert caught.value.fault is (Fault.MISSING if damage == "missing" else Fault.ALTERED)
    assert "version v1 of stream 's'" in str(caught.value)
    assert digests[part][:12] in str(caught.value)
    assert "trimtab versions rollback" in str(caught.value)
    commit(registry, 1)
    assert registry.verify("s", name) == manifest, "storing the same content again heals it"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"content": {}, "sha256": ""}', b"\xff\xfe"])
def test_a_damaged_manifest_is_refused_by_name(registry: Registry, damage: bytes) -> None:
    """A manifest names the weights; a wrong one is as bad as wrong weights."""
    commit(registry, 1)
    overwrite(registry, registry._manifest("s", "v1"), damage)
    with pytest.raises(BrokenVersion, match="version v1 of stream 's' is altered"):
        registry.version("s", "v1")


def test_an_edited_or_moved_manifest_is_refused(registry: Registry) -> None:
    """Valid JSON is not enough: someone may have edited it, or copied one version over another."""
    commit(registry, 1)
    commit(registry, 2)
    path = registry._manifest("s", "v1")
    text = registry._fs.cat_file(path).decode()
    overwrite(registry, path, text.replace('"seed": 1', '"seed": 2').encode())
    with pytest.raises(BrokenVersion, match="checksum does not match"):
        registry.version("s", "v1")
    overwrite(registry, path, registry._fs.cat_file(registry._manifest("s", "v2")))
    with pytest.raises(BrokenVersion, match="its file says v2"):
        registry.version("s", "v1")


def test_unknown_versions_are_named(registry: Registry) -> None:
    """What is typed at night is often one off; the answer says what there is."""
    with pytest.raises(BrokenVersion, match="none was ever committed"):
        registry.version("s", "v1")
    commit(registry, 1)
    with pytest.raises(BrokenVersion, match="known are v1 to v1"):
        registry.version("s", "v2")
    for name in ("1", "v0", "v01", "latest", "../../x", "v1.json"):
        with pytest.raises(BrokenVersion, match="versions are named v1"):
            registry.version("s", name)


def test_numbers_have_no_gaps_under_threads(registry: Registry) -> None:
    """Two fine-tunes that end together must not share a number, nor leave a hole that looks like a loss."""
    with ThreadPoolExecutor(8) as threads:
        names = list(threads.map(lambda seed: commit(registry, seed % 3), range(24)))
    assert sorted(names, key=lambda name: int(name[1:])) == [f"v{number}" for number in range(1, 25)]
    assert [manifest.number for manifest in registry.versions("s")] == list(range(1, 25))


def test_a_number_taken_by_another_process_is_passed_over(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second learner that still thinks it leads must not overwrite what the first one committed."""
    commit(registry, 1)
    first = registry.version("s", "v1")
    monkeypatch.setattr(registry, "_numbers", lambda stream: [])
    assert commit(registry, 2) == "v2"
    monkeypatch.undo()
    assert registry.version("s", "v1") == first


def test_a_version_whose_blobs_are_not_there_is_not_committed(registry: Registry) -> None:
    """A version that was announced and cannot be loaded would leave every new worker without a model."""
    spec, files = encoder(1)
    manifest = VersionManifest(stream="s", created_at=datetime.now(UTC), encoder=spec)
    with pytest.raises(BrokenVersion, match="missing"):
        registry.commit(manifest)
    registry.put_encoder(spec, files)
    with pytest.raises(ValueError, match="v7 is not the next version"):
        registry.commit(manifest.model_copy(update={"number": 7}))
    assert registry.commit(manifest) == "v1"


def test_only_safetensors_and_text_are_stored(registry: Registry) -> None:
    """A pickle runs code when it is read; it never gets in, by whatever name."""
    for name in ("weights.pkl", "model.bin", "weights.pt", "../weights.safetensors", "sub/weights.json", ".json"):
        data = b"x"
        spec = EncoderSpec(
            kind="text", dimension=4, bound=1.0, config={}, files={name: hashlib.sha256(data).hexdigest()}
        )
        with pytest.raises(ValueError, match="an encoder's files are"):
            registry.put_encoder(spec, {name: data})
        digest = registry.put(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode())
        with pytest.raises(BrokenVersion, match="an encoder's files are"):
            registry.encoder(digest)
    spec, files = encoder(1)
    with pytest.raises(ValueError, match="is not the file that the spec names"):
        registry.put_encoder(spec, {**files, "tokenizer.json": b"{}"})
    with pytest.raises(ValueError, match="the spec names"):
        registry.put_encoder(spec, {"tokenizer.json": files["tokenizer.json"]})


@pytest.mark.parametrize(
    "data",
    [
        b"not tensors at all",
        (2**62).to_bytes(8, "little") + b"{}",
        (50).to_bytes(8, "little") + b"{}",
        len(bad := b'{"w":{"dtype":"F32","shape":[99999,99999],"data_offsets":[0,4]}}').to_bytes(8, "little")
        + bad
        + b"0000",
        len(bad := b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}').to_bytes(8, "little") + bad + b"0" * 12,
    ],
)
def test_a_blob_that_is_no_safetensors_is_refused(registry: Registry, data: bytes) -> None:
    """A digest proves that content is what was stored, not that it is a model."""
    digest = registry.put(data)
    with pytest.raises(BrokenVersion, match="no safetensors"):
        registry.head(digest)
    files = {"weights.safetensors": data}
    spec = EncoderSpec(kind="text", dimension=4, bound=1.0, config={}, files={"weights.safetensors": digest})
    with pytest.raises(BrokenVersion, match="no safetensors"):
        registry.encoder(registry.put_encoder(spec, files))


def test_weights_that_are_not_finite_are_refused_on_both_sides(registry: Registry) -> None:
    """NaN spreads to every answer; it is stopped where it is written, and again where it is read."""
    bad = {"weight": np.array([[1.0, np.nan]], dtype=np.float32)}
    with pytest.raises(ValueError, match="not finite"):
        registry.put_head(bad)
    with pytest.raises(BrokenVersion, match="not finite"):
        registry.head(registry.put(save(bad)))


def test_a_write_cut_short_leaves_nothing_under_the_name(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or a kill in mid-write must not leave a file that looks like a blob."""
    if not registry._local:
        pytest.skip("an object store's put is whole or not at all")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RetryLater, match="No space left"):
        registry.put(b"some weights")
    assert registry._fs.find(registry._root) == []


def test_stream_names_stay_inside_their_folder(registry: Registry) -> None:
    """A stream's name comes from a YAML that somebody else wrote."""
    for name in ("..", ".", "a/b", "a b", "été", "%2e", "s*"):
        commit(registry, 1, name)
        registry.set_champion(name, "v1")
        assert registry.champion(name) == "v1"
    assert registry.streams() == sorted(["..", ".", "a/b", "a b", "été", "%2e", "s*"])


def test_champions_are_noted_with_their_history(registry: Registry) -> None:
    """After a lost topic the champion file is what an operator has; a rollback is one more line."""
    assert registry.champion("s") is None
    for seed in (1, 2):
        commit(registry, seed)
    for name in ("v1", "v2", "v1"):
        registry.set_champion("s", name)
    assert [line.version for line in registry.champions("s")] == ["v1", "v2", "v1"]
    with pytest.raises(BrokenVersion, match="v3"):
        registry.set_champion("s", "v3")
    overwrite(registry, registry._champion("s"), b"{}")
    with pytest.raises(BrokenVersion, match="the champion file of stream 's'"):
        registry.champion("s")


def test_revisions_name_their_weights(registry: Registry) -> None:
    """A pinned worker and an exact rollback find a revision by its name alone."""
    commit(registry, 1)
    digest = spec_digest(encoder(1)[0])
    ref = registry.put_revision("s", "v1", 1, digest, head(11))
    assert registry.revision("s", "v1.1") == ref
    assert registry.put_revision("s", "v1", 2, digest, None).head is None
    replaced = registry.put_revision("s", "v1", 1, digest, head(12))
    assert registry.revision("s", "v1.1") == replaced != ref, "its learner died before it announced it"
    own = registry.revision("s", "v1.0")
    assert own.head == registry.version("s", "v1").head
    assert registry.revision("s", "v1") == own
    assert registry.revisions("s") == ["v1.1", "v1.2"]
    for name in ("v1.3", "v2.0", "x"):
        with pytest.raises(BrokenVersion):
            registry.revision("s", name)


def test_pruning_keeps_what_is_needed(registry: Registry, clock: Clock) -> None:
    """Champion, the last champions, ancestors, what predictions name, what other streams use: none of it may go."""
    past = datetime.now(UTC) - 10 * HOUR
    for seed in range(1, 9):
        commit(registry, seed, parent=f"v{seed - 1}" if seed > 1 else None, at=past)
    commit(registry, 4, "other", at=past)
    for name in ("v2", "v3", "v6", "v8"):
        registry.set_champion("s", name)
    clock.ahead = 2 * HOUR
    dry = registry.prune("s", {"v1.55"}, predecessors=2, dry_run=True)
    assert dry.versions == ("v2", "v4", "v5")
    assert dry.kept == {
        "v1": "v1.55 is still named",
        "v3": "a champion before this one",
        "v6": "a champion before this one",
        "v7": "an ancestor of the champion",
        "v8": "the champion",
    }
    assert dry.bytes == sum(registry._fs.size(blob_path(registry, blob.digest)) for blob in dry.blobs) > 0
    for seed in range(1, 9):
        registry.verify("s", f"v{seed}")
    done = registry.prune("s", {"v1.55"}, predecessors=2)
    assert done == dry.model_copy(update={"dry_run": False})
    for name in ("v1", "v3", "v6", "v7", "v8"):
        registry.verify("s", name)
    registry.verify("other", "v1")
    for name in ("v2", "v4", "v5"):
        with pytest.raises(BrokenVersion, match="pruned"):
            registry.verify("s", name)
        with pytest.raises(BrokenVersion, match="pruned"):
            registry.set_champion("s", name)
    assert len(registry.versions("s")) == 8, "the lineage stays"
    again = registry.prune("s", {"v1.55"}, predecessors=2)
    assert (again.versions, again.blobs) == ((), ())
    assert commit(registry, 9) == "v9"


def test_pruning_without_a_champion_removes_no_version(registry: Registry, clock: Clock) -> None:
    """Where nobody noted what is in service, everything might be."""
    commit(registry, 1, at=datetime.now(UTC) - 10 * HOUR)
    clock.ahead = 10 * HOUR
    assert registry.prune("s").kept == {"v1": "no champion is noted for the stream"}
    registry.verify("s", "v1")


def test_old_revisions_lose_their_heads_at_once(registry: Registry) -> None:
    """Two heads a second are gigabytes a day; they go early, but never one that something names."""
    commit(registry, 1)
    digest = spec_digest(encoder(1)[0])
    refs = [registry.put_revision("s", "v1", number, digest, head(100 + number)) for number in range(1, 11)]
    registry.put_revision("t", "v1", 1, digest, head(101))
    report = registry.prune("s", {"v1.4"}, revisions=3)
    assert report.revisions == ("v1.1", "v1.2", "v1.3", "v1.5", "v1.6", "v1.7")
    assert {blob.digest for blob in report.blobs} == {refs[i].head for i in (1, 2, 4, 5, 6)}
    assert registry.revisions("s") == ["v1.4", "v1.8", "v1.9", "v1.10"]
    for name in registry.revisions("s"):
        registry.head(registry.revision("s", name).head or "")
    registry.head(registry.revision("t", "v1.1").head or "")
    registry.verify("s", "v1")


def test_what_nothing_names_yet_has_its_grace(registry: Registry, clock: Clock) -> None:
    """A prune may run while a fine-tune stores a candidate that is not committed yet."""
    commit(registry, 1)
    registry.set_champion("s", "v1")
    orphan, held = registry.put(b"a candidate's weights"), registry.put(b"held by its digest")
    registry.prune("s")
    assert registry.exists(orphan)
    clock.ahead = 2 * HOUR
    report = registry.prune("s", {held})
    assert [blob.digest for blob in report.blobs] == [orphan]
    assert not registry.exists(orphan)
    assert registry.read(held) == b"held by its digest"


def test_leftovers_of_killed_writers_go_too(tmp_path: Path, clock: Clock) -> None:
    """A worker that dies in mid-write leaves a temporary file that nothing else would ever remove."""
    registry = Registry(str(tmp_path / "registry"), now=clock)
    commit(registry, 1)
    left = Path(blob_path(registry, "ab" * 32)).with_name(".part-123")
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half")
    registry.prune("s")
    assert left.exists()
    clock.ahead = 2 * HOUR
    registry.prune("s")
    assert not left.exists()


def test_remote_blobs_are_cached_verified_and_bounded(tmp_path: Path) -> None:
    """A worker restarts without fetching 90 MB again, never trusts its own disk, and never fills it."""
    registry = Registry("memory://cached", tmp_path / "cache", cache_bytes=2500)
    digests = [registry.put(bytes([number]) * 1000) for number in range(4)]
    path = registry.open(digests[0])
    assert path.is_relative_to(tmp_path)
    registry._fs.rm_file(blob_path(registry, digests[0]))
    assert registry.open(digests[0]) == path
    path.write_bytes(b"flipped")
    with pytest.raises(BrokenVersion, match="missing"):
        registry.open(digests[0])
    registry.put(bytes([0]) * 1000)
    assert registry.open(digests[0]).read_bytes() == bytes([0]) * 1000
    for age, digest in enumerate(digests):
        os.utime(registry.open(digest), (age, age))
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file()) <= 2500
    assert registry.open(digests[3]).read_bytes() == bytes([3]) * 1000
    with pytest.raises(Misconfigured, match="cache directory"):
        Registry("memory://cached").open(digests[1])
    registry._fs.rm("/cached", recursive=True)


def test_a_filesystem_that_is_away_is_not_a_broken_version(tmp_path: Path) -> None:
    """A network that is down for a minute calls for patience, not for a rollback."""
    registry = Registry("memory://away", tmp_path)
    digest = registry.put(b"x")

    class Away(type(registry._fs)):  # type: ignore[misc]
        cachable = False

        def cat_file(self, *paths: str, **kwargs: object) -> bytes:
            raise ConnectionError("no route to host")

        get_file = size = exists = ls = cat_file

    registry._fs = Away()
    calls: list[Callable[[], object]] = [
        lambda: registry.read(digest),
        lambda: registry.open(digest),
        lambda: registry.put(b"x"),
        lambda: registry.versions("s"),
        lambda: registry.version("s", "v1"),
    ]
    for call in calls:
        with pytest.raises(RetryLater, match="no route to host"):
            call()


def test_a_plain_filesystem_gets_renames(tmp_path: Path) -> None:
    """SFTP or HDFS show a file while it grows; there a file appears by a rename as well."""

    class Plain(LocalFileSystem):  # type: ignore[misc]
        protocol = "plain"
        cachable = False

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
            assert ".part-" in path
            super().pipe_file(path, value, mode=mode, **kwargs)

    fsspec.register_implementation("plain", Plain, clobber=True)
    registry = Registry(f"plain://{tmp_path}/registry", tmp_path / "cache")
    assert [commit(registry, seed) for seed in (1, 2)] == ["v1", "v2"]
    registry.verify("s", "v2")
    with pytest.raises(FileExistsError):
        registry._write(registry._manifest("s", "v1"), b"", exclusive=True)


def test_an_unknown_scheme_is_the_operators_to_mend() -> None:
    """A typing error in the YAML must not come as a traceback from deep inside fsspec."""
    with pytest.raises(Misconfigured, match="registry 'nosuch://x'"):
        Registry("nosuch://x")


def test_readers_never_see_a_manifest_or_champion_half_written(registry: Registry) -> None:
    """Workers and the command line read while the learner writes."""
    commit(registry, 1)
    registry.set_champion("s", "v1")
    ending = threading.Event()
    with ThreadPoolExecutor(1) as thread:

        def read() -> int:
            for count in itertools.count(1):
                registry.champions("s")
                registry.versions("s")
                if ending.is_set():
                    return count
            return 0

        reading = thread.submit(read)
        for seed in range(20):
            registry.set_champion("s", commit(registry, seed))
        ending.set()
        assert reading.result() > 0


# Pointers


def pointer(sequence: int, name: str = "v1.0", kind: str = "revision", epoch: int = 1, stream: str = "s") -> Pointer:
    """An announcement; the digests do not matter here."""
    version, _, revision = name.partition(".")
    return Pointer.model_validate(
        {
            "kind": kind,
            "stream": stream,
            "version": version,
            "revision": int(revision),
            "encoder": "ab" * 32,
            "head": "cd" * 32,
            "epoch": epoch,
            "sequence": sequence,
            "announced_at": "2026-01-02T03:04:05Z",
        }
    )


def read(messages: list[Pointer], taken: Pointer | None = None) -> Pointer | None:
    """What a reader of these messages of one key ends with."""
    for message in messages:
        if message.after(taken):
            taken = message
    return taken


HISTORY = [
    pointer(1, "v1.0", "champion"),
    pointer(2, "v1.1"),
    pointer(3, "v1.2"),
    pointer(4, "v2.0", "champion"),
    pointer(5, "v2.1"),
    pointer(6, "v1.3", "champion"),  # a rollback to v1, refitted with the labels since
    pointer(7, "v1.4"),
    pointer(8, "v1.5"),
    pointer(9, "v1.2", "champion"),  # an exact rollback to a revision
    pointer(10, "v3.0", "champion", epoch=2),  # another trainer took over
    pointer(1, "v3.1", epoch=3),  # and another, whose database was restored from a backup
]


def test_a_pointer_survives_the_wire() -> None:
    """4 KiB, checksummed, and under the key that says what it is for."""
    for kind, key in (("champion", b"s/champion"), ("revision", b"s/champion"), ("version", b"s/version/v12")):
        sent = pointer(7, "v12.3456", kind)
        assert sent.key == key
        got = Pointer.decode(key, sent.encode())
        assert got.model_copy(update={"checksum": ""}) == sent
        assert got.name == "v12.3456"
        assert Pointer.decode(key, got.encode()) == got
    longest = pointer(1, stream="\N{PILE OF POO}" * 100)
    assert len(longest.encode()) <= 4096


@given(st.data())
def test_an_altered_pointer_is_refused(data: st.DataObject) -> None:
    """One wrong bit could put another model into service."""
    sent = pointer(7, "v12.3456", "champion")
    value = bytearray(sent.encode())
    position = data.draw(st.integers(0, len(value) - 1))
    value[position] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(BrokenVersion):  # some changes, as of a blank for a tab, mean the same
        assert Pointer.decode(sent.key, bytes(value)).model_copy(update={"checksum": ""}) == sent


@pytest.mark.parametrize(
    "value", [b"", b"null", b"[1]", b"{}", b"x" * 5000, b"[" * 4000, b"\xff", b'{"kind":"champion"}']
)
def test_what_is_no_pointer_is_refused(value: bytes) -> None:
    """Anyone with the right to write to the topic can write anything."""
    with pytest.raises(BrokenVersion):
        Pointer.decode(b"s/champion", value)


def test_a_pointer_under_a_foreign_key_is_refused() -> None:
    """Compaction goes by key: under another one it would hide what belongs there."""
    with pytest.raises(BrokenVersion, match="belongs under 's/champion'"):
        Pointer.decode(b"t/champion", pointer(1).encode())


def test_a_newer_release_may_add_fields() -> None:
    """Learner and workers are not upgraded in the same second; the checksum covers what is unknown as well."""
    fields = {**pointer(1).model_dump(mode="json", exclude={"checksum"}), "added_later": 1}
    checksum = hashlib.sha256(
        json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()
    assert Pointer.decode(b"s/champion", json.dumps({**fields, "checksum": checksum}).encode()).name == "v1.0"
    with pytest.raises(BrokenVersion, match="checksum"):
        Pointer.decode(b"s/champion", json.dumps({**fields, "added_later": 2, "checksum": checksum}).encode())


def test_promotions_rollbacks_and_revisions_take_effect_in_turn() -> None:
    """The reader that sees everything follows the trainer step by step."""
    taken = None
    for message in HISTORY:
        taken = read([message], taken)
        assert taken is message


def test_compaction_anywhere_changes_no_reader() -> None:
    """After compaction any earlier messages may be gone, all but the last; whoever reads what is left ends alike."""
    for end in range(1, len(HISTORY) + 1):
        written = HISTORY[:end]
        for joined in range(end + 1):
            live = read(written[:joined])
            for first_left in range(joined, end):
                assert read(written[first_left:], live) is written[-1]
            assert read(written[-1:], live) is written[-1]


@given(st.lists(st.sampled_from(HISTORY), max_size=30))
def test_late_and_repeated_pointers_change_nothing(noise: list[Pointer]) -> None:
    """An outbox that resends, or a trainer that was thought dead, cannot bring back what was replaced."""
    assert read(noise, read(HISTORY)) is HISTORY[-1]
    assert read([*noise, *HISTORY]) == HISTORY[-1]


def test_a_dead_trainers_words_are_ignored() -> None:
    """A trainer that hung for a minute wakes up and announces, not knowing that another one took over."""
    taken = read([pointer(4, "v3.0", "champion", epoch=2)])
    assert read([pointer(900, "v9.0", "champion", epoch=1), pointer(901, "v9.1", epoch=1)], taken) is taken


def test_a_late_revision_of_the_replaced_champion_is_ignored() -> None:
    """Sent before the promotion, arriving after it: it must not undo the swap."""
    taken = read([pointer(4, "v2.0", "champion")])
    assert read([pointer(3, "v1.2")], taken) is taken
