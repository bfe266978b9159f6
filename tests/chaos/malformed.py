"""Messages that no producer should send: valid ones that were broken, by a seed, in every way that was thought of."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stream.events import Headers, StreamRules

Message = tuple[bytes | None, bytes | None, Headers]
"""Key, value and headers, as they lie in Kafka."""

RULES = (StreamRules("notes", "text"), StreamRules("probe", "telemetry", channels=("a", "b"), max_steps=64))

VALID: dict[str, tuple[dict[str, Any], ...]] = {
    "event": (
        {
            "schema_version": "1.0",
            "event_id": "r-1",
            "stream": "notes",
            "source": "test",
            "observed_at": "2026-01-02T03:04:05Z",
            "text": "the pump is louder than it was",
        },
        {
            "event_id": "w-1",
            "stream": "probe",
            "observed_at": "2026-01-02T03:04:05+02:00",
            "channels": ["a", "b"],
            "values": [[1, 2.5, None], [3e-9, -4, 1e300]],
        },
    ),
    "label": (
        {
            "event_id": "r-1",
            "stream": "notes",
            "label": "Übergang",
            "labeller": "ops",
            "labelled_at": "2026-01-02T03:04:05Z",
            "confidence": 0.75,
        },
        {"event_id": "w-1", "stream": "probe", "label": None, "labelled_at": "2026-01-02T03:04:05Z"},
    ),
    "prediction": (
        {
            "event_id": "r-1",
            "stream": "notes",
            "label": "Übergang",
            "probabilities": {"Übergang": 0.75, "calm": 0.25},
            "novelty": 0.5,
            "model_version": "v1.2",
            "ref": {"topic": "reports", "partition": 0, "offset": 7},
            "observed_at": "2026-01-02T03:04:05Z",
            "predicted_at": "2026-01-02T03:04:06Z",
        },
        {
            "event_id": "w-1",
            "stream": "probe",
            "label": None,
            "probabilities": {},
            "novelty": 1.0,
            "model_version": "v0.0",
            "ref": {"topic": "telemetry", "partition": 3, "offset": 2**40},
            "observed_at": "2026-01-02T03:04:05+02:00",
            "predicted_at": "2026-01-02T03:04:06Z",
        },
    ),
    "control": (
        {"action": "retrain", "stream": "probe", "who": "ops", "reason": "by hand"},
        {"action": "rollback", "stream": "probe", "version": "v3.17"},
        {"action": "release", "stream": "probe", "held": {"labeller": "ops"}},
    ),
}

STRANGE: Sequence[Any] = (
    None, True, False, 0, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -1e308, 5e-324, float("nan"),
    float("inf"), "", " ", "\0", "a\0b", "bad topic!", "..", "x" * 201,
    "x" * 20_001, "\u202e", "\ud800", "\U000e0001", "NaN", "1e999", "null",
    [], [[]], {}, {"": {}}, [[1], [1, 2]], [[None] * 65] * 2, [["1"]], ["a", "a"], "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00", "2026-01-02T03:04:05", "2026-02-30T00:00:00Z", "yesterday", 1e18, "2.0", "1.99", "v0",
)  # fmt: skip


def messages(kind: str, count: int, seed: int) -> Iterator[Message]:
    """So many broken messages; about one in twelve is whole, so that good ones must get through between them.

    Args:
        kind: `event`, `label`, `prediction` or `control`.
    """
    chance = random.Random(seed)
    for _ in range(count):
        fields = dict(chance.choice(VALID[kind]))
        value: bytes | None = _dump(fields)
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            if value is not None:
                value = chance.choice(_BREAKS)(value, chance)
        yield _key(chance), value, _headers(chance)


def _dump(fields: Any) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode(errors="surrogatepass")


def _load(value: bytes) -> dict[str, Any]:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _strange_field(value: bytes, chance: random.Random) -> bytes:
    fields = _load(value)
    name = chance.choice([*fields, "extra", "text", "values", "schema_version"])
    return _dump({**fields, name: chance.choice(STRANGE)})


def _strange_element(value: bytes, chance: random.Random) -> bytes:
    fields = _load(value)
    within = chance.choice(("ref", "probabilities")) if isinstance(fields.get("ref"), dict) else ""
    if isinstance(fields.get(within), dict):
        name = chance.choice([*fields[within], "extra", "a\0b"])
        return _dump({**fields, within: {**fields[within], name: chance.choice(STRANGE)}})
    rows = fields.get("values")
    if not (isinstance(rows, list) and rows and isinstance(rows[0], list) and rows[0]):
        return _strange_field(value, chance)
    changed = [list(row) if isinstance(row, list) else row for row in rows]
    changed[0][chance.randrange(len(changed[0]))] = chance.choice(STRANGE)
    return _dump({**fields, "values": changed})


def _without_a_field(value: bytes, chance: random.Random) -> bytes:
    fields = _load(value)
    if fields:
        del fields[chance.choice(list(fields))]
    return _dump(fields)


def _twice_a_field(value: bytes, chance: random.Random) -> bytes:
    fields = _load(value)
    if not fields:
        return value
    name = chance.choice(list(fields))
    return b"{" + json.dumps(name).encode() + b":" + _dump(chance.choice(STRANGE)) + b"," + value.lstrip()[1:]


def _flipped(value: bytes, chance: random.Random) -> bytes:
    changed = bytearray(value)
    for _ in range(chance.randint(1, 8)):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(value: bytes, chance: random.Random) -> bytes:
    return value[: chance.randrange(len(value) + 1)]


def _spliced(value: bytes, chance: random.Random) -> bytes:
    at, start = chance.randrange(len(value) + 1), chance.randrange(len(value) + 1)
    return value[:at] + value[start : start + chance.randrange(64)] + value[at:]


def _deep(value: bytes, chance: random.Random) -> bytes:
    depth = chance.choice((50, 199, 201, 1_000, 20_000))
    nest = b"[" * depth + b"]" * depth if chance.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
    return chance.choice((nest, nest[: len(nest) // 2], b'{"event_id":"d","extra":' + nest + b"," + value.lstrip()[1:]))


def _huge_number(value: bytes, chance: random.Random) -> bytes:
    digits = chance.choice((b"9" * 5_000, b"1e999", b"-1e-999", b"0." + b"3" * 3_000, b"1" + b"0" * 400 + b".5"))
    return b'{"confidence":' + digits + b',"values":[[' + digits + b"]]," + value.lstrip()[1:]


def _encoded(value: bytes, chance: random.Random) -> bytes:
    text = value.decode(errors="replace")
    return chance.choice(
        (
            text.encode("utf-16"),
            text.encode("utf-32"),
            text.encode("latin-1", errors="replace"),
            b"\xef\xbb\xbf" + value,
            value.replace(b"e", b"\xc0\xa5"),
            value.replace(b"o", b"\xed\xa0\x80"),
            text.encode("utf-7"),
        )
    )


def _compressed(value: bytes, chance: random.Random) -> bytes:
    return chance.choice((gzip.compress(value), zlib.compress(value), BOMB))


def _long(value: bytes, chance: random.Random) -> bytes:
    fields = _load(value)
    size = chance.choice((201, 20_001, 60_000))
    name = chance.choice(["text", "source", "event_id", "label", "labeller", "unit", "reason"])
    return _dump({**fields, name: chance.choice("xé\n") * size})


def _many(value: bytes, chance: random.Random) -> bytes:
    return _dump({**_load(value), **{f"field-{n}": n for n in range(chance.choice((10, 2_000)))}})


def _other(value: bytes, chance: random.Random) -> bytes:
    return chance.choice(
        (b"", b"null", b"[]", b"{}", b'""', b"0", b"\0", b"{}{}", b"[" + value + b"]", value + value, value + b"\n,",
         chance.randbytes(chance.randrange(200)), b"// a comment\n" + value, value.replace(b'"', b"'"))
    )  # fmt: skip


BOMB = zlib.compress(b"0" * 50_000_000, 9)
"""50 MB in 49 kB. Nothing unpacks it: a value is JSON or it is a dead letter."""

_BREAKS: Sequence[Callable[[bytes, random.Random], bytes]] = (
    _strange_field, _strange_field, _strange_element, _without_a_field, _twice_a_field, _flipped, _flipped, _cut,
    _spliced, _deep, _huge_number, _encoded, _compressed, _long, _many, _other,
)  # fmt: skip


def _key(chance: random.Random) -> bytes | None:
    return chance.choice((b"r-1", b"w-1", None, b"", b"\xff\xfe", b"\0" * 10, chance.randbytes(300)))


def _headers(chance: random.Random) -> Headers:
    return chance.choice(
        (
            (),
            (("traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("ce_id", b"\xff\xff")),
            (("", b""), ("ce_type", b"x" * 3_000)),
            (("trimtab-reason", b"forged"), ("trimtab-reason", b"twice")),
            tuple((f"header-{n}", b"v") for n in range(60)),
            (("naïve", chance.randbytes(40)),),
        )
    )
