"""What people may ask of the learner, and how such a request proves where it comes from.

The same request comes by the `control` topic, by HTTP and from the command line. On the topic it carries
an HMAC of its bytes in the header `trimtab-signature`, unless the settings say that the topic is protected
by the broker's access control. A request that is old, was seen before or does not prove itself is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from uuid import uuid4

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from learner.finetune import Plan, Retrain, Strategy
from stream.errors import TrimtabError
from stream.events import NUL, EventId, utc_now
from stream.secret import read_secret

SIGNATURE = "trimtab-signature"
FRESH = timedelta(minutes=5)
REMEMBERED = 10_000

Action = Literal[
    "retrain",
    "promote",
    "rollback",
    "pause",
    "resume",
    "forget",
    "label",
    "release",
    "drop",
    "rename",
    "merge",
    "replay",
]


@dataclass(frozen=True)
class Takes:
    """What an action is told, beside the fields that each may have (`COMMON`).

    Args:
        says: what it does, in a sentence.
        needs: fields without which it is refused.
        may: fields that it takes besides; any other is refused.
    """

    says: str
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


COMMON = ("id", "who", "reason", "issued_at")
ACTIONS: Mapping[Action, Takes] = {
    "retrain": Takes(
        "Fine-tune the stream now, or after the fine-tune that is running; or say what that would be.",
        may=("strategy", "observed_from", "observed_to", "dry_run"),
    ),
    "promote": Takes("Put a version into service.", needs=("version",), may=("seen", "force")),
    "rollback": Takes(
        "Go back to a version, to an exact revision, or, where none is named, to the version before.",
        may=("version", "seen"),
    ),
    "pause": Takes("Keep serving the present revision; labels are stored."),
    "resume": Takes("Serve what is learned again."),
    "forget": Takes("Forget events for good.", needs=("event_ids",)),
    "label": Takes("Say what events are.", needs=("event_ids", "label")),
    "release": Takes("Learn labels from quarantine after all.", needs=("held",)),
    "drop": Takes("Delete labels from quarantine.", needs=("held",)),
    "rename": Takes("Give a class another name.", needs=("old", "new")),
    "merge": Takes("Make one class of two, for good.", needs=("old", "new")),
    "replay": Takes("Send dead letters again.", needs=("letters",)),
}
"""The one declaration of what can be asked: by the topic, by HTTP and on the command line."""

RequestId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,100}$")]
LetterPlace = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}:[0-9]{1,18}$")]
_ID: TypeAdapter[str] = TypeAdapter(RequestId)
_TEXT: TypeAdapter[str] = TypeAdapter(str)


class Refused(TrimtabError):
    """The request is not carried out; the message says why."""


class Malformed(Refused):
    """The message comes from someone who may ask, and is no request.

    Args:
        value: the message. Its `id`, `action`, `stream`, `who` and `reason` are kept where they can be; else the id is
            made of its bytes, and the others are empty.
    """

    def __init__(self, message: str, value: bytes) -> None:
        super().__init__(message)
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = None
        given: Mapping[str, Any] = found if isinstance(found, dict) else {}
        try:
            self.id = _ID.validate_python(given.get("id"))
        except ValidationError:
            self.id = hashlib.sha256(value).hexdigest()[:32]
        self.action, self.stream = _kept(given.get("action"), 20), _kept(given.get("stream"), 100)
        self.who, self.reason = _kept(given.get("who"), 200), _kept(given.get("reason"), 1_000)


def _kept(value: object, most: int) -> str:
    """The value where it is a text that a database and a topic can hold."""
    try:
        text = _TEXT.validate_python(value, strict=True)
    except ValidationError:
        return ""
    return text if len(text) <= most and "\x00" not in text else ""


class ControlSettings(BaseModel):
    """How messages on the `control` topic prove themselves."""

    model_config = ConfigDict(extra="forbid")

    secret: SecretStr | None = Field(default=None, min_length=1, description="Shared secret of the HMAC; never logged.")
    secret_file: Path | None = Field(default=None, description="File that holds the secret.")
    protected_by_acls: bool = Field(
        default=False, description="True where the broker's access control alone decides who may write to the topic."
    )

    def key(self) -> bytes | None:
        """The secret, from the file when one is named.

        Raises:
            Misconfigured: the file cannot be read or is empty.
        """
        if self.secret_file is not None:
            return read_secret(self.secret_file, "control.secret_file").encode()
        return self.secret.get_secret_value().encode() if self.secret else None


class HeldLabels(BaseModel):
    """Which labels in quarantine a request means: those that fit everything that is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ids: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(default=(), max_length=500)
    labeller: str | None = Field(default=None, min_length=1, max_length=200)
    label: str | None = Field(default=None, min_length=1, max_length=128)
    reason: str | None = Field(default=None, min_length=1, max_length=100)
    all: bool = False

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if self.all == bool(self.ids or self.labeller or self.label or self.reason):
            raise ValueError("say which labels: ids, labeller, label or reason, or all of them")
        return self


