"""The console's pages on the learner's HTTP server, and what a browser is told about them.

Everything here is read with GET and changes nothing; what acts is posted to `/streams/STREAM/ACTION` like from the
command line. A page may load only what this server serves, and runs no script that stands in a page: whatever an event,
a label or a dead letter says is text.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol
from urllib.parse import unquote

import mode
from faust.web import View

from deploy.console.query import Missing
from stream.errors import TrimtabError
from stream.service import Shell

logger = logging.getLogger(__name__)

TYPES = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
    "txt": "text/plain",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
NEVER_KEPT = {**HEADERS, "Cache-Control": "no-store"}


class Answers(Protocol):
    """What is asked of `Query`."""

    def state(self) -> dict[str, Any]: ...
    def stream(self, name: str) -> dict[str, Any]: ...
    def version(self, name: str, wanted: str) -> dict[str, Any]: ...
    def unlabelled(self, name: str) -> list[dict[str, Any]]: ...
    def requests(self, name: str) -> dict[str, Any]: ...
    def event(self, name: str, event_id: str) -> dict[str, Any]: ...
    def radius(self, name: str, target: str) -> dict[str, Any]: ...
    def explain(self, name: str, event_id: str) -> dict[str, Any]: ...
    def letters(self, reason: str | None) -> dict[str, Any]: ...
    def letter(self, place: str) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Asset:
    """One file of the page."""

    body: bytes
    packed: bytes
    kind: str
    tag: str


def assets() -> dict[str, Asset]:
    """The page's files by name, as they are installed."""
    found = {}
    for file in (resources.files("deploy.console") / "assets").iterdir():
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            body = file.read_bytes()
            digest = hashlib.sha256(body).hexdigest()[:24]
            found[file.name] = Asset(body, gzip.compress(body, mtime=0), kind, f'"{digest}"')
    return found


class Runs(Protocol):
    """What is asked of `Watcher`."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


def serve(shell: Shell, query: Answers, watcher: Runs) -> None:
    """Add the console's pages to a process, and let the watcher run as long as the process does."""
    files = assets()
    reading = ThreadPoolExecutor(2, thread_name_prefix="console-read")
    # Reads a topic for a second or so: one at a time, and nobody else waits for it.
    counting = ThreadPoolExecutor(1, thread_name_prefix="console-count")

    async def end() -> None:
        await asyncio.get_running_loop().run_in_executor(None, watcher.stop)
        for pool in (reading, counting):
            pool.shutdown(wait=False, cancel_futures=True)

    # First of all, for the learner's parts are closed by what comes after.
    shell.draining.insert(0, end)

    @shell.app.service
    class Watching(mode.Service):  # type: ignore[misc]
        """Keeps what passes by."""

        async def on_start(self) -> None:
            watcher.start()

    async def answer(view: Any, request: Any, work: Callable[[], Any], by: Executor = reading) -> Any:
        loop = asyncio.get_running_loop()
        try:
            return told(shell, view, await loop.run_in_executor(by, work))
        except Missing as error:
            return told(shell, view, {"error": str(error)}, 404)
        except TrimtabError as error:
            return told(shell, view, {"error": str(error)}, 503)
        except Exception:
            logger.exception("the console could not answer %s", request.path)
            return told(shell, view, {"error": "the learner could not answer; its log says why"}, 500)

    @shell.app.page("/")  # type: ignore[untyped-decorator]
    async def root(view: Any, request: Any) -> Any:
        return view.text("", status=302, headers={"Location": "/console/"}, content_type="text/plain")

    @shell.app.page("/console")  # type: ignore[untyped-decorator]
    async def bare(view: Any, request: Any) -> Any:
        return view.text("", status=302, headers={"Location": "/console/"}, content_type="text/plain")

    @shell.app.page("/console/{rest:.*}")  # type: ignore[untyped-decorator]
    class Console(View):  # type: ignore[misc]
        async def get(self, request: Any, rest: str) -> Any:
            foreign = shell.foreign(request) if rest.startswith("api/") else None
            if foreign:
                return told(shell, self, {"error": foreign}, 403)
            match [unquote(part) for part in request.rel_url.raw_path.removeprefix("/console/").split("/")]:
                case ["api", "state"]:
                    return await answer(self, request, query.state)
                case ["api", "stream", name]:
                    return await answer(self, request, lambda: query.stream(name))
                case ["api", "version", name, wanted]:
                    return await answer(self, request, lambda: query.version(name, wanted))
                case ["api", "unlabelled", name]:
                    return await answer(self, request, lambda: query.unlabelled(name))
                case ["api", "requests", name]:
                    return await answer(self, request, lambda: query.requests(name))
                case ["api", "letters"]:
                    reason = request.query.get("reason")
                    return await answer(self, request, lambda: query.letters(reason))
                case ["api", "event" | "explain" | "letter" | "radius", *_] if not shell.authorised(request):
                    # What is in an event, and what costs a topic's reading, is for those only who may act.
                    return told(shell, self, {"error": "the bearer token is missing or wrong"}, 401)
                case ["api", "event", name, event_id]:
                    return await answer(self, request, lambda: query.event(name, event_id))
                case ["api", "explain", name, event_id]:
                    return await answer(self, request, lambda: query.explain(name, event_id))
                case ["api", "radius", name, target]:
                    return await answer(self, request, lambda: query.radius(name, target), counting)
                case ["api", "letter", place]:
                    return await answer(self, request, lambda: query.letter(place))
                case ["api", "who"]:
                    return told(shell, self, {"authorised": shell.authorised(request)})
                case [name]:
                    return file(self, request, files.get(name or "index.html"))
            return told(shell, self, {"error": "there is no such page"}, 404)


def file(view: Any, request: Any, asset: Asset | None) -> Any:
    """A file of the page, or that the browser has it already."""
    if asset is None:
        return view.text("there is no such page", status=404, headers=dict(HEADERS))
    headers = {**HEADERS, "ETag": asset.tag, "Vary": "Accept-Encoding", "Content-Type": f"{asset.kind}; charset=utf-8"}
    if request.headers.get("If-None-Match") == asset.tag:
        return view.bytes(b"", status=304, headers=headers)
    body = asset.body
    if "gzip" in request.headers.get("Accept-Encoding", ""):
        body, headers["Content-Encoding"] = asset.packed, "gzip"
    return view.bytes(body, headers=headers)


def told(shell: Shell, view: Any, body: object, status: int = 200) -> Any:
    """An answer as JSON that nobody keeps."""
    answer = shell.json(view, body, status)
    answer.headers.update(NEVER_KEPT)
    return answer
