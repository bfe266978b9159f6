"""The network to a broker, as something that can be cut and slowed: a TCP proxy in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence

CHUNK = 16_384


class Proxy:
    """Passes bytes on between clients and a port of this machine until it is told otherwise.

    Args:
        port: where clients come to.
        target: where they are passed on to.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port, self.target = port, target
        self._whole = True
        self._delay = 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._listening = threading.Event()

    def start(self) -> Proxy:
        """Listen."""
        self._thread.start()
        assert self._listening.wait(120), f"the proxy does not listen on {self.port}"
        return self

    def cut(self) -> None:
        """Break every connection, as a pulled cable and a reset do, and let none be made."""
        self._whole = False
        self._loop.call_soon_threadsafe(self._break)

    def slow(self, seconds: float) -> None:
        """Keep every piece of at most 16 KiB back for so long, each way."""
        self._delay = seconds

    def heal(self) -> None:
        """Pass on at full speed again."""
        self._whole, self._delay = True, 0.0

    def close(self) -> None:
        """End."""
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", self.port))
        self._listening.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _break(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
        self._open -= {writer, far_writer}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                if self._delay:
                    await asyncio.sleep(self._delay)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


class Network:
    """The proxies before all nodes, which are cut, slowed and healed together."""

    def __init__(self, proxies: Sequence[Proxy]) -> None:
        self._proxies = tuple(proxies)

    @property
    def bootstrap(self) -> str:
        """Where clients come to."""
        return ",".join(f"127.0.0.1:{proxy.port}" for proxy in self._proxies)

    def start(self) -> None:
        for proxy in self._proxies:
            proxy.start()

    def cut(self) -> None:
        for proxy in self._proxies:
            proxy.cut()

    def slow(self, seconds: float) -> None:
        for proxy in self._proxies:
            proxy.slow(seconds)

    def heal(self) -> None:
        for proxy in self._proxies:
            proxy.heal()

    def close(self) -> None:
        """End those that were started."""
        for proxy in self._proxies:
            if proxy._thread.is_alive():
                proxy.close()
