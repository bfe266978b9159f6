"""The console's address before there is a learner: it says what is starting, and then leads to the console."""

from __future__ import annotations

import html
import socket
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="refresh" content="1"><title>trimtab is starting</title>
</head><body><main><h1>trimtab is starting</h1><p role="status">{says}</p>
<p>This page leads to the console as soon as it answers.</p></main></body></html>
"""


class Front:
    """A small server on loopback, as a context manager.

    Args:
        port: where the learner is going to answer.
    """

    def __init__(self, port: int) -> None:
        self.says = "starting"
        front = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if _answers(port):
                    self.send_response(302)
                    self.send_header("Location", f"http://{HOST}:{port}/console/")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = PAGE.format(says=html.escape(front.says)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Nobody wants to read of it."""

        self._server = ThreadingHTTPServer((HOST, 0), Answer)
        self._server.daemon_threads = True
        self.url = f"http://{HOST}:{self._server.server_address[1]}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="console-front", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def desktop() -> bool:
    """Whether someone sits at this very machine, so that a browser with a window may be opened for them."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    # Without a display the module falls back to browsers in the terminal, which would take it over.
    return sys.stdout.isatty() and type(browser) is not webbrowser.GenericBrowser


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((HOST, port)) == 0
