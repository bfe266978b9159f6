"""A secret out of the file that the settings name."""

from __future__ import annotations

from pathlib import Path

from stream.errors import Misconfigured


def read_secret(file: Path, setting: str) -> str:
    """What the file holds, without the white space around it.

    An empty file is what a mount that failed, or a secret that was never written, leaves behind. Taken as no secret, it
    would let everybody in.

    Args:
        setting: the key that names the file, for the error.

    Raises:
        Misconfigured: the file cannot be read, is not UTF-8 text, or is empty.
    """
    try:
        found = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise Misconfigured(f"{setting} {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise Misconfigured(f"{setting} {file}: it is not UTF-8 text") from None
    if not found:
        raise Misconfigured(f"{setting} {file}: it is empty")
    return found
