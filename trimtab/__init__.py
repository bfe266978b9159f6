"""The public face of trimtab for a user's own code."""

from __future__ import annotations

__version__ = "0.1.0"