class ControlRequest(BaseModel):
    """One thing asked of the learner.

    Args:
        id: what the request is asked about by; one that was taken under the same id is not done a second time.
        action: `retrain`, `promote` a version, `rollback` to a version or a revision, `pause` or `resume` learning,
            `forget` events, `label` events, `release` labels from quarantine or `drop` them, `rename` a class or
            `merge` it into another, `replay` dead letters.
        stream: which stream; for replay whichever the dead letters name.
        version: for promote and rollback: `v12`, or `v12.3456` for an exact revision.
        seen: for promote and rollback: what was in service when it was asked; refused where another version is by now.
        event_ids: for forget and label.
        label: for label: what the events are.
        letters: for replay: places on the topic of dead letters, `PARTITION:OFFSET`.
        held: for release and drop.
        old: for rename and merge: the name that goes.
        new: for rename and merge: the name that stands for it.
        reason: why, for the audit.
        who: who asks, for the audit.
        force: promote a version that did not pass its exam; the audit says so.
        strategy: for retrain: instead of the one in the stream's settings.
        observed_from: for retrain: train only on events that were observed from then on.
        observed_to: for retrain: and before then.
        dry_run: for retrain: train nothing, and say what would be done.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: RequestId = Field(default_factory=lambda: uuid4().hex)
    action: Action
    stream: str = Field(min_length=1, max_length=100)
    version: str | None = Field(default=None, pattern=r"^v[0-9]{1,9}(\.[0-9]{1,12})?$")
    seen: str | None = Field(default=None, pattern=r"^v[0-9]{1,9}(\.[0-9]{1,12})?$")
    event_ids: tuple[EventId, ...] = Field(default=(), max_length=40)
    label: str | None = Field(default=None, max_length=500)
    letters: tuple[LetterPlace, ...] = Field(default=(), max_length=100)
    held: HeldLabels | None = None
    old: str | None = Field(default=None, max_length=500)
    new: str | None = Field(default=None, max_length=500)
    reason: str = Field(default="", max_length=1000)
    who: str = Field(default="", max_length=200)
    force: bool = False
    strategy: Strategy | None = None
    observed_from: AwareDatetime | None = None
    observed_to: AwareDatetime | None = None
    dry_run: bool = False
    issued_at: AwareDatetime = Field(default_factory=utc_now)

    @property
    def digest(self) -> str:
        """The same for a request that is sent again, another one where something else is asked."""
        asked = self.model_dump_json(exclude={"id", "issued_at"}, exclude_defaults=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    @property
    def named(self) -> Retrain:
        """For retrain: what it names."""
        return Retrain(strategy=self.strategy, observed_from=self.observed_from, observed_to=self.observed_to)

    @field_validator("observed_to")
    @classmethod
    def _after_its_start(cls, end: datetime | None, info: ValidationInfo) -> datetime | None:
        start = info.data.get("observed_from")
        if start is not None and end is not None and end <= start:
            raise ValueError(f"{end.isoformat()} is not after observed_from, {start.isoformat()}")
        return end

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        texts = (self.stream, self.label, self.old, self.new, self.reason, self.who, *self.event_ids)
        held = self.held and (self.held.labeller, self.held.label, self.held.reason)
        if any("\x00" in text for text in (*texts, *(held or ())) if text):
            raise ValueError(NUL)
        takes = ACTIONS[self.action]
        given = {name for name in type(self).model_fields if getattr(self, name)}
        if missing := [name for name in takes.needs if name not in given]:
            raise ValueError(f"{self.action} needs {' and '.join(missing)}")
        known = ("action", "stream", *COMMON, *takes.needs, *takes.may)
        if strange := sorted(given.difference(known)):
            told = ", ".join((*takes.needs, *takes.may)) or "nothing"
            what = ", ".join(strange)
            raise ValueError(f"{self.action} does not take {what}; beside who, reason and id it takes {told}")
        return self


class ControlAnswer(BaseModel):
    """What became of a request; it goes to the `audit` topic and to whoever asked.

    Args:
        action: the request's, or `reissue` where predictions were corrected.
        corrected: for reissue: by the version that had made them, how many predictions.
        cleaned: for forget: every place that something was taken from.
        not_reached: for forget: every place that may still hold something, and until when.
        retrain: for retrain: what was named, where anything was.
        plan: for a dry run: what would be done.
    """

    id: str
    action: str
    stream: str
    accepted: bool
    message: str
    cleaned: tuple[str, ...] = ()
    not_reached: tuple[str, ...] = ()
    corrected: dict[str, int] = Field(default_factory=dict)
    retrain: Retrain | None = None
    plan: Plan | None = None
    who: str = ""
    reason: str = ""
    at: AwareDatetime = Field(default_factory=utc_now)


class AskedRequest(BaseModel):
    """How a request stands.

    Args:
        state: `accepted` (it waits to be done), `running`, `done` or `refused`.
        message: what became of it, or why it was refused.
        run: for retrain: the fine-tune that it became, and `run_state` as `trimtab versions` calls it.
        at: when the learner took it.
    """

    id: str
    action: str
    stream: str
    state: Literal["accepted", "running", "done", "refused"]
    message: str
    who: str = ""
    reason: str = ""
    run: int | None = None
    run_state: str | None = None
    at: AwareDatetime


def first_wrong(error: ValidationError) -> str:
    """What is wrong with a request, in one line: the field, and what is allowed."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    what = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def sign(value: bytes, key: bytes) -> bytes:
    """The signature header's value for a message."""
    return hmac.new(key, value, hashlib.sha256).hexdigest().encode()


