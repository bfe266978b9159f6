"""The public face of trimtab for a user's own code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.client import AsyncClient, Client, ClientError, Invalid, NotAllowed, NotDone, Unreachable

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "ClientError", "Invalid", "NotAllowed", "NotDone", "Unreachable"]


def __getattr__(name: str) -> Any:
    # Only who asks for the client waits for all that it needs.
    if name in __all__:
        import trimtab.client

        return getattr(trimtab.client, name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
