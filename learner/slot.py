"""The slot: the one mutable reference to what answers each stream.

A reader takes the reference once and holds what it took until its answers are written, so a swap, which puts
another reference in its place, neither waits for readers nor changes an answer in flight::

    predict:   serving = slot[stream] ──▶ encoder ──▶ head ──▶ answers, all named by `serving`
    announce:  check pointer ──▶ load and check weights, beside ──▶ slot[stream] = new

What went wrong before the last step leaves the slot as it was.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from learner.encoders import Encoder, load_encoder, payload
from learner.heads import LinearHead
from learner.registry import BrokenVersion, Digest, Fault, Pointer, Registry
from learner.spec import EncoderSpec, Precision
from monitoring.metrics import Metrics
from stream.errors import Misconfigured, RetryLater
from stream.events import Event
from stream.model import UNTAUGHT, Answer

logger = logging.getLogger(__name__)

HELD = 200
"""Announcements of a stream's past that are compared by their rank before the newest of them is decoded."""
SUBSTITUTES = 3
"""Revisions of one version that are tried in place of a broken one, before its own head is."""


@dataclass(frozen=True, slots=True)
class _Serving:
    """What answers one stream. `pointer` is the announcement that put it here, None where it is pinned."""

    name: str
    pointer: Pointer | None
    encoder: Encoder
    head: LinearHead | None


