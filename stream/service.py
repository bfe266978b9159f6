"""The shell that both processes share: a Faust app, its web pages, its health and its ordered end.

Order of life::

    create (no I/O) ──▶ wait for its turn, where it has to ──▶ start: web, services, agents ──▶ ready ──▶ serve
    first SIGTERM/SIGINT ──▶ services end in reverse order, work in flight is finished ──▶ exit 0
    second one ──▶ exit at once; what was not committed is repeated by the next process
    an error that leaves a service or an agent ──▶ the same end, exit 1
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import json
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import faust
from aiohttp import web
from faust.app.base import BootStrategy
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from monitoring.metrics import Metrics
from stream.errors import Misconfigured
from stream.kafka import KafkaSettings
from stream.secret import read_secret

logger = logging.getLogger(__name__)

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
MOST_BODY = 64 * 1024
"""Bytes of a request's body: nothing that is asked for is longer."""


class HttpSettings(BaseModel):
    """Where a process answers HTTP."""

    model_config = ConfigDict(extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address to listen on; beyond loopback a token is needed.")
    port: int = Field(default=0, ge=0, le=65535, description="Port to listen on; 0 picks a free one and logs it.")
    token: SecretStr | None = Field(
        default=None, min_length=1, description="Bearer token for control calls; never logged."
    )
    token_file: Path | None = Field(default=None, description="File that holds the token.")
    names: tuple[Annotated[str, Field(min_length=1, max_length=253)], ...] = Field(
        default=(),
        max_length=100,
        description="Names beside loopback's under which browsers reach a loopback address, as through a proxy.",
    )

    def secret(self) -> str | None:
        """The bearer token, from the file when one is named.

        Raises:
            Misconfigured: the file cannot be read or is empty, or the listener is beyond loopback without a token.
        """
        token = self.token.get_secret_value() if self.token else None
        if self.token_file is not None:
            token = read_secret(self.token_file, "http.token_file")
        if not token and self.host not in LOOPBACK:
            raise Misconfigured(
                f"http.host is {self.host!r}, beyond loopback, and no token is set; set http.token_file or listen on "
                "127.0.0.1"
            )
        return token or None


class Health:
    """What keeps a process from being ready, and whether it still moves. Safe from any thread."""

    def __init__(self, *waiting_for: str) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, str] = dict.fromkeys(waiting_for, "starting")
        self.failure: BaseException | None = None

    def ready(self, part: str) -> None:
        """`part` is in order."""
        with self._lock:
            self._waiting.pop(part, None)

    def waiting(self, part: str, why: str) -> None:
        """`part` keeps the process from doing its work, for the reason given."""
        with self._lock:
            self._waiting[part] = why

    @property
    def reasons(self) -> dict[str, str]:
        """Why the process is not ready; empty when it is."""
        with self._lock:
            return dict(self._waiting)


