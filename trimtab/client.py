"""A deployment from a user's own code: events and labels in, predictions out, and all that can be asked of the learner.

Events, labels and predictions go by Kafka; what is asked of the learner goes by its HTTP, in the words of the `control`
topic and of the command line. `AsyncClient` is `Client` on threads: each call blocks one of them and no event loop.
"""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from getpass import getuser
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from deploy.messages import Publisher, check_topic, read
from deploy.settings import InvalidSettings, Settings, load_settings, rules
from learner.control import Action, AskedRequest, ControlAnswer, ControlRequest, first_wrong
from learner.finetune import Strategy
from stream.errors import DeadLetter, Misconfigured, RetryLater, TrimtabError
from stream.events import Decoder, Event, Label, Prediction, Record, encode, utc_now

P = ParamSpec("P")
R = TypeVar("R")

ANSWER_SECONDS = 60.0
_ASKED = TypeAdapter(list[AskedRequest])


class ClientError(TrimtabError):
    """Base of everything that a client raises; the message says what to do next."""


class Invalid(ClientError):
    """What was given cannot be used: settings, an event, a label, a request, an unknown stream or id."""


class Unreachable(ClientError):
    """Kafka or the learner does not answer for now; ask again, with the same `request_id`."""


class NotAllowed(ClientError):
    """The token is missing or wrong, or the broker refuses us."""


class NotDone(ClientError):
    """The learner refused, and says why.

    Args:
        answer: as it is on the topic `audit`.
    """

    def __init__(self, answer: ControlAnswer) -> None:
        super().__init__(answer.message)
        self.answer = answer


