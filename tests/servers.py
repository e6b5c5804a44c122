"""Real servers, each started as its users start it: by its command line, in a process of its own, on a free port.

`SERVERS` is the table of them; `Running` is one that runs. Here is no test, and nothing of `bridge` is imported by this
module: the process imports it, in the `application.py` that is written for it as a user would write it.

    python -m tests.servers NAME ADDRESS      those servers that their users start from a script
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

__all__ = ["LIMIT", "MOUNT", "SERVERS", "Running", "Server", "read_response", "trusting", "until"]

ROOT = Path(__file__).parent.parent
LIMIT = 15.0  # seconds in which a server has to do what is waited for
ATTEMPTS = 3  # a free port may be taken by another process before the server binds it
MOUNT = "/mounted"
APACHES = re.compile(r"^(?:\[[^\]\n]*\] ){3,}", re.MULTILINE)  # what stands before each line of its log


@dataclass(frozen=True)
class Server:
    """One way to run an app.

    Attributes:
        command: What its users type. {directory} is where it runs. One with a {port} is whole, without what follows.
        needs: The modules and programs without which it does not run.
        port: What they add for a {port} of 127.0.0.1.
        unix: What they add for a unix socket at {path}; empty if it has none.
        app: What they add last: the application object of application.py.
        mounted: What they add, or put in place of `app`, to have the app below MOUNT; empty if it has nothing for that.
        is_stripped: Whether it expects a proxy that takes MOUNT off the path, and puts it there again.
        tls: Whether it speaks TLS, with a certificate and its key at {directory}/cert.pem and key.pem.
        behind: The proxy's configuration, if this is a server behind nginx.
        below: The first CPython that it does not get along with, if there is one.
    """

    command: str
    needs: str
    port: str = "--port {port}"
    unix: str = ""
    app: str = "application:application"
    mounted: str = ""
    is_stripped: bool = False
    tls: bool = False
    behind: str = ""
    below: tuple[int, int] | None = None

    @property
    def missing(self) -> list[str]:
        missing = [name for name in self.needs.split() if not importlib.util.find_spec(name) and not program(name)]
        if self.below and sys.version_info >= self.below:
            missing.append("a CPython below {}.{}".format(*self.below))
        return missing

    def command_line(self, *, mounted: bool, **names: object) -> list[str]:
        bind = self.unix if "path" in names else self.port
        words = [self.command, bind]
        if mounted and self.mounted:
            words += [self.mounted] if "application" in self.mounted else [self.mounted, self.app]
        else:
            words.append(self.app)
        if "{port}" in self.command:
            words = [self.command]
        first, *rest = shlex.split(" ".join(words).format(**names))
        # To look for a module in a package means to import the package: gevent is for other processes.
        if importlib.util.find_spec(first.partition(".")[0]) and first != "mod_wsgi-express":
            return [sys.executable, "-m", first, *rest]
        return [*as_a_user_that_reads_all(first), str(program(first)), *rest]


def program(name: str) -> str | None:
    """Where it is: beside this Python, or else where programs are. Administrators' programs are among them."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin")


def as_a_user_that_reads_all(name: str) -> list[str]:
    """Apache does not serve as root. Another user may not get at this Python, nor at root's files."""
    if name != "mod_wsgi-express" or os.geteuid() != 0:
        return []
    capability = "+dac_override"
    user = ["--reuid=www-data", "--regid=www-data", "--clear-groups"]
    return ["setpriv", *user, f"--inh-caps={capability}", f"--ambient-caps={capability}"]


def gunicorn(options: str, needs: str = "gunicorn", **more: Any) -> Server:
    more = {"mounted": f"--env SCRIPT_NAME={MOUNT}"} | more
    port, unix = "--bind 127.0.0.1:{port}", "--bind unix:{path}"
    return Server(f"gunicorn {options}", needs, port=port, unix=unix, **more)


def uvicorn(options: str, needs: str) -> Server:
    mounted = f"--root-path {MOUNT}"
    return Server(f"uvicorn {options}", f"uvicorn {needs}", unix="--uds {path}", mounted=mounted, is_stripped=True)


def hypercorn(options: str, needs: str, **more: Any) -> Server:
    port, unix = "--bind 127.0.0.1:{port}", "--bind unix:{path}"
    mounted = f"--root-path {MOUNT}"
    return Server(f"hypercorn {options}", f"hypercorn {needs}", port=port, unix=unix, mounted=mounted, **more)


def granian(options: str, **more: Any) -> Server:
    return Server(f"granian {options}", "granian", unix="--uds {path}", mounted=f"--url-path-prefix {MOUNT}", **more)


