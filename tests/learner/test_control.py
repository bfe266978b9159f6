"""The gate of the control topic: whoever can write to the topic must not thereby rule the model."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from learner.control import FRESH, SIGNATURE, ControlRequest, ControlSettings, Gate, Refused, sign
from stream.events import encode, utc_now

KEY = b"a shared secret"


def gate(**settings: object) -> Gate:
    return Gate(ControlSettings.model_validate(settings or {"secret": KEY.decode()}))


def signed(value: bytes, key: bytes = KEY) -> dict[str, bytes]:
    return {SIGNATURE: sign(value, key)}


def test_a_signed_fresh_request_is_admitted_once() -> None:
    """A message that is captured and sent again must not act a second time."""
    door, value = gate(), encode(ControlRequest(action="retrain", stream="notes"))
    assert door.admit(value, signed(value)).action == "retrain"
    with pytest.raises(Refused, match="taken before"):
        door.admit(value, signed(value))


@pytest.mark.parametrize("headers", [{}, {SIGNATURE: b""}, {SIGNATURE: b"0" * 64}])
def test_without_the_right_signature_nothing_is_admitted(headers: dict[str, bytes]) -> None:
    """The signature is the only thing that tells a colleague from a stranger."""
    value = encode(ControlRequest(action="rollback", stream="notes"))
    with pytest.raises(Refused, match=SIGNATURE):
        gate().admit(value, headers)
    with pytest.raises(Refused, match=SIGNATURE):
        gate().admit(value, signed(value, b"another secret"))


def test_a_changed_message_does_not_fit_its_signature() -> None:
    """Whoever can alter bytes on the way must not turn a pause into a promotion."""
    value = encode(ControlRequest(action="pause", stream="notes"))
    with pytest.raises(Refused, match=SIGNATURE):
        gate().admit(value.replace(b"pause", b"resume"), signed(value))


@pytest.mark.parametrize("off", [FRESH + timedelta(seconds=5), -FRESH - timedelta(seconds=5)])
def test_an_old_or_future_request_is_refused(off: timedelta) -> None:
    """The memory of seen ids is bounded, so age must close the door behind it."""
    value = encode(ControlRequest(action="retrain", stream="notes", issued_at=utc_now() - off))
    with pytest.raises(Refused, match="minutes"):
        gate().admit(value, signed(value))


def test_without_a_secret_the_topic_takes_nothing_unless_it_is_said_to_be_protected() -> None:
    """The safe thing must be what happens when nobody thought about it."""
    value = encode(ControlRequest(action="retrain", stream="notes"))
    with pytest.raises(Refused, match="takes no requests"):
        Gate(ControlSettings()).admit(value, {})
    assert gate(protected_by_acls=True).admit(value, {}).stream == "notes"


@pytest.mark.parametrize(
    "value", [b"", b"[]", b"{", b'{"action": "erase", "stream": "x"}', b'{"action": "retrain"}', b"x" * 20_000]
)
def test_what_is_no_request_is_refused_in_words(value: bytes) -> None:
    """A person who mistypes a request must learn what was wrong with it."""
    with pytest.raises(Refused) as refusal:
        gate(protected_by_acls=True).admit(value, {})
    assert str(refusal.value)


def test_the_secret_may_lie_in_a_file(tmp_path: Path) -> None:
    """Secrets in files are how orchestrators hand them over."""
    file = tmp_path / "secret"
    file.write_bytes(KEY + b"\n")
    value = encode(ControlRequest(action="retrain", stream="notes"))
    assert gate(secret_file=str(file)).admit(value, signed(value))


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "label", "event_ids": ["e1"]},
        {"action": "label", "label": "power"},
        {"action": "replay"},
        {"action": "replay", "letters": ["../2"]},
        {"action": "replay", "letters": ["0:1"] * 101},
        {"action": "rollback", "seen": "the last one"},
    ],
)
def test_a_request_that_does_not_say_what_it_means_is_refused(fields: dict[str, object]) -> None:
    """Half a request must not be carried out by a guess."""
    with pytest.raises(ValueError, match=r"needs|pattern|at most"):
        ControlRequest.model_validate({"stream": "notes", **fields})
