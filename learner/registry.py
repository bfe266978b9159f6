"""Versions on a filesystem: atomic, checksummed, addressed by content, safetensors only.

::

    ROOT/
      blobs/ab/cdef...                          any content, named by its sha256
      streams/STREAM/versions/v12.json          a manifest with its own checksum; written once, kept for good
      streams/STREAM/revisions/v12.3456.json    which head and encoder a revision has; pruned with its head
      streams/STREAM/champion.json              the promotions, newest last: for people and for backups
      streams/STREAM/pruned/v3.json             that the weights of v3 were removed, and when

An encoder is one blob a file and one blob for its spec, so versions that share it store it once. Every read
is verified against the name or the checksum; what does not match is refused as `BrokenVersion`. What is in
service is said by the topic `model-versions`, in pointers (`Pointer`); nothing here decides it.

Any fsspec filesystem will do. Files appear whole: under a temporary name and then renamed, or in one put
where the store is an object store. Manifests are numbered without gaps by any number of threads of one
process; between processes as well where the filesystem can create a file exclusively (local disks, memory, S3).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, unquote

import numpy as np
from fsspec.core import url_to_fs
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from learner.exam import Verdict
from learner.spec import EncoderSpec
from stream.errors import Misconfigured, RetryLater, TrimtabError
from stream.events import StreamName, utc_now

logger = logging.getLogger(__name__)

MAX_POINTER_BYTES = 4096
MAX_HEAD_BYTES = 256 * 2**20
MAX_BLOB_BYTES = 8 * 2**30
MAX_RECORD_BYTES = 16 * 2**20
MAX_TENSORS = 10_000
STORED_SUFFIXES = frozenset({".safetensors", ".json", ".txt"})

_OBJECT_STORES = frozenset({"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci"})
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"v([1-9][0-9]*)")
_REVISION = re.compile(r"(v[1-9][0-9]*)\.(0|[1-9][0-9]*)")

Digest = str

R = TypeVar("R", bound=BaseModel)


class Fault(StrEnum):
    """What is wrong with a version; a bounded set, because it labels a metric."""

    MISSING = "missing"
    ALTERED = "altered"
    MALFORMED = "malformed"
    PRUNED = "pruned"
    MISMATCH = "mismatch"
    UNREACHABLE = "unreachable"


class BrokenVersion(TrimtabError):
    """A version, a revision or one of its blobs cannot be used; whatever is in service stays.

    Args:
        what: what was asked for, such as `version v12 of stream 'intents'`.
        fault: the bounded cause.
        detail: what was found.
        remedy: what to do about it.
    """

    def __init__(self, what: str, fault: Fault, detail: str, remedy: str) -> None:
        self.what = what
        self.fault = fault
        self.detail = detail
        self.remedy = remedy
        super().__init__(f"{what} is {fault}: {detail}; {remedy}")


class HeadRef(BaseModel):
    """Which weights a revision has: `v12.0` is the version's own head, later ones moved only the head.

    Args:
        encoder: digest of the encoder's spec, itself a blob.
        head: digest of the head's tensors, or None before the first label.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: StreamName
    version: str = Field(pattern=f"^{_VERSION.pattern}$")
    revision: int = Field(ge=0)
    encoder: Digest
    head: Digest | None
    stored_at: AwareDatetime

    @property
    def name(self) -> str:
        """Such as `v12.3456`."""
        return f"{self.version}.{self.revision}"


class Lineage(BaseModel):
    """Where a version comes from, so that it can be explained and made again.

    Args:
        snapshot: digest of the replay store's snapshot it was trained on, or None for a base version.
        label_offsets: by `topic/partition` of predictions and labels, the next offset that was not in it.
        packages: version of each package that took part.
        settings: the settings of the fine-tune as they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    snapshot: str | None = None
    label_offsets: dict[str, int] = {}
    strategy: str = "base"
    seed: int | None = None
    packages: dict[str, str] = {}
    settings: dict[str, Any] = {}


class VersionManifest(BaseModel):
    """One set of encoder and head weights, with its lineage and its verdict. Written once.

    Args:
        number: 0 until `Registry.commit` gives it the stream's next one.
        parent: the version it was trained from.
        head: digest of the head's tensors, or None before the first label.
        blobs: anything else that must stay as long as the version does, such as a fine-tune's state, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: StreamName
    number: int = Field(default=0, ge=0)
    parent: str | None = Field(default=None, pattern=f"^{_VERSION.pattern}$")
    created_at: AwareDatetime
    encoder: EncoderSpec
    head: Digest | None = None
    classes: tuple[str, ...] = ()
    lineage: Lineage = Lineage()
    verdict: Verdict | None = None
    blobs: dict[str, Digest] = {}

    @property
    def name(self) -> str:
        """Such as `v12`."""
        return f"v{self.number}"

    @property
    def encoder_digest(self) -> Digest:
        """The digest by which pointers name the encoder."""
        return spec_digest(self.encoder)

    def digests(self) -> set[Digest]:
        """Every blob that the version needs."""
        found = {self.encoder_digest, *self.encoder.files.values(), *self.blobs.values()}
        return found | ({self.head} if self.head else set())