def uwsgi(options: str) -> Server:
    # Without --die-on-term, SIGTERM reloads. It closes each connection, but does not say so.
    command = f"uwsgi --master --die-on-term --need-app --disable-logging --add-header 'Connection: close' {options}"
    port, unix = "--http-socket 127.0.0.1:{port}", "--http-socket {path}"
    mounted = f"--mount {MOUNT}=application:application --manage-script-name"
    return Server(command, "uwsgi", port=port, unix=unix, app="--module application:application", mounted=mounted)


def mod_wsgi(options: str) -> Server:
    command = (
        "mod_wsgi-express start-server --server-root {directory}/apache --log-to-terminal --startup-log "
        "--locale C.UTF-8 --limit-request-body 0 --host 127.0.0.1"
    )
    app = "--application-type module application"
    return Server(f"{command} {options}", "mod_wsgi-express apache2", app=app, mounted=f"--mount-point {MOUNT} {app}")


def script(name: str, needs: str, unix: str = "") -> Server:
    return Server(f"tests.servers {name}", needs, port="127.0.0.1:{port}", unix=unix, app="")


def nginx(behind: str) -> Server:
    """What its users write into `location`, before gunicorn on the TCP port or the unix socket {upstream}."""
    return gunicorn("--threads 24", "gunicorn nginx", behind=behind)


TLS = "--certfile {directory}/cert.pem --keyfile {directory}/key.pem"

SERVERS = {
    # ASGI
    "uvicorn-h11": uvicorn("--http h11 --loop asyncio", "h11"),
    "uvicorn-httptools-uvloop": uvicorn("--http httptools --loop uvloop", "httptools uvloop"),
    "uvicorn-2-workers": uvicorn("--workers 2", ""),
    "hypercorn-asyncio": hypercorn("--worker-class asyncio", ""),
    "hypercorn-trio": hypercorn("--worker-class trio", "trio"),
    "hypercorn-http2": hypercorn(f"--worker-class asyncio {TLS}", "h2 trustme", tls=True),
    "hypercorn-2-workers": hypercorn("--workers 2", ""),
    "daphne": Server("daphne", "daphne", unix="-u {path}", mounted=f"--root-path {MOUNT}"),
    # In asyncio's debug mode granian 2.8 loses wake-ups on CPython 3.15: an app of its own kind hangs there at once.
    "granian-asgi": granian("--interface asgi", below=(3, 15)),
    "granian-asgi-2-workers": granian("--interface asgi --workers 2"),
    "gunicorn-asgi": gunicorn("--worker-class asgi", mounted=f"--root-path {MOUNT}"),
    "gunicorn-asgi-2-workers": gunicorn("--worker-class asgi --workers 2"),
    "gunicorn-uvicorn-worker": gunicorn(
        "--worker-class uvicorn_worker.UvicornWorker", "gunicorn uvicorn_worker", mounted=""
    ),
    "gunicorn-uvicorn-worker-2-workers": gunicorn(
        "--worker-class uvicorn_worker.UvicornWorker --workers 2", "gunicorn uvicorn_worker"
    ),
    # WSGI
    "gunicorn-sync": gunicorn("--workers 4"),
    "gunicorn-gthread": gunicorn("--threads 24"),
    "gunicorn-gthread-2-workers": gunicorn("--workers 2 --threads 4"),
    "gunicorn-preload": gunicorn("--preload --workers 2 --threads 24"),
    "gunicorn-gevent": gunicorn("--worker-class gevent", "gunicorn gevent"),
    "gunicorn-http2": gunicorn(f"--threads 24 --http-protocols h2,h1 {TLS}", "gunicorn h2 trustme", tls=True),
    "uwsgi-threads": uwsgi("--enable-threads --threads 24"),
    "uwsgi-processes": uwsgi("--processes 2"),
    "uwsgi-lazy-apps": uwsgi("--processes 2 --lazy-apps"),
    "mod_wsgi": mod_wsgi("--threads 24"),
    "mod_wsgi-2-processes": mod_wsgi("--processes 2 --threads 4"),
    "waitress": Server(
        "waitress --threads 24 --channel-request-lookahead 1",
        "waitress",
        port="--listen 127.0.0.1:{port}",
        unix="--unix-socket {path}",
        mounted=f"--url-prefix {MOUNT}",
    ),
    "cheroot": Server(
        "cheroot --threads 24 --request-queue-size 64",
        "cheroot",
        port="--bind 127.0.0.1:{port}",
        unix="--bind {path}",
    ),
    "werkzeug": script("werkzeug", "werkzeug", unix="unix://{path}"),
    "wsgiref": script("wsgiref", "wsgiref"),
    "gevent-pywsgi": Server(
        "gevent.monkey --module tests.servers pywsgi",
        "gevent",
        port="127.0.0.1:{port}",
        unix="unix://{path}",
        app="",
    ),
    "gevent-pywsgi-unpatched": script("pywsgi", "gevent"),
    "django-runserver": script("runserver", "django"),
    "granian-wsgi": granian("--interface wsgi --blocking-threads 24"),
    "granian-wsgi-2-workers": granian("--interface wsgi --workers 2 --blocking-threads 4"),
    # WSGI, behind a proxy. As it comes, nginx holds back requests until they are whole, and responses in part.
    "nginx-gunicorn-tcp": nginx("proxy_pass http://127.0.0.1:{upstream};"),
    "nginx-gunicorn-tcp-streaming": nginx(
        "proxy_pass http://127.0.0.1:{upstream}; proxy_http_version 1.1; "
        "proxy_request_buffering off; proxy_buffering off;"
    ),
    "nginx-gunicorn-unix": nginx("proxy_pass http://unix:{upstream};"),
    "nginx-gunicorn-unix-streaming": nginx(
        "proxy_pass http://unix:{upstream}; proxy_http_version 1.1; proxy_request_buffering off; proxy_buffering off;"
    ),
    # For many long connections at once: each has a thread.
    "gunicorn-gthread-250": gunicorn("--threads 250 --access-logfile -"),
    "gunicorn-gthread-tls": gunicorn("--threads 24 --certfile tls.crt --keyfile tls.key"),
    "werkzeug-tls": script("werkzeug-tls", "werkzeug"),
    "gevent-pywsgi-tls": script("pywsgi-tls", "gevent"),
}