class Client:
    """One deployment, as its settings file names it. A context manager; it holds no connection between two calls.

    Args:
        settings: the settings, or their file; as for the command line where it is left out.
        learner: the learner's address, where it is not the one in the settings.
        token: its bearer token, where it is not the one in the settings.
        who: who asks, for the audit, and whose labels these are; the user's name where it is left out.

    Raises:
        Invalid: the settings.
    """

    def __init__(
        self,
        settings: Settings | Path | str | None = None,
        *,
        learner: str | None = None,
        token: str | None = None,
        who: str | None = None,
    ) -> None:
        with _told():
            if not isinstance(settings, Settings):
                settings = load_settings(None if settings is None else Path(settings))
            self._token = token or settings.learner.http.secret()
        http = settings.learner.http
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(http.host, http.host)
        self._base = (learner or f"http://{host}:{http.port}").rstrip("/")
        if not self._base.startswith(("http://", "https://")):
            raise Invalid(f"learner {self._base!r}: give an address such as http://127.0.0.1:6070")
        self._settings, self._decoder = settings, Decoder(rules(settings))
        self._who = getuser() if who is None else who

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    # Messages

    def publish(self, *events: Event | Mapping[str, Any]) -> int:
        """Send events, all of them or none; returns how many once the broker has them.

        Args:
            events: models or dicts. A dict may leave out `observed_at`, which is then now, and `stream` where there is
                one only.

        Raises:
            Invalid: one would become a dead letter; the message names it by its number, from 1 on.
            Unreachable: the broker did not take them all.
            NotAllowed: it refuses us.
        """
        messages = []
        for number, given in enumerate(events, 1):
            event = self._whole(given) if isinstance(given, Mapping) else given
            value = encode(event) if not isinstance(event, dict) else json.dumps(event, default=str).encode()
            try:
                decoded = self._decoder.event(Record("", 0, number, None, value))
            except DeadLetter as refusal:
                raise Invalid(f"event {number}: {refusal.field}: {refusal.detail}") from None
            messages.append((self._settings.topic_of(decoded.stream), decoded.event_id, value))
        return self._send(messages)

    def label(
        self,
        event_id: str,
        label: str | None,
        *,
        stream: str | None = None,
        labeller: str | None = None,
        labelled_at: datetime | None = None,
        confidence: float | None = None,
    ) -> None:
        """Say what an event was; a later label by the same labeller corrects it, None withdraws it.

        Raises:
            Invalid, Unreachable, NotAllowed: as `publish`.
        """
        told = {
            "event_id": event_id,
            "stream": self._stream(stream),
            "label": label,
            "labeller": labeller or self._who or "default",
            "labelled_at": labelled_at or utc_now(),
            "confidence": confidence,
        }
        try:
            value = encode(Label.model_validate(told))
            self._decoder.label(Record("", 0, 0, None, value))
        except ValidationError as error:
            raise Invalid(first_wrong(error)) from None
        except DeadLetter as refusal:
            raise Invalid(f"{refusal.field}: {refusal.detail}") from None
        self._send([(self._settings.topics.name("labels"), event_id, value)])

    def withdraw(self, event_id: str, *, stream: str | None = None, labeller: str | None = None) -> None:
        """Take this labeller's label of an event back.

        Raises:
            Invalid, Unreachable, NotAllowed: as `publish`.
        """
        self.label(event_id, None, stream=stream, labeller=labeller)

    def predictions(
        self,
        *,
        stream: str | None = None,
        event_id: str | None = None,
        follow: bool = False,
        latest: bool = False,
        limit: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[Prediction]:
        """What was answered, by partition in the order of the log; of one event the first answer and its corrections.

        Args:
            stream: of this stream only; of all where it is left out.
            event_id: of this event only.
            follow: wait for more at the end of the log.
            latest: begin with what comes from now on.
            limit: end after so many.
            stop: asked about five times a second; the end once it is true.

        Raises:
            Unreachable: the broker does not answer.
            NotAllowed: it refuses us, or the topic is missing.
        """
        found = self._predictions(stream, event_id, follow, latest, stop)
        return found if limit is None else islice(found, limit)

    def _predictions(
        self,
        stream: str | None,
        event_id: str | None,
        follow: bool,
        latest: bool,
        stop: Callable[[], bool] | None,
    ) -> Iterator[Prediction]:
        topic = self._settings.topics.name("predictions")
        with _told():
            for record in read(self._settings.kafka, topic, follow=follow, latest=latest, stop=stop):
                try:
                    prediction = self._decoder.prediction(record)
                except DeadLetter:
                    continue
                if stream in (None, prediction.stream) and event_id in (None, prediction.event_id):
                    yield prediction

    # What is asked of the learner

    def retrain(
        self,
        stream: str | None = None,
        *,
        strategy: Strategy | None = None,
        observed_from: datetime | None = None,
        observed_to: datetime | None = None,
        dry_run: bool = False,
        reason: str = "",
        request_id: str | None = None,
    ) -> ControlAnswer:
        """Ask for a fine-tune; `request(answer.id)` tells how it stands.

        Args:
            strategy: in place of the one in the stream's settings.
            observed_from: train only on events that were observed from then on; with a time zone.
            observed_to: and before then.
            dry_run: train nothing; the answer's `plan` says what would be done.
            request_id: a request that is sent again under its id is not done again. One is made where it is left out.

        Raises:
            NotDone: refused, with the reason; a dry run too, where the retrain would be.
            Invalid, Unreachable, NotAllowed: it did not come that far.
        """
        named = {"strategy": strategy, "observed_from": observed_from, "observed_to": observed_to, "dry_run": dry_run}
        return self._act("retrain", stream, reason=reason, id=request_id, **named)

    def promote(
        self,
        version: str,
        stream: str | None = None,
        *,
        force: bool = False,
        reason: str = "",
        request_id: str | None = None,
    ) -> ControlAnswer:
        """Put a version into service; with `force` though it did not pass its exam, which the audit says.

        Raises:
            NotDone, Invalid, Unreachable, NotAllowed: as `retrain`.
        """
        return self._act("promote", stream, version=version, force=force, reason=reason, id=request_id)

    def rollback(
        self,
        version: str | None = None,
        stream: str | None = None,
        *,
        reason: str = "",
        request_id: str | None = None,
    ) -> ControlAnswer:
        """Go back to a version (`v12`), to an exact revision (`v12.3456`), or to the version before.

        Raises:
            NotDone, Invalid, Unreachable, NotAllowed: as `retrain`.
        """
        return self._act("rollback", stream, version=version, reason=reason, id=request_id)

    def pause(self, stream: str | None = None, *, reason: str = "", request_id: str | None = None) -> ControlAnswer:
        """Keep what is served as it is, whatever is learned.

        Raises:
            NotDone, Invalid, Unreachable, NotAllowed: as `retrain`.
        """
        return self._act("pause", stream, reason=reason, id=request_id)

    def resume(self, stream: str | None = None, *, reason: str = "", request_id: str | None = None) -> ControlAnswer:
        """Serve what is learned again.

        Raises:
            NotDone, Invalid, Unreachable, NotAllowed: as `retrain`.
        """
        return self._act("resume", stream, reason=reason, id=request_id)

    def request(self, request_id: str) -> AskedRequest:
        """How a request stands, by whichever way it came.

        Raises:
            Invalid: no such request within seven days.
            Unreachable, NotAllowed: the learner does not answer.
        """
        return AskedRequest.model_validate(self._get(f"requests/{urllib.parse.quote(request_id, safe='')}"))

    def requests(self) -> list[AskedRequest]:
        """The last 100 requests, the newest first.

        Raises:
            Unreachable, NotAllowed: the learner does not answer.
        """
        return _ASKED.validate_python(self._get("requests"))

    def versions(self, stream: str | None = None) -> list[dict[str, Any]]:
        """The versions of a stream with their states and verdicts, as `trimtab versions list --format json` has them.

        Raises:
            Invalid, Unreachable, NotAllowed: as `retrain`.
        """
        found: list[dict[str, Any]] = self._get(f"streams/{self._quoted(stream)}/versions")
        return found

    def status(self, stream: str | None = None) -> dict[str, Any]:
        """What is served, how right it is, what is drifting and what is being trained.

        Raises:
            Invalid, Unreachable, NotAllowed: as `retrain`.
        """
        found: dict[str, Any] = self._get(f"streams/{self._quoted(stream)}")
        return found

    # Ways

    def _stream(self, stream: str | None) -> str:
        names = sorted(self._settings.streams)
        if stream is None and len(names) == 1:
            return names[0]
        if stream not in names:
            said = "say which stream" if stream is None else f"stream {stream!r} is not configured"
            raise Invalid(f"{said} (known: {', '.join(names)})")
        return str(stream)

    def _quoted(self, stream: str | None) -> str:
        return urllib.parse.quote(self._stream(stream), safe="")

    def _whole(self, given: Mapping[str, Any]) -> dict[str, Any]:
        event = {"observed_at": utc_now().isoformat(), **given}
        return event if "stream" in event else {**event, "stream": self._stream(None)}

    def _send(self, messages: Iterable[tuple[str, str, bytes]]) -> int:
        messages = list(messages)
        with _told():
            check_topic(self._settings.kafka, *{topic for topic, _, _ in messages})
            with Publisher(self._settings.kafka) as publisher:
                for topic, event_id, value in messages:
                    publisher.send(topic, event_id.encode(), value)
        return len(messages)

    def _act(self, action: Action, stream: str | None, **fields: Any) -> ControlAnswer:
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            request = ControlRequest(action=action, stream=self._stream(stream), who=self._who, **given)
        except ValidationError as error:
            raise Invalid(first_wrong(error)) from None
        body = request.model_dump_json(exclude={"action", "stream"}).encode()
        status, content = self._call(f"streams/{self._quoted(stream)}/{action}", body)
        if status not in (202, 409):
            raise self._refusal(status, content)
        try:
            answer = ControlAnswer.model_validate_json(content)
        except ValidationError:
            raise self._stranger(content) from None
        if not answer.accepted:
            raise NotDone(answer)
        return answer

    def _get(self, path: str) -> Any:
        status, content = self._call(path, None)
        if status != 200:
            raise self._refusal(status, content)
        try:
            return json.loads(content)
        except ValueError:
            raise self._stranger(content) from None

    def _call(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(f"{self._base}/{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read()
        except OSError as error:
            why = error.reason if isinstance(error, urllib.error.URLError) else error
            raise Unreachable(
                f"no learner answers at {self._base} ({why}): is it running (`trimtab learner`)? Else give "
                "Client(learner=URL)"
            ) from error

    def _refusal(self, status: int, content: bytes) -> ClientError:
        try:
            found = json.loads(content)
            why = str(found["error"])
        except (ValueError, TypeError, KeyError):
            return self._stranger(content)
        said = f"the learner at {self._base} answered {status}: {why}"
        if status in (401, 403):
            return NotAllowed(f"{said}; give Client(token=...), or set learner.http.token_file")
        return Unreachable(f"{said}; ask again") if status >= 500 else Invalid(said)

    def _stranger(self, content: bytes) -> ClientError:
        return Unreachable(f"what answers at {self._base} is no learner: {content[:200]!r}; give Client(learner=URL)")


@contextmanager
def _told() -> Iterator[None]:
    """What the rest of trimtab raises, as a client's user knows it."""
    try:
        yield
    except RetryLater as error:
        raise Unreachable(f"{error}; try again") from error
    except InvalidSettings as error:
        raise Invalid(str(error)) from error
    except Misconfigured as error:
        raise NotAllowed(str(error)) from error


def _awaited(
    method: Callable[Concatenate[Client, P], R],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]]:
    async def call(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.to_thread(method, self._client, *args, **kwargs)

    call.__doc__ = method.__doc__
    return call


class AsyncClient:
    """As `Client`, for code on an event loop; its arguments, errors and answers are the same.

    Args:
        settings, learner, token, who: as `Client`.
    """

    def __init__(
        self,
        settings: Settings | Path | str | None = None,
        *,
        learner: str | None = None,
        token: str | None = None,
        who: str | None = None,
    ) -> None:
        self._client = Client(settings, learner=learner, token=token, who=who)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    publish = _awaited(Client.publish)
    label = _awaited(Client.label)
    withdraw = _awaited(Client.withdraw)
    retrain = _awaited(Client.retrain)
    promote = _awaited(Client.promote)
    rollback = _awaited(Client.rollback)
    pause = _awaited(Client.pause)
    resume = _awaited(Client.resume)
    request = _awaited(Client.request)
    requests = _awaited(Client.requests)
    versions = _awaited(Client.versions)
    status = _awaited(Client.status)

    async def predictions(
        self,
        *,
        stream: str | None = None,
        event_id: str | None = None,
        follow: bool = False,
        latest: bool = False,
        limit: int | None = None,
    ) -> AsyncIterator[Prediction]:
        """As `Client.predictions`; a task that is cancelled ends the reading within a second."""
        ending = threading.Event()
        found = self._client.predictions(
            stream=stream, event_id=event_id, follow=follow, latest=latest, limit=limit, stop=ending.is_set
        )
        pending: asyncio.Future[Prediction | None] | None = None
        try:
            while True:
                pending = asyncio.ensure_future(asyncio.to_thread(next, found, None))
                prediction = await asyncio.shield(pending)
                if prediction is None:
                    return
                yield prediction
        finally:
            ending.set()
            if pending is not None and not pending.done():
                await asyncio.wait([pending])
            await asyncio.to_thread(list, found)
