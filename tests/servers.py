"""Real servers, each started as its users start it: by its command line, in a process of its own, on a free port.

`SERVERS` is the table of them; `Running` is one that runs. Here is no test, and nothing of `bridge` is imported by this
module: the process imports it, in the `application.py` that is written for it as a user would write it.

    python -m tests.servers wsgiref|werkzeug|pywsgi PORT      the servers that their users start from a script
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LIMIT", "SERVERS", "Running", "Server", "read_response", "until"]

ROOT = Path(__file__).parent.parent
LIMIT = 15.0  # seconds in which a server has to do what is waited for
ATTEMPTS = 3  # a free port may be taken by another process before the server binds it


@dataclass(frozen=True)
class Server:
    """One way to run an app.

    Attributes:
        command: What its users type behind `python -m`, with {port}. The app is `application:application`.
        needs: The modules without which it does not run.
        parallel: Whether one process serves many requests at once.
    """

    command: str
    needs: str
    parallel: bool = True

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs.split() if importlib.util.find_spec(name) is None]


APP = "application:application"

SERVERS = {
    # ASGI
    "uvicorn-h11": Server(f"uvicorn --http h11 --loop asyncio --port {{port}} {APP}", "uvicorn h11"),
    "uvicorn-httptools-uvloop": Server(
        f"uvicorn --http httptools --loop uvloop --port {{port}} {APP}", "uvicorn httptools uvloop"
    ),
    "hypercorn-asyncio": Server(f"hypercorn --worker-class asyncio --bind 127.0.0.1:{{port}} {APP}", "hypercorn"),
    "hypercorn-trio": Server(f"hypercorn --worker-class trio --bind 127.0.0.1:{{port}} {APP}", "hypercorn trio"),
    "granian-asgi": Server(f"granian --interface asgi --port {{port}} {APP}", "granian"),
    "daphne": Server(f"daphne --port {{port}} {APP}", "daphne"),
    "gunicorn-asgi": Server(f"gunicorn --worker-class asgi --bind 127.0.0.1:{{port}} {APP}", "gunicorn"),
    # WSGI
    "gunicorn-sync": Server(f"gunicorn --workers 2 --bind 127.0.0.1:{{port}} {APP}", "gunicorn", parallel=False),
    "gunicorn-gthread": Server(f"gunicorn --threads 24 --bind 127.0.0.1:{{port}} {APP}", "gunicorn"),
    "gunicorn-gthread-2-workers": Server(
        f"gunicorn --workers 2 --threads 4 --bind 127.0.0.1:{{port}} {APP}", "gunicorn"
    ),
    # For many long connections at once: each has a thread.
    "gunicorn-gthread-250": Server(
        f"gunicorn --threads 250 --access-logfile - --bind 127.0.0.1:{{port}} {APP}", "gunicorn"
    ),
    "gunicorn-gthread-tls": Server(
        f"gunicorn --threads 24 --certfile tls.crt --keyfile tls.key --bind 127.0.0.1:{{port}} {APP}", "gunicorn"
    ),
    "waitress": Server(f"waitress --listen 127.0.0.1:{{port}} --threads 24 {APP}", "waitress"),
    "cheroot": Server(f"cheroot --bind 127.0.0.1:{{port}} --threads 24 {APP}", "cheroot"),
    "werkzeug": Server("tests.servers werkzeug {port}", "werkzeug"),
    "werkzeug-tls": Server("tests.servers werkzeug-tls {port}", "werkzeug"),
    "wsgiref": Server("tests.servers wsgiref {port}", "wsgiref"),
    "gunicorn-gevent": Server(f"gunicorn --worker-class gevent --bind 127.0.0.1:{{port}} {APP}", "gunicorn gevent"),
    "gevent-pywsgi": Server("gevent.monkey --module tests.servers pywsgi {port}", "gevent"),
    "gevent-pywsgi-unpatched": Server("tests.servers pywsgi {port}", "gevent"),
    "granian-wsgi": Server(f"granian --interface wsgi --blocking-threads 24 --port {{port}} {APP}", "granian"),
}


class Running:
    """A server's process: started when it is made, stopped by `stop` or at the end of its `with`.

    Args:
        server: What to run.
        application: The source of the module that users call asgi.py or wsgi.py; it defines `application`.
        directory: An empty one, for that module, the log, and the board.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        is_stopped: Whether `stop` has been called: a server may also have ended for reasons of its own.
        board: The directory in which the app puts what it tells (`tests.apps.Board`).
    """

    def __init__(self, server: Server, application: str, directory: Path) -> None:
        self.port = 0
        self.board = directory / "board"
        self.board.mkdir()
        self.is_stopped = False
        self._command = server.command
        self._directory = directory
        self._log = directory / "log"
        (directory / "application.py").write_text(application)
        for attempt in range(1, ATTEMPTS + 1):
            self._process = self._start()
            try:
                if self._is_up():
                    return
            except BaseException:
                self._kill()
                raise
            self._kill()
            if "in use" not in self.log() or attempt == ATTEMPTS:
                raise RuntimeError(f"{self._command} did not start within {LIMIT:g} s; its log:\n{self.log()}")

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{self._command}, pid {self.pid}, port {self.port}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self, start: int = 0) -> str:
        """What the process has written, from a byte on that `log_size` told."""
        with self._log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def log_size(self) -> int:
        return self._log.stat().st_size

    def stop(self) -> int:
        """Send SIGTERM, and wait for the end.

        Returns:
            The exit status; minus the signal's number if a signal ended it.

        Raises:
            TimeoutError: It did not end, and was killed.
        """
        self.is_stopped = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self._kill()
            raise TimeoutError(f"{self} did not end within {LIMIT:g} s; its log:\n{self.log()}") from None

    @contextlib.contextmanager
    def connect(self, *, timeout: float = LIMIT) -> Iterator[socket.socket]:
        """A raw connection to it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            yield connection

    def _start(self) -> subprocess.Popen[bytes]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", *shlex.split(self._command.format(port=self.port))]
        environment = os.environ | {
            "BOARD": str(self.board),
            "PYTHONPATH": os.pathsep.join([str(self._directory), str(ROOT)]),
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self._directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its workers too: it leads a session of its own
            self._process.wait()

    def _is_up(self) -> bool:
        for _ in until(LIMIT):
            if self._process.poll() is not None:
                return False
            try:
                with self.connect(timeout=1.0):
                    return True
            except OSError:
                continue
        return False


def until(seconds: float, pause: float = 0.01) -> Iterator[None]:
    """For a condition that is looked at again and again, until a time limit."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)


def read_response(connection: socket.socket, method: str = "GET") -> tuple[int, bytes]:
    """The status and the whole body of a response.

    Raises:
        http.client.HTTPException: It is none, or ends too early.
    """
    with contextlib.closing(HTTPResponse(connection, method=method)) as response:
        response.begin()
        return response.status, response.read()


# The servers that have no command line of their own


def main(name: str, port: int) -> None:
    # As a service does that wants its atexit handlers to run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from application import application  # type: ignore[import-not-found]

    if name.startswith("werkzeug"):
        from werkzeug.serving import run_simple

        certificate = ("tls.crt", "tls.key") if name.endswith("tls") else None
        run_simple("127.0.0.1", port, application, threaded=True, ssl_context=certificate)
    elif name == "pywsgi":
        from gevent.pywsgi import WSGIServer

        WSGIServer(("127.0.0.1", port), application, log=None).serve_forever()
    else:
        run_wsgiref(application, port)


def run_wsgiref(application: Any, port: int) -> None:
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIServer, make_server

    class ThreadingServer(ThreadingMixIn, WSGIServer):
        daemon_threads = True
        request_queue_size = 64

    with make_server("127.0.0.1", port, application, ThreadingServer) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