class Shell:
    """One process: a Faust app with pages, health, and one ordered way to end.

    Args:
        name: the Faust app's id, and the consumer group of its small topics.
        kafka: the broker for Faust's own topics, or None where the app has none (no consumer is started then).
        http: where to answer.
        health: what `/readyz` reports.
        metrics: what `/metrics` reports.
    """

    def __init__(
        self, name: str, kafka: KafkaSettings | None, http: HttpSettings, health: Health, metrics: Metrics
    ) -> None:
        self.health, self.metrics, self.http = health, metrics, http
        self.token = http.secret()
        self.port = http.port or free_port(http.host)
        self._check_port()
        self._stopping: asyncio.Event | None = None
        self._exit_code = 0
        self.draining: list[Callable[[], Awaitable[None]]] = []
        self.turn: Callable[[], Awaitable[None]] | None = None
        """Returns once this process may start; until then it reads nothing, and answers only how it is."""

        class Boot(BootStrategy):  # type: ignore[misc]
            enable_kafka = kafka is not None

        class App(faust.App):  # type: ignore[misc]
            BootStrategy = Boot

        connection: dict[str, Any] = {"broker": "kafka://127.0.0.1:1"}
        if kafka is not None:
            connection = {"broker": kafka.faust_url(), "broker_credentials": kafka.faust_credentials()}
        self.app = App(
            name,
            **connection,
            topic_disable_leader=True,
            topic_allow_declare=False,
            web_bind=http.host,
            web_port=self.port,
            web_host=http.host if http.host in LOOPBACK else socket.gethostname(),
            web_in_thread=False,
            datadir=tempfile.gettempdir(),
            autodiscover=False,
            broker_session_timeout=10,
            broker_heartbeat_interval=2,
        )
        self._add_pages()

    def authorised(self, request: Any) -> bool:
        """Whether a control call may act: always on loopback without a token, else by bearer token."""
        if self.token is None:
            return True
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        return hmac.compare_digest(given.encode(), self.token.encode())

    def foreign(self, request: Any) -> str | None:
        """Why a browser's request is not from a page of this very process; None where it may be.

        A token stops a foreign page, which does not know it. On loopback there may be none, and the browser of whoever
        sits there reaches it: from a page of another site (`Origin`, `Sec-Fetch-Site`), or of a name that was made to
        point here after its page was loaded (`Host`).
        """
        host = request.headers.get("Host", "")
        name = (host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]).lower()
        if self.http.host in LOOPBACK and name not in LOOPBACK and name not in self.http.names:
            return f"{name[:100]!r} is no name of this address; add it to http.names if it is meant"
        origin = request.headers.get("Origin")
        # A proxy may have told us another Host than the browser was told; its name is then one of the settings'.
        known = origin is None or origin.partition("://")[2].partition(":")[0] in self.http.names
        if not known and origin not in (f"http://{host}", f"https://{host}"):
            return "the request comes from a page of another site"
        if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return "the request comes from a page of another site"
        return None

    async def body(self, request: Any) -> bytes | None:
        """What a request carries; None where that is more than `MOST_BODY`."""
        read = bytearray()
        async for chunk in request.content.iter_chunked(16 * 1024):
            read += chunk
            if len(read) > MOST_BODY:
                return None
        return bytes(read)

    def json(self, view: Any, body: object, status: int = 200) -> Any:
        """An HTTP answer as JSON."""
        return view.text(json.dumps(body, default=str), content_type="application/json", status=status)

    def fail(self, error: BaseException) -> None:
        """End the process with a non-zero code: going on would break a promise."""
        logger.critical("ending: %s", error, exc_info=error)
        self.health.failure = error
        self._exit_code = 1
        if self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    def run(self) -> int:
        """Start, serve until a signal or a failure, end in order; returns the exit code."""
        settle_collector()
        return asyncio.run(self._serve())

    async def _serve(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)
        if self.health.failure is None and await self._its_turn():
            try:
                await self.app.start()
                if not self.app.boot_strategy.enable_kafka:
                    # Faust's channels stay closed until its Kafka consumer has an assignment; here there is none.
                    self.app.flow_control.resume()
            except Exception as error:
                self.fail(error)
        logger.info("serving on http://%s:%d", self.http.host, self.port)
        await self._stopping.wait()
        self.health.waiting("shutdown", "ending")
        for drain in self.draining:
            try:
                with contextlib.suppress(asyncio.CancelledError):
                    await drain()
            except Exception as error:
                # The steps after it must still be taken, or their threads would keep the process alive for ever.
                self.fail(error)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.app.stop(), timeout=20)
        return self._exit_code

    async def _its_turn(self) -> bool:
        """Wait for it, and say so to whoever asks; False where the process is told to end, or fails, meanwhile."""
        assert self._stopping is not None
        if self.turn is None:
            return True
        waiting, ending = asyncio.ensure_future(self.turn()), asyncio.ensure_future(self._stopping.wait())
        runner: web.AppRunner | None = None
        try:
            await asyncio.wait({waiting, ending}, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done() and not ending.done():
                runner = await self._answer_meanwhile()
                await asyncio.wait({waiting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                return False
            waiting.result()
        except Exception as error:
            self.fail(error)
            return False
        finally:
            waiting.cancel()
            ending.cancel()
            if runner is not None:
                await runner.cleanup()
        return not self._stopping.is_set()

    async def _answer_meanwhile(self) -> web.AppRunner:
        """The pages of a process that is not started: Faust's own would come with its consumer."""

        async def answer(request: web.Request) -> web.Response:
            if request.path == "/metrics":
                body, content_type = self.metrics.render()
                return web.Response(body=body, headers={"Content-Type": content_type})
            found, status = {"/livez": self._alive, "/readyz": self._ready}.get(request.path, self._starting)()
            return web.json_response(found, status=status, dumps=lambda body: json.dumps(body, default=str))

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, self.http.host, self.port).start()
        logger.info("waiting on http://%s:%d", self.http.host, self.port)
        return runner

    def _alive(self) -> tuple[object, int]:
        failure = self.health.failure
        return {"alive": failure is None, "failure": failure}, 200 if failure is None else 503

    def _ready(self) -> tuple[object, int]:
        reasons = self.health.reasons
        return {"ready": not reasons, "waiting_for": reasons}, 503 if reasons else 200

    def _starting(self) -> tuple[object, int]:
        return {"error": "starting", "waiting_for": self.health.reasons}, 503

    def _on_signal(self, number: signal.Signals) -> None:
        assert self._stopping is not None
        if self._stopping.is_set():
            logger.warning("second %s: ending at once", number.name)
            os._exit(128 + number)
        logger.info("%s: finishing what is in flight", number.name)
        self._stopping.set()

    def _check_port(self) -> None:
        with socket.socket(socket.AF_INET6 if ":" in self.http.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.http.host, self.port))
            except OSError as error:
                raise Misconfigured(
                    f"http: cannot listen on {self.http.host}:{self.port} ({error.strerror}); choose another port"
                ) from error

    def _add_pages(self) -> None:
        shell = self

        @self.app.page("/metrics")  # type: ignore[untyped-decorator]
        async def metrics(view: Any, request: Any) -> Any:
            foreign = shell.foreign(request)
            if foreign:
                return shell.json(view, {"error": foreign}, 403)
            body, content_type = shell.metrics.render()
            return view.bytes(body, content_type=content_type.partition(";")[0])

        @self.app.page("/livez")  # type: ignore[untyped-decorator]
        async def livez(view: Any, request: Any) -> Any:
            return shell.json(view, *shell._alive())

        @self.app.page("/readyz")  # type: ignore[untyped-decorator]
        async def readyz(view: Any, request: Any) -> Any:
            return shell.json(view, *shell._ready())


def settle_collector() -> None:
    """Have Python's garbage collector leave alone what was imported, and look seldom at the rest.

    What was imported stays for good, so it need not be walked after each few hundred events, and a batch of events is
    let go as a whole. Otherwise a quarter of an answer's time, its model apart, and half of a join's went into looking.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