NGINX = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr warn;
{user}
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_max_body_size 0;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            {location}
        }}
    }}
}}
"""


class Running:
    """A server's process: started when it is made, stopped by `stop` or at the end of its `with`.

    Args:
        server: What to run.
        application: The source of the module that users call asgi.py or wsgi.py; it defines `application`.
        directory: An empty one, for that module, the log, and the board.
        unix: On a unix socket, not on a port.
        mounted: Below MOUNT, by what the server has for it.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        path: Or else the unix socket.
        is_stopped: Whether it was told to end: a server may also have ended for reasons of its own.
        board: The directory in which the app puts what it tells (`tests.apps.Board`).
    """

    def __init__(
        self, server: Server, application: str, directory: Path, *, unix: bool = False, mounted: bool = False
    ) -> None:
        self.port = 0
        self.path = directory / "socket" if unix else None
        self.board = directory / "board"
        self.board.mkdir()
        self.is_stopped = False
        self._server = server
        self._mounted = mounted
        self._command: list[str] = []
        self._directory = directory
        self._log = directory / "log"
        self._proxy: Proxy | None = None
        (directory / "application.py").write_text(application)
        if server.tls:
            make_certificate(directory)
        for attempt in range(1, ATTEMPTS + 1):
            self._process = self._start()
            try:
                if self._is_up():
                    break
            except BaseException:
                self._kill()
                raise
            self._kill()
            if "in use" not in self.log() or attempt == ATTEMPTS:
                raise RuntimeError(f"{self} did not start within {LIMIT:g} s; its log:\n{self.log()}")
        if server.behind:
            try:
                self._proxy = Proxy(server.behind, self._address, directory)
            except BaseException:
                self._kill()
                raise
            self.port = self._proxy.port

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{shlex.join(self._command)}, pid {self.pid}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return f"{'https' if self._server.tls else 'http'}://127.0.0.1:{self.port}"

    def log(self, start: int = 0) -> str:
        """What the process has written, from a byte on that `log_size` told."""
        with self._log.open("rb") as file:
            file.seek(start)
            return APACHES.sub("", file.read().decode(errors="replace"))

    def log_size(self) -> int:
        return self._log.stat().st_size

    def terminate(self) -> None:
        """Send SIGTERM, once, and do not wait."""
        if not self.is_stopped and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self.is_stopped = True

    def stop(self) -> int:
        """Send SIGTERM, if that has not been done, and wait for the end.

        Returns:
            The exit status; minus the signal's number if a signal ended it.

        Raises:
            TimeoutError: It did not end, and was killed.
        """
        self.terminate()
        try:
            return self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            log = self.log()
            self._kill()
            raise TimeoutError(f"{self} did not end within {LIMIT:g} s; its log:\n{log}") from None
        finally:
            if self._proxy is not None:
                self._proxy.stop()

    @contextlib.contextmanager
    def connect(self, *, timeout: float = LIMIT, protocol: str = "http/1.1") -> Iterator[socket.socket]:
        """A raw connection to it."""
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(connected(self.path or self.port, timeout))
            if self._server.tls:
                context = trusting()
                context.set_alpn_protocols([protocol])
                connection = stack.enter_context(context.wrap_socket(connection, server_hostname="127.0.0.1"))
            yield connection

    @property
    def _address(self) -> Path | int:
        """Of the server itself, where a proxy is before it."""
        if "unix:" in self._server.behind:
            return self._directory / "upstream"
        return self.path or self.port

    def _start(self) -> subprocess.Popen[bytes]:
        self.port = free_port()
        names: dict[str, object] = {"directory": self._directory, "port": self.port}
        if isinstance(self._address, Path):
            names["path"] = self._address
        self._command = self._server.command_line(mounted=self._mounted, **names)
        environment = os.environ | {
            "BOARD": str(self.board),
            "PYTHONPATH": os.pathsep.join([str(self._directory), str(ROOT)]),
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }
        return start(self._command, self._directory, self._log, environment)

    def _kill(self) -> None:
        kill(self._process)

    def _is_up(self) -> bool:
        return is_up(self._process, self._address)


class Proxy:
    """nginx before a server."""

    def __init__(self, location: str, upstream: Path | int, directory: Path) -> None:
        self.port = free_port()
        # Its workers would not get at a socket of root's otherwise.
        user = "user root;" if os.geteuid() == 0 else ""
        location = location.format(upstream=upstream)
        configuration = directory / "nginx.conf"
        configuration.write_text(NGINX.format(directory=directory, port=self.port, user=user, location=location))
        log = directory / "nginx.log"
        command = [str(program("nginx")), "-e", "stderr", "-p", str(directory), "-c", str(configuration)]
        self._process = start(command, directory, log, dict(os.environ))
        try:
            if not is_up(self._process, self.port):
                raise RuntimeError(f"nginx did not start; its log:\n{log.read_text()}")
        except BaseException:
            kill(self._process)
            raise

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)  # let it hand over what it holds
        try:
            self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            kill(self._process)
            raise TimeoutError(f"nginx did not end within {LIMIT:g} s") from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(command: list[str], directory: Path, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers too, left behind or not: it leads a session of its own
    process.wait()


def is_up(process: subprocess.Popen[bytes], address: Path | int) -> bool:
    for _ in until(LIMIT):
        if process.poll() is not None:
            return False
        try:
            with connected(address, 1.0):
                return True
        except OSError:
            continue
    return False


@contextlib.contextmanager
def connected(address: Path | int, timeout: float) -> Iterator[socket.socket]:
    if isinstance(address, int):
        with socket.create_connection(("127.0.0.1", address), timeout) as connection:
            yield connection
    else:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(address))
            yield connection


@functools.cache
def authority() -> Any:
    import trustme

    return trustme.CA()


def make_certificate(directory: Path) -> None:
    certificate = authority().issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(directory / "cert.pem", append=True)


def trusting() -> ssl.SSLContext:
    """What a client of a server with such a certificate needs."""
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context


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


def main(name: str, address: str) -> None:
    # As a service does that wants its atexit handlers to run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from application import application  # type: ignore[import-not-found]

    SCRIPTS[name](application, address)


def run_werkzeug(application: Any, address: str, certificate: tuple[str, str] | None = None) -> None:
    from werkzeug.serving import run_simple

    host, _, port = address.rpartition(":") if not address.startswith("unix:") else (address, "", "0")
    run_simple(host, int(port), application, threaded=True, ssl_context=certificate)


def run_werkzeug_with_tls(application: Any, address: str) -> None:
    run_werkzeug(application, address, ("tls.crt", "tls.key"))


def run_wsgiref(application: Any, address: str) -> None:
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIServer, make_server

    class ThreadingServer(ThreadingMixIn, WSGIServer):
        daemon_threads = True
        request_queue_size = 64

    host, _, port = address.rpartition(":")
    with make_server(host, int(port), application, ThreadingServer) as server:
        server.serve_forever()


def run_runserver(application: Any, address: str) -> None:
    """What `manage.py runserver --noreload` does, with a setting that names the app."""
    import django
    from django.conf import settings
    from django.core.management import call_command

    if not settings.configured:  # another's app, then
        settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="of the tests")
        django.setup()
    settings.WSGI_APPLICATION = "application.application"
    settings.DEBUG = True
    call_command("runserver", address, use_reloader=False, skip_checks=True)


def run_pywsgi(application: Any, address: str, **tls: str) -> None:
    from gevent.pywsgi import WSGIServer

    listener: Any = address
    if address.startswith("unix://"):  # of which gevent makes no listener by itself
        from gevent import socket

        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address.removeprefix("unix://"))
        listener.listen()
    WSGIServer(listener, application, log=None, **tls).serve_forever()


def run_pywsgi_with_tls(application: Any, address: str) -> None:
    run_pywsgi(application, address, certfile="tls.crt", keyfile="tls.key")


SCRIPTS = {
    "werkzeug": run_werkzeug,
    "werkzeug-tls": run_werkzeug_with_tls,
    "wsgiref": run_wsgiref,
    "runserver": run_runserver,
    "pywsgi": run_pywsgi,
    "pywsgi-tls": run_pywsgi_with_tls,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
