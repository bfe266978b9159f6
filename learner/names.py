"""Class names that are too alike to be meant as two.

Pure. Two names are alike when they differ in case, spaces and punctuation only, or by one edit: a letter too
many, another letter, or two neighbours changed round (Damerau 1964). One edit is not counted in short names,
in digits and in words of one letter, because `G1` and `G2` are two classes, and `camera a` and `camera b` as well.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

SHORT = 4
"""A name of fewer characters is alike only by case, space or punctuation."""
SHOWN = 1_000
"""Pairs found at most; who has so many has another trouble."""
SHARING = 50
"""Names compared of those that share a form, so that invented names by the thousand cost no more than others."""

_MARKS = re.compile(r"\d+|\b[^\W\d_]\b")


class Alike(NamedTuple):
    """Two names, in sorted order, and what alone tells them apart."""

    one: str
    other: str
    why: str


def alike(names: Iterable[str]) -> list[Alike]:
    """The pairs of names that are alike, sorted; at most `SHOWN`.

    Every name is cut to the forms with one character less, and names that share a form and their marks are
    compared (Garbe's symmetric deletes), so the time grows with the characters of all names and not with their pairs.
    """
    forms: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        plain = _plain(name)
        forms[plain, ()].append(name)
        if len(plain) >= SHORT:
            for cut in {plain, *(plain[:at] + plain[at + 1 :] for at in range(len(plain)))}:
                forms[cut, ("", *_marks(name))].append(name)
    found: set[Alike] = set()
    for sharing in (names[:SHARING] for names in forms.values() if len(names) > 1):
        for at, one in enumerate(sharing):
            for other in sharing[at + 1 :]:
                if len(found) >= SHOWN:
                    return sorted(found)
                why = why_alike(one, other)
                if why is not None:
                    found.add(Alike(min(one, other), max(one, other), why))
    return sorted(found)


def why_alike(one: str, other: str) -> str | None:
    """What alone tells two names apart: `case or space`, or `one edit`; None where they are two names."""
    a, b = _plain(one), _plain(other)
    if a == b:
        return "case or space"
    if min(len(a), len(b)) < SHORT or _marks(one) != _marks(other):
        return None
    return "one edit" if _one_edit(a, b) else None


def _plain(name: str) -> str:
    """A name without case, spaces and punctuation; one that is nothing else stays as it is."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(character for character in folded if character.isalnum()) or folded


def _marks(name: str) -> tuple[str, ...]:
    """Numbers and words of one letter: what tells the members of a series apart."""
    return tuple(_MARKS.findall(unicodedata.normalize("NFKC", name).casefold()))


def _one_edit(a: str, b: str) -> bool:
    if len(a) > len(b):
        a, b = b, a
    if len(b) - len(a) > 1:
        return False
    at = next((at for at in range(len(a)) if a[at] != b[at]), len(a))
    if len(a) < len(b):
        return a[at:] == b[at + 1 :]
    swapped = a[at : at + 2] == b[at : at + 2][::-1]
    return a[at + 1 :] == b[at + 1 :] or (swapped and a[at + 2 :] == b[at + 2 :])
