"""What people may ask of the learner, and how such a request proves where it comes from.

The same request comes by the `control` topic, by HTTP and from the command line. On the topic it carries
an HMAC of its bytes in the header `trimtab-signature`, unless the settings say that the topic is protected
by the broker's access control. A request that is old, was seen before or does not prove itself is refused.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, Self
from uuid import uuid4

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)

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


RequestId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,100}$")]
LetterPlace = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}:[0-9]{1,18}$")]


class Refused(TrimtabError):
    """The request is not carried out; the message says why."""


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
    issued_at: AwareDatetime = Field(default_factory=utc_now)

    @property
    def digest(self) -> str:
        """The same for a request that is sent again, another one where something else is asked."""
        asked = self.model_dump_json(exclude={"id", "issued_at"})
        return hashlib.sha256(asked.encode()).hexdigest()

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        texts = (self.stream, self.label, self.old, self.new, self.reason, self.who, *self.event_ids)
        held = self.held and (self.held.labeller, self.held.label, self.held.reason)
        if any("\x00" in text for text in (*texts, *(held or ())) if text):
            raise ValueError(NUL)
        if self.action in ("release", "drop") and self.held is None:
            raise ValueError(f"{self.action} needs held, which says which labels")
        if self.action in ("rename", "merge") and not (self.old and self.new):
            raise ValueError(f"{self.action} needs old and new")
        if self.action == "label" and not (self.event_ids and self.label):
            raise ValueError("label needs event_ids and label")
        if self.action == "replay" and not self.letters:
            raise ValueError("replay needs letters, which says which dead letters")
        return self


class ControlAnswer(BaseModel):
    """What became of a request; it goes to the `audit` topic and to whoever asked.

    Args:
        action: the request's, or `reissue` where predictions were corrected.
        corrected: for reissue: by the version that had made them, how many predictions.
        cleaned: for forget: every place that something was taken from.
        not_reached: for forget: every place that may still hold something, and until when.
    """

    id: str
    action: str
    stream: str
    accepted: bool
    message: str
    cleaned: tuple[str, ...] = ()
    not_reached: tuple[str, ...] = ()
    corrected: dict[str, int] = Field(default_factory=dict)
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
            Refused: it is malformed, not signed, too old, or was seen before.
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
            first = error.errors(include_url=False)[0]
            raise Refused(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if abs((now or datetime.now(UTC)) - request.issued_at) > FRESH:
            raise Refused(f"issued at {request.issued_at.isoformat()}, over {FRESH.seconds // 60} minutes from now")
        if request.id in self._seen:
            raise Refused(f"request {request.id} was taken before")
        self._seen[request.id] = None
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return request