class Gate:
    """Lets a request on the topic through once, if it is signed and fresh."""

    def __init__(self, settings: ControlSettings) -> None:
        self._key = settings.key()
        self._open = settings.protected_by_acls
        self._seen: OrderedDict[str, None] = OrderedDict()

    def admit(self, value: bytes, headers: Mapping[str, bytes], now: datetime | None = None) -> ControlRequest:
        """The request that a message of the topic carries.

        Raises:
            Malformed: it is signed and no request.
            Refused: it is not signed, too old, or was seen before.
        """
        if not self._open:
            if self._key is None:
                raise Refused(
                    "the control topic takes no requests: set control.secret_file, or control.protected_by_acls where "
                    "the broker decides who may write"
                )
            if not hmac.compare_digest(sign(value, self._key), headers.get(SIGNATURE, b"")):
                raise Refused(f"the header {SIGNATURE} is missing or does not fit the message")
        if len(value) > 10_000:
            raise Refused(f"{len(value)} bytes, at most 10000 are taken")
        try:
            request = ControlRequest.model_validate_json(value)
        except ValidationError as error:
            raise Malformed(first_wrong(error), value) from None
        if abs((now or datetime.now(UTC)) - request.issued_at) > FRESH:
            raise Refused(f"issued at {request.issued_at.isoformat()}, over {FRESH.seconds // 60} minutes from now")
        if request.id in self._seen:
            raise Refused(f"request {request.id} was taken before")
        self._seen[request.id] = None
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return request