class Champion(BaseModel):
    """One line of a stream's promotions: which version went into service, and when.

    Args:
        why: what spoke against the version before it, where that was rolled back by itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(pattern=f"^{_VERSION.pattern}$")
    since: AwareDatetime
    why: str = ""


class _Promotions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: StreamName
    promotions: tuple[Champion, ...] = ()


class _Pruned(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: StreamName
    version: str
    at: AwareDatetime


class PrunedBlob(BaseModel):
    """One blob that a prune removes."""

    model_config = ConfigDict(frozen=True)

    digest: Digest
    bytes: int


class PruneReport(BaseModel):
    """What a prune removed, or would remove.

    Args:
        kept: why each version of the stream that stays does.
        blobs: what is deleted; `bytes` is their sum.
    """

    model_config = ConfigDict(frozen=True)

    stream: str
    dry_run: bool
    kept: dict[str, str]
    versions: tuple[str, ...]
    revisions: tuple[str, ...]
    blobs: tuple[PrunedBlob, ...]

    @property
    def bytes(self) -> int:
        """Bytes that the blobs take."""
        return sum(blob.bytes for blob in self.blobs)


class Pointer(BaseModel):
    """The value of one message on `model-versions`: what is in service, or that a version is there.

    Two keys are used. `STREAM/champion` says what answers the stream: kind `champion` where the version is
    put into service (a promotion, a rollback, a trainer taking over), kind `revision` where only the head
    moved on. `STREAM/version/vN`, kind `version`, says that a version was committed, and changes no answer.

    The order of a stream's announcements is `(epoch, sequence)` and nothing else. The epoch is the
    trainer's; a trainer that takes over has a higher one, so that one that was thought dead is ignored from
    then on. Within an epoch every announcement to `STREAM/champion` has a `sequence` above the last one,
    whatever it announces. A pointer is taken if it comes after the one taken last, so that

    - a promotion or a rollback is the newest announcement, and version numbers play no part in the order;
    - a revision that arrives after the promotion it was sent before is ignored, repeats change nothing;
    - any one pointer is complete. A reader that joins late, or for whom compaction left only the last
      value (the 50th revision after a rollback to an older version, whose own announcement is gone), ends
      where a reader that saw every message did.

    What a reader cannot see: a trainer with an old epoch that writes after the new one may be all that
    compaction keeps. A trainer therefore looks whether it still owns the store before it sends.

    The checksum finds accidents, not forgery: only trainers may have the right to write this topic.

    Args:
        revision: counts the heads of this version; a rollback to a version goes on counting.
        encoder: digest of the encoder's spec.
        head: digest of the head's tensors, or None before the first label.
        epoch: the trainer's.
        sequence: counts the stream's announcements under this epoch.
        checksum: sha256 of the rest; filled in where it is empty.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["champion", "version", "revision"]
    stream: StreamName
    version: str = Field(pattern=f"^{_VERSION.pattern}$")
    revision: int = Field(default=0, ge=0)
    encoder: Digest = Field(pattern=f"^{_DIGEST.pattern}$")
    head: Digest | None = Field(default=None, pattern=f"^{_DIGEST.pattern}$")
    epoch: int = Field(ge=0)
    sequence: int = Field(ge=0)
    announced_at: AwareDatetime
    checksum: str = ""

    @property
    def name(self) -> str:
        """The revision's name, such as `v12.3456`."""
        return f"{self.version}.{self.revision}"

    @property
    def key(self) -> bytes:
        """The message key."""
        where = f"version/{self.version}" if self.kind == "version" else "champion"
        return f"{self.stream}/{where}".encode()

    def after(self, taken: Pointer | None) -> bool:
        """Whether this pointer is to be taken, `taken` being the one taken last for its stream."""
        return taken is None or (self.epoch, self.sequence) > (taken.epoch, taken.sequence)

    def encode(self) -> bytes:
        """The message value, with its checksum.

        Raises:
            ValueError: it takes more than 4 KiB, which only a very long stream name can cause.
        """
        fields = self.model_dump(mode="json", exclude={"checksum"})
        value = json.dumps({**fields, "checksum": _checksum(fields)}, ensure_ascii=False).encode()
        if len(value) > MAX_POINTER_BYTES:
            raise ValueError(f"a pointer of {len(value)} bytes, at most {MAX_POINTER_BYTES} are allowed")
        return value

    @staticmethod
    def rank(value: bytes) -> tuple[int, int] | None:
        """The (epoch, sequence) that a message claims, at a quarter of the cost of `decode` and with nothing verified.

        None where it is none that `decode` would take.
        """
        if len(value) > MAX_POINTER_BYTES:
            return None
        try:
            found = json.loads(value)
            epoch, sequence = found["epoch"], found["sequence"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return (epoch, sequence) if type(epoch) is int and type(sequence) is int else None

    @classmethod
    def decode(cls, key: bytes, value: bytes) -> Self:
        """The pointer of one message; fields that this version does not know are part of the checksum.

        Raises:
            BrokenVersion: it is too large, not JSON, incomplete, altered, or under a foreign key.
        """
        what = f"the announcement under {key[:200].decode(errors='replace')!r}"
        remedy = "it is ignored; announce the version again with `trimtab versions promote`"
        if len(value) > MAX_POINTER_BYTES:
            detail = f"{len(value)} bytes, at most {MAX_POINTER_BYTES} are taken"
            raise BrokenVersion(what, Fault.MALFORMED, detail, remedy)
        try:
            found = json.loads(value)
            pointer = cls.model_validate(found)
        except (ValueError, RecursionError) as error:
            raise BrokenVersion(what, Fault.MALFORMED, _first_line(error), remedy) from None
        fields = {name: content for name, content in found.items() if name != "checksum"}
        if _checksum(fields) != pointer.checksum:
            raise BrokenVersion(what, Fault.ALTERED, "its checksum does not match", remedy)
        if pointer.key != key:
            detail = f"it belongs under {pointer.key.decode()!r}"
            raise BrokenVersion(what, Fault.MISMATCH, detail, remedy)
        return pointer


class Registry:
    """Versions, revisions and their blobs on one filesystem. Safe to use from many threads.

    Args:
        url: a directory in fsspec's form, such as `file:///var/lib/trimtab/registry` or `s3://models/trimtab`.
        cache_dir: where blobs of a remote filesystem are kept; needed for `open` on one.
        storage_options: passed to the filesystem, such as its endpoint.
        cache_bytes: how much the cache may hold; the blobs used longest ago leave first.
        now: the clock.

    Raises:
        Misconfigured: fsspec does not know the URL's scheme, or its package is not installed.
    """

    def __init__(
        self,
        url: str,
        cache_dir: Path | None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        cache_bytes: int = 8 * 2**30,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        try:
            self._fs, root = url_to_fs(url, **(storage_options or {}))
        except (ValueError, ImportError) as error:
            raise Misconfigured(f"registry {url!r}: {error}") from error
        self.url = url
        self._root = root.rstrip("/")
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._local = bool(protocols & {"file", "local"})
        self._puts_whole = bool(protocols & _OBJECT_STORES)
        self._cache_dir = cache_dir
        self._cache_bytes = cache_bytes
        self._now = now
        self._lock = threading.RLock()

    # Blobs

    def put(self, data: bytes) -> Digest:
        """Store content and return its name; content that is there already is stored once.

        A blob that nothing names yet is safe from `prune` for its grace, counted from the last `put`.

        Raises:
            RetryLater: the filesystem cannot be reached or is full.
        """
        digest = hashlib.sha256(data).hexdigest()
        with self._lock:
            if not self._fresh(digest, data):
                self._write(self._blob(digest), data)
        return digest

    def exists(self, digest: Digest) -> bool:
        """Whether a blob is there; its content is verified only when it is read."""
        with self._reaching(f"blob {digest[:12]}"):
            return bool(self._fs.exists(self._blob(digest)))

    def read(self, digest: Digest, of: str = "", *, limit: int = MAX_BLOB_BYTES) -> bytes:
        """A blob's verified content.

        Args:
            of: what it belongs to, for the message where it is broken.
            limit: the most bytes taken.

        Raises:
            BrokenVersion: it is missing, torn, altered or too large.
            RetryLater: the filesystem cannot be reached.
        """
        what = _blob_of(digest, of)
        path = self._blob(digest)
        with self._reaching(what):
            try:
                size = self._fs.size(path)
                if size is not None and size > limit:
                    raise BrokenVersion(what, Fault.MALFORMED, f"{size} bytes, at most {limit} are taken", _AGAIN)
                data: bytes = self._fs.cat_file(path)
            except FileNotFoundError:
                raise self._missing(what, path) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise self._altered(what, path, len(data))
        return data

    def open(self, digest: Digest, of: str = "") -> Path:
        """A local file with a blob's content, verified at this call; not to be written to.

        Raises:
            BrokenVersion: it is missing, torn or altered.
            RetryLater: the filesystem cannot be reached.
            Misconfigured: the filesystem is remote and no `cache_dir` was given.
        """
        what, source = _blob_of(digest, of), self._blob(digest)
        if self._local:
            path = Path(source)
            try:
                with self._reaching(what):
                    found = _file_digest(path)
            except FileNotFoundError:
                raise self._missing(what, source) from None
            if found != digest:
                raise self._altered(what, source, path.stat().st_size)
            return path
        if self._cache_dir is None:
            raise Misconfigured(f"registry {self.url!r} is remote: set a cache directory for it")
        cached = self._cache_dir / digest[:2] / digest[2:]
        with contextlib.suppress(FileNotFoundError):
            if _file_digest(cached) == digest:
                os.utime(cached)
                return cached
            logger.warning("%s is altered in the cache %s; it is fetched again", what, self._cache_dir)
        self._fetch(source, cached, digest, what)
        return cached

    # Encoders and heads

    def put_encoder(self, spec: EncoderSpec, files: Mapping[str, bytes | Path]) -> Digest:
        """Store an encoder's files and its spec; returns the spec's digest, by which pointers name it.

        Raises:
            ValueError: a file's digest is not the one in the spec, one is missing, or is of a kind that is not
                stored. Only safetensors and plain text are: nothing that runs code when it is read.
        """
        if set(files) != set(spec.files):
            raise ValueError(f"the spec names {sorted(spec.files)}, given were {sorted(files)}")
        for name, content in files.items():
            _check_file_name(name)
            if self.put(content if isinstance(content, bytes) else content.read_bytes()) != spec.files[name]:
                raise ValueError(f"{name} is not the file that the spec names")
        return self.put(_spec_bytes(spec))

    def encoder(self, digest: Digest, of: str = "") -> tuple[EncoderSpec, dict[str, Path]]:
        """An encoder's spec and its verified local files, for `learner.encoders.load_encoder`.

        Raises:
            BrokenVersion: the spec or a file is missing, altered, or not what it says it is.
            RetryLater: the filesystem cannot be reached.
        """
        spec = self._spec(digest, of)
        files = {}
        for name, blob in spec.files.items():
            files[name] = self.open(blob, of)
            if name.endswith(".safetensors"):
                _check_tensors(files[name], _blob_of(blob, of))
        return spec, files

    def put_head(self, tensors: Mapping[str, np.ndarray]) -> Digest:
        """Store a head's tensors as one safetensors blob.

        Raises:
            ValueError: a value is not finite, or the whole takes more than 256 MiB.
        """
        bad = _not_finite(tensors)
        if bad:
            raise ValueError(f"tensor {bad!r} of a head has a value that is not finite")
        data = head_bytes(tensors)
        if len(data) > MAX_HEAD_BYTES:
            raise ValueError(f"a head of {len(data)} bytes, at most {MAX_HEAD_BYTES} are stored")
        return self.put(data)

    def head(self, digest: Digest, of: str = "") -> dict[str, np.ndarray]:
        """A head's verified tensors, for `LinearHead.from_tensors`.

        Raises:
            BrokenVersion: it is missing, altered, no safetensors, or a value is not finite.
            RetryLater: the filesystem cannot be reached.
        """
        what = _blob_of(digest, of)
        data = self.read(digest, of, limit=MAX_HEAD_BYTES)
        try:
            tensors: dict[str, np.ndarray] = load_tensors(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise BrokenVersion(what, Fault.MALFORMED, f"no safetensors ({_first_line(error)})", _AGAIN) from None
        if bad := _not_finite(tensors):
            raise BrokenVersion(what, Fault.MALFORMED, f"tensor {bad!r} has a value that is not finite", _AGAIN)
        return tensors

    # Versions

    def commit(self, manifest: VersionManifest) -> str:
        """Write a manifest under the stream's next number and return the version's name.

        Raises:
            BrokenVersion: a blob that it names is not stored. Nothing was written.
            ValueError: it carries a number that is not the stream's next one.
            RetryLater: the filesystem cannot be reached.
        """
        for digest in sorted(manifest.digests()):
            if not self.exists(digest):
                what = _blob_of(digest, f"a new version of stream {manifest.stream!r}")
                raise self._missing(what, self._blob(digest))
        with self._lock:
            number = max(self._numbers(manifest.stream), default=0) + 1
            while True:
                if manifest.number not in (0, number):
                    raise ValueError(
                        f"{manifest.name} is not the next version of stream {manifest.stream!r}, v{number} is"
                    )
                numbered = manifest.model_copy(update={"number": number})
                try:
                    self._write_record(self._manifest(manifest.stream, numbered.name), numbered, exclusive=True)
                except FileExistsError:  # another process took the number since it was read
                    number += 1
                    continue
                return numbered.name

    def version(self, stream: str, name: str) -> VersionManifest:
        """The manifest of version `name`, such as `v12`.

        Raises:
            BrokenVersion: there is none, or it was altered.
            RetryLater: the filesystem cannot be reached.
        """
        what = f"version {name} of stream {stream!r}"
        if not _VERSION.fullmatch(name):
            raise BrokenVersion(what, Fault.MISSING, "versions are named v1, v2, ...", _LIST)
        manifest = self._read_record(self._manifest(stream, name), VersionManifest, what)
        if manifest is None:
            numbers = self._numbers(stream)
            known = f"known are v1 to v{numbers[-1]}" if numbers else "none was ever committed"
            raise BrokenVersion(what, Fault.MISSING, known, _LIST)
        if (manifest.stream, manifest.name) != (stream, name):
            detail = f"its file says {manifest.name} of stream {manifest.stream!r}"
            raise BrokenVersion(what, Fault.MISMATCH, detail, "restore the file from a backup")
        return manifest

    def versions(self, stream: str) -> list[VersionManifest]:
        """Every manifest of a stream, oldest first, those of pruned versions too.

        Raises:
            BrokenVersion: one was altered; it is named.
        """
        return [self.version(stream, f"v{number}") for number in self._numbers(stream)]

    def streams(self) -> list[str]:
        """The streams that have anything here."""
        return sorted(unquote(PurePosixPath(path).name) for path in self._list(f"{self._root}/streams"))

    def pruned(self, stream: str, name: str) -> datetime | None:
        """When the weights of a version were removed, or None while they are there."""
        record = self._read_record(self._pruned(stream, name), _Pruned, f"the prune mark of {name}")
        return record.at if record else None

    def verify(self, stream: str, name: str) -> VersionManifest:
        """Read every blob of a version and return its manifest.

        Raises:
            BrokenVersion: anything of it is missing, altered or was pruned.
            RetryLater: the filesystem cannot be reached.
        """
        manifest = self.version(stream, name)
        what = f"version {name} of stream {stream!r}"
        if (at := self.pruned(stream, name)) is not None:
            raise BrokenVersion(what, Fault.PRUNED, f"its weights were removed on {at:%Y-%m-%d %H:%M} UTC", _STORED)
        self.encoder(manifest.encoder_digest, what)
        if manifest.head:
            self.head(manifest.head, what)
        for digest in manifest.blobs.values():
            self.open(digest, what)
        return manifest

    def champion(self, stream: str) -> str | None:
        """The version that was put into service last, as noted here; the topic is what counts."""
        history = self.champions(stream)
        return history[-1].version if history else None

    def champions(self, stream: str) -> tuple[Champion, ...]:
        """A stream's promotions and rollbacks, newest last.

        Raises:
            BrokenVersion: the file was altered.
        """
        record = self._read_record(self._champion(stream), _Promotions, f"the champion file of stream {stream!r}")
        return record.promotions if record else ()

    def set_champion(self, stream: str, name: str, why: str = "") -> None:
        """Note that a version went into service; `why` says what spoke against the one before it.

        Raises:
            BrokenVersion: there is no such version, or its weights were pruned.
        """
        with self._lock:
            self.version(stream, name)
            if self.pruned(stream, name) is not None:
                what = f"version {name} of stream {stream!r}"
                raise BrokenVersion(what, Fault.PRUNED, "its weights were removed", _STORED)
            line = Champion(version=name, since=self._now(), why=why)
            lines = (*self.champions(stream), line)[-1000:]
            self._write_record(self._champion(stream), _Promotions(stream=stream, promotions=lines))

    # Revisions

    def put_revision(
        self, stream: str, version: str, revision: int, encoder: Digest, tensors: Mapping[str, np.ndarray] | None
    ) -> HeadRef:
        """Store the head of one revision, from `LinearHead.tensors()`; None where there is no class yet.

        A head that is there under the same name is replaced: it is one whose learner died before it announced it.

        Raises:
            ValueError: as `put_head`.
            RetryLater: the filesystem cannot be reached.
        """
        with self._lock:
            head = self.put_head(tensors) if tensors is not None else None
            ref = HeadRef(
                stream=stream, version=version, revision=revision, encoder=encoder, head=head, stored_at=self._now()
            )
            self._write_record(self._revision(stream, ref.name), ref)
            return ref

    def revision(self, stream: str, name: str) -> HeadRef:
        """Which weights a revision has; `v12` and, where no head was stored for it, `v12.0` are the version's own.

        Raises:
            BrokenVersion: it is not stored, was pruned or altered.
            RetryLater: the filesystem cannot be reached.
        """
        what = f"revision {name} of stream {stream!r}"
        matched = _REVISION.fullmatch(name)
        version, number = (matched[1], int(matched[2])) if matched else (name, 0)
        if matched:
            ref = self._read_record(self._revision(stream, name), HeadRef, what)
            if ref is not None and (ref.stream, ref.name) != (stream, name):
                detail = f"its file says {ref.name} of stream {ref.stream!r}"
                raise BrokenVersion(what, Fault.MISMATCH, detail, "restore the file from a backup")
            if ref is not None:
                return ref
        if number:
            remedy = f"use the version's own head, {version}"
            raise BrokenVersion(what, Fault.MISSING, "its head is not stored, or was pruned", remedy)
        manifest = self.version(stream, version)
        return HeadRef(
            stream=stream,
            version=version,
            revision=0,
            encoder=manifest.encoder_digest,
            head=manifest.head,
            stored_at=manifest.created_at,
        )

    def revisions(self, stream: str) -> list[str]:
        """Names of the revisions whose heads are stored, oldest first."""
        names = (PurePosixPath(path).name.removesuffix(".json") for path in self._list(f"{self._of(stream)}/revisions"))
        return sorted((name for name in names if _REVISION.fullmatch(name)), key=_order)

    # Pruning

    def prune(
        self,
        stream: str,
        keep: Collection[str] = (),
        *,
        predecessors: int = 3,
        revisions: int = 100,
        grace: timedelta = timedelta(hours=1),
        dry_run: bool = False,
    ) -> PruneReport:
        """Remove the weights that nothing needs any more. Manifests stay: they are the lineage.

        A version stays if it is the champion, one of the champions before it, one of its ancestors, named in
        `keep`, or younger than `grace`. A revision's head stays if it is one of the newest or is named in
        `keep`, which keeps its version too. A blob stays while anything that stays names it, in any stream,
        and a blob that nothing names stays until it is older than `grace`. Where no champion is noted no version goes.

        Args:
            keep: names such as `v12` or `v12.37`, above all those of unexpired predictions and of what is in
                service; or digests of blobs.
            predecessors: how many earlier champions, and how many ancestors, stay.
            revisions: how many of the newest revisions of the stream stay.
            dry_run: only report.

        Raises:
            BrokenVersion: a manifest or the champion file was altered, so that what it needs is not known.
            RetryLater: the filesystem cannot be reached.
        """
        with self._lock:
            kept = self._kept_versions(stream, keep, predecessors, grace)
            stored = [m for m in self.versions(stream) if self.pruned(stream, m.name) is None]
            going = [manifest for manifest in stored if manifest.name not in kept]
            names = self.revisions(stream)
            staying = set(names[len(names) - revisions :] if revisions else ()) | (set(names) & set(keep))
            leaving = [name for name in names if name not in staying]

            marked = {name for name in keep if _DIGEST.fullmatch(name)}
            for other in {*self.streams(), stream}:
                if other == stream:
                    manifests, refs = [m for m in stored if m.name in kept], sorted(staying, key=_order)
                else:
                    manifests = [m for m in self.versions(other) if self.pruned(other, m.name) is None]
                    refs = self.revisions(other)
                for manifest in manifests:
                    marked |= manifest.digests()
                marked |= self._needed_by(other, refs)
            old_heads = {ref.head for name in leaving if (ref := self._ref(stream, name)) and ref.head}
            blobs = self._unmarked(marked, old_heads, grace)
            if not dry_run:
                # The marks go first: a prune that is cut short leaves blobs that nothing names, never the reverse.
                for manifest in going:
                    mark = _Pruned(stream=stream, version=manifest.name, at=self._now())
                    self._write_record(self._pruned(stream, manifest.name), mark)
                for name in leaving:
                    self._remove(self._revision(stream, name))
                for blob in blobs:
                    self._remove(self._blob(blob.digest))
                self._remove_leftovers(grace)
            return PruneReport(
                stream=stream,
                dry_run=dry_run,
                kept=kept,
                versions=tuple(manifest.name for manifest in going),
                revisions=tuple(leaving),
                blobs=tuple(blobs),
            )

    def _kept_versions(self, stream: str, keep: Collection[str], predecessors: int, grace: timedelta) -> dict[str, str]:
        manifests = {manifest.name: manifest for manifest in self.versions(stream)}
        history = [line.version for line in self.champions(stream)]
        if not history:
            return dict.fromkeys(manifests, "no champion is noted for the stream")
        reasons: dict[str, str] = {}
        youngest = self._now() - grace
        for name, manifest in manifests.items():
            if manifest.created_at > youngest:
                reasons[name] = "it is new"
        for name in keep:
            version = matched[1] if (matched := _REVISION.fullmatch(name)) else name
            if version in manifests:
                reasons[version] = f"{name} is still named"
        ancestor = manifests[history[-1]].parent if history[-1] in manifests else None
        for _ in range(predecessors):
            if ancestor is None or ancestor not in manifests:
                break
            reasons[ancestor] = "an ancestor of the champion"
            ancestor = manifests[ancestor].parent
        before = [name for name in dict.fromkeys(reversed(history)) if name != history[-1]]
        for name in before[:predecessors]:
            reasons[name] = "a champion before this one"
        reasons[history[-1]] = "the champion"
        return {name: reasons[name] for name in manifests if name in reasons}

    def _needed_by(self, stream: str, names: Collection[str]) -> set[Digest]:
        needed: set[Digest] = set()
        specs: set[Digest] = set()
        for name in names:
            ref = self._ref(stream, name)
            if ref is not None:
                specs.add(ref.encoder)
                needed |= {ref.encoder, *([ref.head] if ref.head else [])}
        for digest in specs:
            with contextlib.suppress(BrokenVersion):  # a manifest that shares the encoder names its files as well
                needed |= set(self._spec(digest).files.values())
        return needed

    def _ref(self, stream: str, name: str) -> HeadRef | None:
        return self._read_record(self._revision(stream, name), HeadRef, f"revision {name} of stream {stream!r}")

    def _unmarked(self, marked: set[Digest], at_once: Collection[Digest], grace: timedelta) -> list[PrunedBlob]:
        found = []
        youngest = self._now() - grace
        with self._reaching("the blobs"):
            self._fs.invalidate_cache()
            folder = f"{self._root}/blobs"
            entries = self._fs.find(folder, detail=True) if self._fs.exists(folder) else {}
            for path, entry in entries.items():
                parts = PurePosixPath(path).parts[-2:]
                digest = "".join(parts)
                if not _DIGEST.fullmatch(digest) or digest in marked:
                    continue
                if digest in at_once or self._older(path, youngest):
                    found.append(PrunedBlob(digest=digest, bytes=int(entry["size"])))
        return sorted(found, key=lambda blob: blob.digest)

    def _remove_leftovers(self, grace: timedelta) -> None:
        """Remove the temporary files of processes that were killed while they wrote."""
        youngest = self._now() - grace
        with self._reaching("temporary files"):
            paths = [path for path in self._fs.find(self._root) if PurePosixPath(path).name.startswith(_PART)]
            old = [path for path in paths if self._older(path, youngest)]
        for path in old:
            self._remove(path)

    def _older(self, path: str, youngest: datetime) -> bool:
        """Whether a file is older than `youngest`; where the filesystem cannot tell, it is not."""
        with contextlib.suppress(NotImplementedError):
            modified = self._fs.modified(path)
            modified = modified if modified.tzinfo else modified.replace(tzinfo=UTC)
            return bool(modified < youngest)
        return False

    # Paths and files

    def _blob(self, digest: Digest) -> str:
        if not _DIGEST.fullmatch(digest):
            raise BrokenVersion(f"blob {digest[:80]!r}", Fault.MALFORMED, "a blob is named by its sha256", _AGAIN)
        return f"{self._root}/blobs/{digest[:2]}/{digest[2:]}"

    def _of(self, stream: str) -> str:
        return f"{self._root}/streams/{_quoted(stream)}"

    def _manifest(self, stream: str, name: str) -> str:
        return f"{self._of(stream)}/versions/{name}.json"

    def _pruned(self, stream: str, name: str) -> str:
        return f"{self._of(stream)}/pruned/{name}.json"

    def _revision(self, stream: str, name: str) -> str:
        return f"{self._of(stream)}/revisions/{name}.json"

    def _champion(self, stream: str) -> str:
        return f"{self._of(stream)}/champion.json"

    def _numbers(self, stream: str) -> list[int]:
        names = (PurePosixPath(path).name.removesuffix(".json") for path in self._list(f"{self._of(stream)}/versions"))
        return sorted(int(matched[1]) for name in names if (matched := _VERSION.fullmatch(name)))

    def _list(self, directory: str) -> list[str]:
        with self._reaching(directory):
            self._fs.invalidate_cache()
            try:
                return [str(path).rstrip("/") for path in self._fs.ls(directory, detail=False)]
            except FileNotFoundError:
                return []

    def _spec(self, digest: Digest, of: str = "") -> EncoderSpec:
        what = _blob_of(digest, of)
        try:
            spec = EncoderSpec.model_validate_json(self.read(digest, of, limit=MAX_RECORD_BYTES))
        except ValidationError as error:
            raise BrokenVersion(what, Fault.MALFORMED, f"no encoder spec ({_first_line(error)})", _AGAIN) from None
        for name in spec.files:
            try:
                _check_file_name(name)
            except ValueError as error:
                raise BrokenVersion(what, Fault.MALFORMED, str(error), _AGAIN) from None
        return spec

    def _fresh(self, digest: Digest, data: bytes) -> bool:
        """Whether a blob is there, whole, and young enough for a prune in another process to leave it alone."""
        path = self._blob(digest)
        with self._reaching(f"blob {digest[:12]}"):
            try:
                if self._fs.size(path) != len(data) or self._older(path, self._now() - timedelta(minutes=30)):
                    return False
                return bool(self._fs.cat_file(path) == data)
            except FileNotFoundError:
                return False

    def _fetch(self, source: str, cached: Path, digest: Digest, what: str) -> None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_name(f"{_PART}{uuid.uuid4().hex}")
        try:
            with self._reaching(what):
                try:
                    self._fs.get_file(source, str(part))
                except FileNotFoundError:
                    raise self._missing(what, source) from None
            if _file_digest(part) != digest:
                raise self._altered(what, source, part.stat().st_size)
            part.replace(cached)
        finally:
            part.unlink(missing_ok=True)
        self._shrink_cache(cached)

    def _shrink_cache(self, newest: Path) -> None:
        assert self._cache_dir is not None
        files = []
        for path in self._cache_dir.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._cache_bytes:
                break
            if path != newest:
                path.unlink(missing_ok=True)  # a process that still has it mapped keeps its pages
                total -= size

    def _write_record(self, path: str, record: BaseModel, *, exclusive: bool = False) -> None:
        content = record.model_dump(mode="json")
        text = json.dumps({"content": content, "sha256": _checksum(content)}, indent=1, ensure_ascii=False)
        self._write(path, text.encode(), exclusive=exclusive)

    def _read_record(self, path: str, kind: type[R], what: str) -> R | None:
        """One checksummed JSON file, or None where there is none."""
        remedy = f"restore {path} from a backup"
        with self._reaching(what):
            try:
                data = self._fs.cat_file(path)
            except FileNotFoundError:
                return None
        try:
            found = json.loads(data)
            content, checksum = found["content"], found["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            detail = f"{len(data)} bytes that are not a whole record"
            raise BrokenVersion(what, Fault.ALTERED, detail, remedy) from None
        if _checksum(content) != checksum:
            raise BrokenVersion(what, Fault.ALTERED, "its checksum does not match", remedy)
        try:
            return kind.model_validate(content)
        except ValidationError as error:
            detail = f"this release cannot read it ({_first_line(error)})"
            remedy = "use the release that wrote it, or a newer one"
            raise BrokenVersion(what, Fault.MALFORMED, detail, remedy) from None

    def _write(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """Make a file appear whole or not at all; `exclusive` refuses one that is there."""
        with self._reaching(path):
            if self._local:
                _write_local(Path(path), data, exclusive)
            elif self._puts_whole:
                self._fs.pipe_file(path, data, mode="create" if exclusive else "overwrite")
            else:
                if exclusive and self._fs.exists(path):
                    raise FileExistsError(path)
                directory, _, name = path.rpartition("/")
                part = f"{directory}/{_PART}{uuid.uuid4().hex}-{name[-40:]}"
                self._fs.makedirs(directory, exist_ok=True)
                self._fs.pipe_file(part, data)
                self._fs.mv(part, path)

    def _remove(self, path: str) -> None:
        with self._reaching(path), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    @contextlib.contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Turn whatever a filesystem raises when it is away, full or forbidden into `RetryLater`."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, TrimtabError, TypeError, AttributeError):
            raise
        except Exception as error:
            raise RetryLater(f"registry {self.url}: {what}: {type(error).__name__}: {_first_line(error)}") from error

    def _missing(self, what: str, path: str) -> BrokenVersion:
        return BrokenVersion(what, Fault.MISSING, f"there is no {path}", f"restore it from a backup, or {_OTHERWISE}")

    def _altered(self, what: str, path: str, size: int) -> BrokenVersion:
        remedy = f"delete {path} and restore it from a backup, or {_OTHERWISE}"
        return BrokenVersion(what, Fault.ALTERED, f"its {size} bytes do not have the sha256 that names them", remedy)


_PART = ".part-"
_OTHERWISE = "roll back to another version with `trimtab versions rollback`"
_AGAIN = f"{_OTHERWISE}, or retrain"
_STORED = "choose one that is stored: `trimtab versions list`"
_LIST = "list them: `trimtab versions list`"


def head_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A head's tensors as they are stored; the same tensors give the same bytes."""
    data: bytes = save_tensors({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    return data


def spec_digest(spec: EncoderSpec) -> Digest:
    """The digest of an encoder's spec as it is stored."""
    return hashlib.sha256(_spec_bytes(spec)).hexdigest()


def _spec_bytes(spec: EncoderSpec) -> bytes:
    return _canonical(spec.model_dump(mode="json"))


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


def _checksum(content: Any) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_local(target: Path, data: bytes, exclusive: bool) -> None:
    """Write, force to disk, then rename; a reader sees the old file, or none, or the whole new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{_PART}{uuid.uuid4().hex}")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(part, target)  # unlike a rename, this fails where the name is taken
        else:
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _check_tensors(path: Path, what: str) -> None:
    """Read a safetensors header: sizes, types and offsets must fit the file exactly."""
    try:
        with safe_open(path, framework="numpy") as tensors:
            count = len(tensors.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenVersion(what, Fault.MALFORMED, f"no safetensors ({_first_line(error)})", _AGAIN) from None
    if count > MAX_TENSORS:
        raise BrokenVersion(what, Fault.MALFORMED, f"{count} tensors, at most {MAX_TENSORS} are taken", _AGAIN)


def _check_file_name(name: str) -> None:
    path = PurePosixPath(name)
    if path.name != name or path.suffix not in STORED_SUFFIXES or name.startswith("."):
        allowed = ", ".join(sorted(STORED_SUFFIXES))
        raise ValueError(f"an encoder's files are {allowed} without folders, found {name!r}")


def _not_finite(tensors: Mapping[str, np.ndarray]) -> str | None:
    for name, tensor in tensors.items():
        if np.issubdtype(tensor.dtype, np.floating) and not np.isfinite(tensor).all():
            return name
    return None


def _blob_of(digest: Digest, of: str) -> str:
    return f"blob {digest[:12]} of {of}" if of else f"blob {digest[:12]}"


def _order(name: str) -> tuple[int, int]:
    version, _, revision = name[1:].partition(".")
    return int(version), int(revision)


def _quoted(stream: str) -> str:
    """A stream's folder: any name is one path segment, no name climbs out, and long ones stay within 255 bytes."""
    quoted = quote(stream, safe="").replace(".", "%2E")
    if len(quoted) > 200:
        raise Misconfigured(f"stream name {stream[:40]!r}... is too long for a folder; choose a shorter one")
    return quoted


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