class Slot:
    """Which revision answers each stream; implements `stream.model.Model`. Safe to use from many threads.

    Args:
        registry: where weights come from.
        channels: the streams this process answers, each with its telemetry channels in order, none for text.
        metrics: told of swaps, refusals and what is in service.
        device: where the encoders run.
        precision: how text encoders compute; see `learner.spec.Precision`.
        top_k: how many classes an answer names.
        pin: revisions such as `v1.37`, by stream, that answer whatever is announced.
        retry_seconds: how long to wait before weights that could not be fetched are asked for again.
        clock: seconds since 1970.

    Raises:
        Misconfigured: int8 is asked of a GPU, a pinned stream is not known, or its revision cannot be loaded.
        RetryLater: a pinned revision cannot be fetched now.
    """

    def __init__(
        self,
        registry: Registry,
        channels: Mapping[str, Sequence[str]],
        metrics: Metrics,
        *,
        device: str = "cpu",
        precision: Precision = "float32",
        top_k: int = 5,
        pin: Mapping[str, str] | None = None,
        retry_seconds: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if precision == "int8" and device != "cpu":
            raise Misconfigured("worker.precision is int8, which is for the CPU; set bfloat16, or worker.device to cpu")
        self._registry = registry
        self._channels = {stream: tuple(names) for stream, names in channels.items()}
        self._metrics = metrics
        self._device, self._precision = device, precision
        self._top_k = top_k
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._serving: dict[str, _Serving] = {}
        self._encoders: weakref.WeakValueDictionary[Digest, Encoder] = weakref.WeakValueDictionary()
        self._waiting: dict[str, Pointer] = {}
        self._past: dict[str, list[tuple[tuple[int, int], bytes, bytes]]] = {}
        self._catching_up = False
        self._timer: threading.Timer | None = None
        self._swapped = threading.Condition(threading.RLock())
        self._pinned = frozenset(pin or ())
        for stream, name in (pin or {}).items():
            self._pin(stream, name)

    def predict(self, stream: str, events: Sequence[Event]) -> list[Answer]:
        """Answer events of one stream, in order, all by the revision in service at the call.

        Raises:
            ValueError: the encoder gave a number that is not finite, or an event does not fit it.
        """
        return self.predict_all({stream: events})[stream]

    def predict_all(self, parts: Mapping[str, Sequence[Event]]) -> dict[str, list[Answer]]:
        """As `predict`, for the events of several streams; those that share an encoder go through it together.

        With a hundred streams a batch has a handful of events of each, and a network needs nearly as long for a handful
        as for a hundred.
        """
        serving = {stream: self._serving.get(stream) for stream in parts}
        members: dict[Encoder, list[str]] = {}
        for stream, one in serving.items():
            if one is not None and one.head is not None and parts[stream]:
                members.setdefault(one.encoder, []).append(stream)
        answers: dict[str, list[Answer]] = {}
        for encoder, streams in members.items():
            embeddings = encoder.embed(
                [payload(event, self._channels[stream]) for stream in streams for event in parts[stream]]
            )
            first = 0
            for stream in streams:
                part, one = embeddings[first : first + len(parts[stream])], serving[stream]
                assert one is not None
                answers[stream] = self._answers(one, parts[stream], part)
                first += len(part)
        for stream, one in serving.items():
            if stream not in answers:
                # Nothing was announced, or nothing learned, or nothing asked.
                name = UNTAUGHT.model_version if one is None else one.name
                untaught = Answer(label=None, probabilities=(), novelty=1.0, model_version=name)
                answers[stream] = [untaught] * len(parts[stream])
        return answers

    def _answers(self, serving: _Serving, events: Sequence[Event], embeddings: npt.NDArray[np.float32]) -> list[Answer]:
        assert serving.head is not None
        finite = np.isfinite(embeddings).all(axis=1)
        if not finite.all():
            event = events[int(np.argmin(finite))]
            raise ValueError(f"{serving.name} gives event {event.event_id!r} an embedding that is not finite")
        labels, probabilities, novelty = serving.head.answer(embeddings, self._top_k)
        return [
            Answer(
                label=names[0],
                probabilities=tuple(zip(names, shares, strict=True)),
                novelty=new,
                model_version=serving.name,
            )
            for names, shares, new in zip(labels, probabilities.tolist(), novelty.tolist(), strict=True)
        ]

    def announce(self, key: bytes, value: bytes | None) -> None:
        """Take one message of `model-versions`: load what it names, here and now, and swap it in.

        Old and repeated ones, other streams' and those of kind `version` change nothing. Neither does a broken one,
        which is counted. Weights that cannot be fetched for now are asked for again until something newer is.
        """
        stream = _stream_of(key)
        if stream not in self._channels or stream in self._pinned or value is None:
            return
        with self._swapped:
            if self._catching_up:
                self._hold(stream, key, value)
            elif self._take(stream, key, value):
                self._load(stream)

    def _take(self, stream: str, key: bytes, value: bytes) -> bool:
        """Whether a message is news; what it names then waits to be loaded."""
        try:
            pointer = Pointer.decode(key, value)
        except BrokenVersion as error:
            self._refuse(stream, error)
            return False
        if pointer.kind == "version" or not pointer.after(self._newest(stream)):
            return False
        self._waiting[stream] = pointer
        return True

    def _hold(self, stream: str, key: bytes, value: bytes) -> None:
        """Keep an announcement of the past until it is known whether any of the next `HELD` is newer.

        After a month there are a hundred thousand of them. To check each as if it were to be served would take longer
        than all else that a start needs.
        """
        rank = Pointer.rank(value)
        if rank is None:
            self._take(stream, key, value)  # which says what is wrong with it
            return
        past = self._past.setdefault(stream, [])
        past.append((rank, key, value))
        if len(past) >= HELD:
            self._sift(stream)

    def _sift(self, stream: str) -> None:
        """Take the newest whole one of those held; what is older than it changes nothing, whole or not."""
        for rank, key, value in sorted(self._past.pop(stream, ()), reverse=True):
            newest = self._newest(stream)
            if newest is not None and rank <= (newest.epoch, newest.sequence):
                return
            self._take(stream, key, value)

    @contextlib.contextmanager
    def catching_up(self) -> Iterator[None]:
        """While it is open, announcements are only compared; at its end the newest of each stream is loaded.

        For reading the topic from its beginning, where most revisions were replaced long ago and their heads pruned.

        Raises:
            RetryLater: at the end, the weights of a stream that nothing answers yet cannot be fetched; the next
                time goes on from there.
        """
        with self._swapped:
            self._catching_up = True
        try:
            yield
        finally:
            with self._swapped:
                self._catching_up = False
                for stream in list(self._past):
                    self._sift(stream)
                self.retry()
        with self._swapped:
            missing = sorted(set(self._waiting) - set(self._serving))
        if missing:
            names = ", ".join(f"{stream} ({self._waiting[stream].name})" for stream in missing)
            raise RetryLater(f"the weights of {names} cannot be fetched from {self._registry.url}")

    def retry(self) -> None:
        """Ask again for weights that could not be fetched; a timer does so too."""
        with self._swapped:
            for stream in () if self._catching_up else list(self._waiting):
                self._load(stream)

    def revision(self, stream: str) -> str:
        """What answers a stream, such as `v12.3456`; `v0.0` before anything was announced."""
        serving = self._serving.get(stream)
        return UNTAUGHT.model_version if serving is None else serving.name

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until every stream is answered by some revision; False where that took longer than `timeout` seconds."""
        with self._swapped:
            return self._swapped.wait_for(lambda: self._serving.keys() >= self._channels.keys(), timeout)

    def close(self) -> None:
        """Ask for nothing any more; what is in service goes on answering."""
        with self._swapped:
            self._waiting.clear()
            if self._timer is not None:
                self._timer.cancel()

    def _newest(self, stream: str) -> Pointer | None:
        waiting, serving = self._waiting.get(stream), self._serving.get(stream)
        return waiting or (serving.pointer if serving is not None else None)

    def _load(self, stream: str) -> None:
        """Load what waits for a stream and swap it in, or leave everything as it is."""
        pointer = self._waiting.pop(stream)
        try:
            self._swap(stream, self._fetch(stream, pointer.name, pointer.encoder, pointer.head, pointer))
        except BrokenVersion as error:
            self._refuse(stream, error)
            if stream not in self._serving:
                self._fall_back(stream, pointer)
        except RetryLater as error:
            logger.warning("stream %s: %s is waited for: %s", stream, pointer.name, error)
            self._metrics.refused_versions.labels(stream, str(Fault.UNREACHABLE)).inc()
            self._waiting[stream] = pointer
            self._start_timer()

    def _fall_back(self, stream: str, pointer: Pointer) -> None:
        """After a start with a broken revision, answer with the nearest whole one rather than not at all.

        Nearest is the version's own head; else what was in service before it, latest first, each by the newest
        revision of it that is whole; else an ancestor. The next announcement replaces it.
        """
        with contextlib.suppress(RetryLater):
            for name in self._substitutes(stream, pointer.version):
                try:
                    ref = self._registry.revision(stream, name)
                    self._swap(stream, self._fetch(stream, ref.name, ref.encoder, ref.head, pointer))
                except BrokenVersion as error:
                    logger.warning("stream %s: %s cannot stand in for %s: %s", stream, name, pointer.name, error)
                else:
                    logger.warning("stream %s: %s is served in place of %s", stream, name, pointer.name)
                    return
        logger.error("stream %s has nothing in service", stream)

    def _substitutes(self, stream: str, version: str) -> Iterator[str]:
        """Revisions that may answer in place of this version's, the best first."""
        yield f"{version}.0"
        stored: dict[str, list[str]] = {}
        for name in reversed(self._registry.revisions(stream)):
            stored.setdefault(name.partition(".")[0], []).append(name)
        for other in dict.fromkeys([*self._before(stream, version), *self._ancestors(stream, version)]):
            own = f"{other}.0"
            yield from (name for name in stored.get(other, ())[:SUBSTITUTES] if name != own)
            yield own

    def _before(self, stream: str, version: str) -> list[str]:
        """The champions before this version, latest first; one that it was put back in place of is none of them."""
        try:
            history = [line.version for line in self._registry.champions(stream)]
        except BrokenVersion:
            return []
        return [name for name in reversed(history) if int(name[1:]) < int(version[1:])]

    def _ancestors(self, stream: str, version: str) -> Iterator[str]:
        """Parent, grandparent and so on, as far as their manifests can be read."""
        seen = {version}
        with contextlib.suppress(BrokenVersion):
            while (parent := self._registry.version(stream, version).parent) is not None and parent not in seen:
                seen.add(parent)
                yield parent
                version = parent

    def _fetch(
        self, stream: str, name: str, encoder_digest: Digest, head_digest: Digest | None, pointer: Pointer | None
    ) -> _Serving:
        what = f"revision {name} of stream {stream!r}"
        encoder = self._encoder(encoder_digest, what)
        _check_kind(encoder.spec, self._channels[stream], what)
        head = None
        if head_digest is not None:
            tensors = self._registry.head(head_digest, what)
            try:
                head = LinearHead.from_tensors(tensors)
            except (ValueError, KeyError, IndexError) as error:
                raise BrokenVersion(what, Fault.MALFORMED, f"its head cannot be rebuilt: {error}", _REMEDY) from error
            if head.dimension != encoder.spec.dimension:
                detail = f"its head takes {head.dimension} dimensions, its encoder gives {encoder.spec.dimension}"
                raise BrokenVersion(what, Fault.MISMATCH, detail, _REMEDY)
        return _Serving(name, pointer, encoder, head)

    def _encoder(self, digest: Digest, what: str) -> Encoder:
        """The encoder with this digest: the one that some stream still holds, else a new one."""
        encoder = self._encoders.get(digest)
        if encoder is None:
            spec, files = self._registry.encoder(digest, what)
            try:
                encoder = load_encoder(spec, files, self._device, self._precision)
            except Misconfigured as error:
                raise BrokenVersion(what, Fault.MALFORMED, str(error), _REMEDY) from error
            self._encoders[digest] = encoder
        return encoder

    def _swap(self, stream: str, serving: _Serving) -> None:
        with self._swapped:
            self._serving[stream] = serving  # one assignment: a reader sees the old one or the new one
            self._metrics.swaps.labels(stream).inc()
            self._metrics.serving(stream, serving.name, self._clock())
            self._metrics.answered(stream, serving.name, 0)
            self._swapped.notify_all()

    def _refuse(self, stream: str, error: BrokenVersion) -> None:
        logger.error("stream %s stays at %s: %s", stream, self.revision(stream), error)
        self._metrics.refused_versions.labels(stream, str(error.fault)).inc()

    def _pin(self, stream: str, name: str) -> None:
        if stream not in self._channels:
            known = ", ".join(sorted(self._channels)) or "none"
            raise Misconfigured(f"pin: stream {stream!r} is not configured (known: {known})")
        try:
            ref = self._registry.revision(stream, name)
            self._swap(stream, self._fetch(stream, ref.name, ref.encoder, ref.head, None))
        except BrokenVersion as error:
            raise Misconfigured(f"pin: {error}") from error

    def _start_timer(self) -> None:
        if self._timer is None or not self._timer.is_alive() or self._timer is threading.current_thread():
            self._timer = threading.Timer(self._retry_seconds, self.retry)
            self._timer.daemon = True
            self._timer.start()


_REMEDY = "roll back to another version with `trimtab versions rollback`, or retrain"


def _stream_of(key: bytes) -> str:
    """The stream that a message key belongs to, or nothing where it is no key of ours."""
    text = key.decode(errors="replace")
    for kind in ("/champion", "/version/"):
        stream, found, rest = text.rpartition(kind)
        if found and (kind == "/version/" or not rest):
            return stream
    return ""


def _check_kind(spec: EncoderSpec, channels: tuple[str, ...], what: str) -> None:
    """Refuse an encoder that reads something else than the stream carries."""
    wanted = "telemetry" if channels else "text"
    if spec.kind != wanted:
        detail = f"its encoder reads {spec.kind}, the stream carries {wanted}"
        raise BrokenVersion(what, Fault.MISMATCH, detail, "check the stream's kind in the settings")
    found = tuple(spec.config.get("channels", ()))
    if found != channels:
        detail = f"its encoder reads channels {', '.join(found)}, the stream has {', '.join(channels)}"
        raise BrokenVersion(what, Fault.MISMATCH, detail, "give the channels in that order, or start a new stream")
