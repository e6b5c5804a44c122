"""`python -m bridge module:app` serves an app on the other kind of server; without an app it runs the demo.

Here live the command line, finding an app and its kind, and the two small servers. What the user has to put right is
said in one sentence on stderr, exit status 2, below the traceback of the user's own code where that has failed. A
traceback of ours is a bug.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from socketserver import ThreadingMixIn
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from bridge import AsgiToWsgi, BridgeError, LifespanFailure, WsgiToAsgi
from bridge.errors import words_of
from bridge.kinds import USUAL_NAMES, Kind, describe, kind_of, possible_kinds, what_is_wrong

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from asgiref.typing import ASGI3Application

__all__ = ["CommandError", "load_app", "main", "tell_kind"]

DEMO_EXTRA = 'pip install "wsgi-asgi-bridge[demo]"'

# What the demo imports beyond bridge itself.
DEMO_MODULES = ("fastapi", "flask", "httpx", "python_multipart", "uvicorn")

# Seconds that requests in flight are given to end on a stop; endless streams are cut after it.
GRACE = 3.0

# Connections that may wait for accept(): the standard library's 5 makes a burst of clients wait for a whole second.
BACKLOG = 256


APP_HELP = "the app, by its module and its name there"


class CommandError(BridgeError):
    """Raised for what the user of the command line has to put right; its cause, if any, is an error of their code."""


def say(text: str) -> None:
    sys.stderr.write(f"python -m bridge: {text}\n")  # in one piece: many workers may speak at once


class Address(NamedTuple):
    """Where to listen. Port 0 is any free port."""

    host: str
    port: int


# --- Which kind is it? --------------------------------------------------------------------------------------------


def tell_kind(app: object) -> Kind:
    """Tell whether `app` is a WSGI or an ASGI app, without calling it.

    Raises:
        CommandError: It is neither, or may be both with nothing to tell which is meant.
    """
    kind = kind_of(app)
    if kind is not None:
        return kind
    if possible_kinds(app):
        raise CommandError(f"cannot tell whether {describe(app)} is a WSGI or an ASGI app; say --wsgi or --asgi")
    wrong, meant = what_is_wrong(app)
    raise CommandError(f"{describe(app)} is no app: it {wrong}{f'; name {meant}' if meant else ''}{factory_hint(app)}")


def settle_kind(target: str, app: object, said: Kind | None) -> Kind:
    """Tell the kind of an app of which the user may have said it.

    Raises:
        CommandError: It cannot be what was said; or see `tell_kind`.
    """
    kinds = possible_kinds(app)
    if said is None or not kinds:
        return tell_kind(app)
    if said not in kinds:
        (kind,) = kinds
        article, option = ("a", "--asgi") if kind is Kind.WSGI else ("an", "--wsgi")
        raise CommandError(f"{target} is {article} {kind.value} app, {describe(app)}: leave {option} out")
    return said


def factory_hint(app: object) -> str:
    if inspect.iscoroutinefunction(app):
        return ""  # a factory is called, and not awaited
    return ", or add --factory to have it called" if callable(app) and takes_nothing(app) else ""


def takes_nothing(app: Callable[..., object]) -> bool:
    """Whether `app` can be called without arguments; True where Python does not know."""
    try:
        inspect.signature(app, follow_wrapped=False).bind()
    except TypeError:
        return False
    except ValueError:  # a callable written in C, without a signature
        return True
    return True


# --- Finding the app ----------------------------------------------------------------------------------------------


def load_app(target: str, *, factory: bool = False) -> object:
    """Import what `target`, "module:name", names; with `factory` call it, and give back what it made.

    Raises:
        CommandError: The target cannot be read, imported, found or made.
    """
    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise CommandError(f"expected module:app, got {target!r}{hint_for(target)}")
    if module_name.endswith(".py") or "/" in module_name or os.sep in module_name:
        raise CommandError(f"expected a module's name before the colon, got {module_name!r}{hint_for(target)}")
    if module_name.startswith("."):
        whole = f"{module_name.strip('.') or 'module'}:{path}"
        raise CommandError(f"expected a module's whole name, got {module_name!r}; is it {whole}?")
    found: object = import_module(module_name)
    done = module_name
    for name in path.split("."):
        with errors_told(f"{done}.{name} cannot be had"):  # it may be a property
            try:
                found = getattr(found, name)
            except AttributeError:
                raise CommandError(f"{done} has no {name!r}{alternatives(found, name)}") from None
        done += f".{name}"
    return make_app(target, found) if factory else found


def import_module(name: str) -> ModuleType:
    with errors_told(f"{name} cannot be imported"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as exc:
            if exc.name is None or not f"{name}.".startswith(f"{exc.name}."):
                raise
            raise CommandError(f"there is no module {exc.name!r} in {os.getcwd()} or on Python's path") from None


def make_app(target: str, factory: object) -> object:
    if not callable(factory):
        raise CommandError(f"{target} is no factory: it cannot be called")
    if not takes_nothing(factory):
        signature = inspect.signature(factory, follow_wrapped=False)
        raise CommandError(
            f"{target} is no factory: it has to be called without arguments, its signature is {signature}"
        )
    if inspect.iscoroutinefunction(factory):
        raise CommandError(f"{target} is no factory: it is async, so that to call it makes a coroutine")
    with errors_told(f"{target} made no app"):
        return factory()


@contextlib.contextmanager
def errors_told(words: str) -> Generator[None]:
    """Tell what the user's code raises: whatever it is, SystemExit or a panic of Rust's, it is the user's to put right.

    Raises:
        CommandError: It has raised something.
    """
    try:
        yield
    except (CommandError, KeyboardInterrupt):
        raise
    except BaseException as exc:
        raise CommandError(f"{words}: {told(exc)}") from exc


def told(exc: BaseException) -> str:
    """Tell an error of the user's code in one line: class, message and place, the last frame it went through."""
    if isinstance(exc, SyntaxError):
        return f"{type(exc).__name__}: {exc.msg} ({exc.filename}, line {exc.lineno})"
    frames = users_frames(traceback.extract_tb(exc.__traceback__))
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(exc).__name__}: {words_of(exc)}{place}"


def told_whole(exc: BaseException) -> str:
    """Tell an error of the user's code with its traceback, and those of errors behind it; without frames of ours."""
    whole = traceback.TracebackException.from_exception(exc)
    waiting: list[traceback.TracebackException | None] = [whole]
    while waiting:
        part = waiting.pop()
        if part is not None:
            part.stack[:] = users_frames(part.stack)
            waiting += [part.__cause__, part.__context__, *(part.exceptions or ())]
    # Of a module that Python cannot read there are none: then its line is shown.
    return "".join(whole.format() if whole.stack else whole.format_exception_only())


def users_frames(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Take out the frames of the import machinery, and of this package."""
    return [frame for frame in frames if not frame.filename.startswith(NOT_THE_USERS)]


NOT_THE_USERS = ("<frozen importlib", importlib.__file__, str(Path(__file__).parent) + os.sep)


def hint_for(target: str) -> str:
    file, _, name = target.partition(":")
    if not file:
        return ""
    directory, base = os.path.split(file.removesuffix(".py").removeprefix("./"))
    if os.path.isabs(file) or ".." in directory.split("/"):  # no module's name begins where it lies
        return f"; is it {base}:{name or 'app'}, run in {directory}?"
    module = os.path.join(directory, base).strip("/").replace("/", ".").replace(os.sep, ".")
    return f"; is it {module}:{name or 'app'}?"


def alternatives(owner: object, name: str) -> str:
    """What else the user may have meant: a name spelled alike, else one that apps often have."""
    names = [other for other in vars(owner) if not other.startswith("_")] if hasattr(owner, "__dict__") else []
    close = difflib.get_close_matches(name, names, n=1)
    usual = [other for other in USUAL_NAMES if other in names]
    meant = close or usual
    return f"; did you mean {meant[0]!r}?" if meant else ""


# --- Serving ------------------------------------------------------------------------------------------------------


def listen(address: Address) -> socket.socket:
    """Open the listening socket here, for both servers: so that errors read alike, and port 0 can be told."""
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except socket.gaierror as exc:  # its numbers are not errno's
        raise CommandError(f"cannot listen on {shown(address)}: {exc.strerror}") from None
    except UnicodeError:  # of the codec that Python has for names of hosts: an empty label, or a long one
        raise CommandError(f"cannot listen on {shown(address)}: no host can have this name") from None
    except OSError as exc:
        raise CommandError(f"cannot listen on {shown(address)}: {os.strerror(exc.errno or 0)}") from None


def shown(address: Address) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"


def announce(service: Service, kind: Kind) -> None:
    # One line, the address last: the demo reads it.
    address = Address(*service.listener.getsockname()[:2])
    how = "WSGI, through WsgiToAsgi on uvicorn" if kind is Kind.WSGI else "ASGI, through AsgiToWsgi on wsgiref"
    print(f"Serving {service.target} ({how}) on http://{shown(address)}", flush=True)


class Service(NamedTuple):
    """What is to be served, and how."""

    target: str
    listener: socket.socket
    threads: int | None
    announces: bool
    """Whether to say where it serves. Of many workers none does."""


def serve_wsgi_app(app: WSGIApplication, service: Service) -> int:
    """Serve a WSGI app on uvicorn until SIGINT or SIGTERM; the exit status."""
    held.set()  # until uvicorn's own handlers are there: see startup()
    import uvicorn

    class Server(uvicorn.Server):
        """Says where it serves once the app has started, and hangs up on streams that outlast their time of grace."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            held.clear()
            if interrupted.is_set():
                self.should_exit = True
                return
            await super().startup(sockets)
            if self.started and service.announces:
                announce(service, Kind.WSGI)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # By itself uvicorn cancels such requests and logs a traceback for each. A client that leaves ends quietly.
            timer = asyncio.get_running_loop().call_later(GRACE, self.hang_up)
            try:
                await super().shutdown(sockets)
            finally:
                timer.cancel()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # By itself uvicorn would end at once on a second one, without the lifespan's shutdown, and log a traceback.
            if self.should_exit:
                asyncio.get_running_loop().call_soon_threadsafe(self.hang_up)  # a signal comes in the loop's thread
                return
            super().handle_exit(sig, frame)

        def hang_up(self) -> None:
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    threads = service.threads
    application = WsgiToAsgi(app) if threads is None else WsgiToAsgi(app, threads=threads)
    # No websockets: a WSGI app has none.
    config = uvicorn.Config(
        application,
        log_level="warning",
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=int(GRACE) + 1,
    )
    server = Server(config)
    try:
        server.run(sockets=[service.listener])
    except KeyboardInterrupt:
        pass  # uvicorn stops by itself, and raises the signal again when it has
    finally:
        held.clear()
        if not server.started:  # else the lifespan's shutdown has done it, and waited for an app that does not return
            application.close()
    if interrupted.is_set() and not server.started:
        raise KeyboardInterrupt
    return 0 if server.started else 1


def serve_asgi_app(app: ASGI3Application, service: Service) -> int:
    """Serve an ASGI app on the standard library's WSGI server until SIGINT or SIGTERM; the exit status."""
    application = AsgiToWsgi(app, loop_factory=make_loop)
    try:
        with ThreadedWSGIServer(service.listener, application, service.threads) as server:
            application.startup()
            try:
                if interrupted.is_set():  # within the app's startup, which may have caught it
                    raise KeyboardInterrupt
                if service.announces:
                    announce(service, Kind.ASGI)
                server.serve_forever()
            except KeyboardInterrupt:
                server.drain()
    except LifespanFailure as exc:
        say(f"{service.target} did not start: {exc}")
        return 1
    finally:
        application.close()
    return 0


def make_loop() -> asyncio.AbstractEventLoop:
    """Make an event loop; an interrupt comes after it, since of half a loop Python would write a traceback."""
    if threading.current_thread() is not threading.main_thread():
        return asyncio.new_event_loop()
    stops = interrupted.is_set()  # then what is left to do may need a loop
    held.set()
    try:
        loop = asyncio.new_event_loop()
    finally:
        held.clear()
    if interrupted.is_set() and not stops:
        loop.close()
        raise KeyboardInterrupt
    return loop


def serve_in_workers(count: int, serve: Callable[[], int]) -> int:
    """Serve in so many processes that are forked here, until SIGINT or SIGTERM; the exit status.

    One that ends by itself ends all: to keep processes running is a service manager's business. They end with this
    process, too, however it ends.
    """
    if not hasattr(os, "fork"):
        raise CommandError("--workers needs a system that can fork")
    # Nothing is ever written. Only this process has the other end, so to read ends when this process has.
    parents_end, our_end = os.pipe()
    children: set[int] = set()
    status = 0
    try:
        for _ in range(count):
            # A fork's hooks swallow what a signal's handler raises in them, and what comes below is the parent's code.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                child = os.fork()
                if not child:
                    os.close(our_end)
                    _end_worker(serve, parents_end)
                children.add(child)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
        child, how = os.wait()
        children.discard(child)
        code = os.waitstatus_to_exitcode(how)
        told = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended by itself, with status {code}"
        say(f"worker {child} {told}: so all end")
        status = code or 1
    except KeyboardInterrupt:
        pass
    os.close(parents_end)
    # So they all stop, by themselves: a signal may be lost on a process that has just been forked.
    os.close(our_end)
    while children:
        try:
            child, how = os.wait()
            children.discard(child)
            status = status or os.waitstatus_to_exitcode(how)
        except ChildProcessError:  # the interrupt came between the end of the last and our note of it
            break
        except KeyboardInterrupt:  # a second one
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
    return 1 if status else 0


def _end_worker(serve: Callable[[], int], parents_end: int) -> NoReturn:
    """Be a worker, and end as one: what stands on the parent's stack is not for the child."""
    status = 1
    try:
        try:
            os.setpgid(0, 0)  # a terminal's Ctrl-C is for the parent: two would be one too many
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # which forgets the one that came before
            signal.signal(signal.SIGINT, interrupt)
            stop_when_it_ends(parents_end)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            status = serve()
        except KeyboardInterrupt:
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # even if a second interrupt has come in the midst of its end


class QuietHandler(WSGIRequestHandler):
    """Writes no line for each request, and lets the app see its client leave."""

    def get_environ(self) -> dict[str, Any]:
        # By the name that Werkzeug's server gives it: then a client's leaving is seen before a write fails.
        return super().get_environ() | {"werkzeug.socket": self.connection}

    def log_message(self, format: str, *args: object) -> None:
        pass


class ThreadedWSGIServer(ThreadingMixIn, WSGIServer):
    """The standard library's WSGI server with a thread for each request, on a listening socket that is given to it."""

    daemon_threads = True  # a request that never ends must not hold up the exit

    def __init__(self, listener: socket.socket, application: WSGIApplication, threads: int | None = None) -> None:
        super().__init__(listener.getsockname()[:2], QuietHandler, bind_and_activate=False)
        self.socket.close()  # the one that the base class made
        self.socket = listener
        # Where many workers listen, another one may take the connection between the word of it and accept().
        listener.setblocking(False)
        self.address_family: int = listener.family
        self.server_address: Any = listener.getsockname()[:2]
        # As HTTPServer.server_bind does, but without asking DNS for a name, which may take seconds.
        self.server_name: str = listener.getsockname()[0]
        self.server_port: int = listener.getsockname()[1]
        self.setup_environ()
        self.set_app(application)
        self._slots = (
            threading.BoundedSemaphore(threads) if threads else None
        )  # one for each request that may be in the app
        self._changed = threading.Condition()  # guards _open; told when a request has ended
        self._open: set[socket.socket] = set()  # connections of requests in flight

    def get_request(self) -> tuple[Any, Any]:
        # The accepting thread waits here: so that another worker takes the connection. The slot is given back at the
        # end of process_request_thread.
        if self._slots:
            self._slots.acquire()
        try:
            return super().get_request()
        except OSError:
            if self._slots:
                self._slots.release()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._open.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._open.discard(request)
                self._changed.notify_all()
            if self._slots:
                self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may go at any time
            super().handle_error(request, client_address)

    def drain(self) -> None:
        """Listen no more, and wait for the requests in flight, at most GRACE seconds; then hang up on them.

        Apps may clean up for a moment then. A second interrupt says not to wait.
        """
        with contextlib.suppress(KeyboardInterrupt):
            self.socket.close()
            with self._changed:
                self._changed.wait_for(lambda: not self._open, GRACE)
        with self._changed:
            for connection in self._open:
                with contextlib.suppress(OSError):  # it has gone by itself
                    connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._open, 1.0)


SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)

interrupted: threading.Event = threading.Event()

# While it is set, a signal does no more than to set the other one. What it would break off then tells of it, as asyncio
# of half a loop and of a coroutine that nobody awaits; or does not break off, as the machinery of imports.
held: threading.Event = threading.Event()


def interrupt(number: int, frame: FrameType | None) -> None:
    interrupted.set()
    if not held.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def signals_as_interrupt() -> Generator[None]:
    """Make SIGTERM raise KeyboardInterrupt as SIGINT does, and SIGINT also where a shell's `&` has it ignored."""
    before = [signal.signal(number, interrupt) for number in SIGNALS]
    try:
        yield
    finally:
        interrupted.clear()
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set by Python


def stop_when_it_ends(pipe: int) -> None:
    """Stop this process when the one that holds the other end of a pipe has gone, however that ended.

    The thread lives as long as the process.
    """

    def watch() -> None:
        while os.read(pipe, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="bridge-parent", daemon=True).start()


# --- The command line ---------------------------------------------------------------------------------------------


def parse_address(text: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon:
        host = "127.0.0.1"
    if colon and host in ("", "*"):
        host = "0.0.0.0"  # as gunicorn takes it
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not host or "/" in host or not port.isdecimal() or not port.isascii() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, [IPV6]:PORT or PORT, got {text!r}")
    if ":" in host and not bracketed:  # is ::1 an address, or : and port 1?
        raise argparse.ArgumentTypeError(f"an IPv6 address goes in brackets, as in [::1]:8000, got {text!r}")
    return Address(host, int(port))


def parse_count(text: str) -> int:
    if not text.isdecimal() or not text.isascii() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text!r}")
    return int(text)


def parse_path(text: str) -> str:
    # An ASGI app would be blamed for what the environ may not hold, by the validator that it is checked with.
    if not text.startswith("/") or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected a path such as /shop or /shop?page=2, got {text!r}")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bridge",
        description="Serve a WSGI app on uvicorn, or an ASGI app on the standard library's WSGI server. "
        "Without an app: the demo, a Flask app and a FastAPI app, each on the other kind of server.",
        epilog="python -m bridge check module:app calls an app, and tells what it does wrong.",
    )
    parser.add_argument("app", nargs="?", metavar="module:app", help=APP_HELP)
    parser.add_argument(
        "--bind",
        type=parse_address,
        metavar="HOST:PORT",
        help="where to listen; port 0 is any free one (default 127.0.0.1:8000; demo: free ports, or PORT and the next)",
    )
    serving = parser.add_argument_group("an app")
    serving.add_argument("--threads", type=parse_count, metavar="N", help="how many requests may be in the app at once")
    serving.add_argument("--workers", type=parse_count, metavar="N", help="how many processes serve (default 1)")
    add_finding(serving)
    serving.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)  # for the demo
    demo = parser.add_argument_group("the demo")
    demo.add_argument("--check", action="store_true", help="end after the drive, with status 0 only if all was right")
    demo.add_argument("--megabytes", type=parse_count, metavar="N", help="size of the upload (default 50)")
    return parser


def add_finding(parser: argparse._ActionsContainer) -> None:
    """Add the options by which an app is found."""
    parser.add_argument("--factory", action="store_true", help="module:app is called without arguments to make the app")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--wsgi", dest="kind", action="store_const", const=Kind.WSGI, help="it is a WSGI app")
    kind.add_argument("--asgi", dest="kind", action="store_const", const=Kind.ASGI, help="it is an ASGI app")


def make_check_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bridge check",
        description="Call an app through the bridge with a few requests, and tell what it does wrong, with the "
        "sentence of the specification. Exit status: 0 if nothing, 1 if something, 2 if the app cannot be had.",
    )
    parser.add_argument("app", metavar="module:app", help=APP_HELP)
    parser.add_argument("--path", type=parse_path, default="/", help="where most requests go (default /)")
    add_finding(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["check"]:  # an app has a colon
        return run(run_check, make_check_parser().parse_args(arguments[1:]))
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.app is not None and (options.check or options.megabytes):
        parser.error("--check and --megabytes are for the demo, which takes no app")
    if options.app is None and (options.factory or options.kind or options.threads or options.workers):
        parser.error("--factory, --wsgi, --asgi, --threads and --workers need a module:app")
    return run(run_demo if options.app is None else run_app, options)


def run(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    try:
        with signals_as_interrupt():
            return command(options)
    except CommandError as exc:
        if exc.__cause__ is not None:
            print(told_whole(exc.__cause__), file=sys.stderr)
        say(str(exc))
        return 2
    except KeyboardInterrupt:  # before there was anything to stop, or a second one during the stop
        return 130


def run_app(options: argparse.Namespace) -> int:
    if options.until_stdin_closes:
        stop_when_it_ends(0)
    app = load_app(options.app, factory=options.factory)
    kind = settle_kind(options.app, app, options.kind)
    if kind is Kind.WSGI and importlib.util.find_spec("uvicorn") is None:
        raise CommandError("a WSGI app is served on an ASGI server: pip install uvicorn")
    workers: int = options.workers or 1
    with listen(options.bind or Address("127.0.0.1", 8000)) as listener:
        service = Service(options.app, listener, options.threads, announces=workers == 1)
        serve = functools.partial(serve_wsgi_app if kind is Kind.WSGI else serve_asgi_app, cast("Any", app), service)
        if workers == 1:
            return serve()
        announce(service, kind)
        return serve_in_workers(workers, serve)


def run_check(options: argparse.Namespace) -> int:
    from bridge.check import check

    app = load_app(options.app, factory=options.factory)
    kind = settle_kind(options.app, app, options.kind)
    article, wrapper = ("a", "WsgiToAsgi") if kind is Kind.WSGI else ("an", "AsgiToWsgi")
    print(f"{options.app}, {article} {kind.value} app, through {wrapper}\n", flush=True)
    report = check(app, kind, options.path)
    print(report.text(), flush=True)
    if report.hangs:
        os._exit(1)  # what hangs would hold up the exit as well
    return 1 if report.severe else 0


def run_demo(options: argparse.Namespace) -> int:
    try:
        for name in DEMO_MODULES:
            importlib.import_module(name)
    except ModuleNotFoundError as exc:
        raise CommandError(f"the demo needs {exc.name}: {DEMO_EXTRA}") from None
    from bridge import demo

    address = options.bind or Address("127.0.0.1", 0)
    ports = (address.port, address.port + 1 if address.port else 0)
    return demo.run(address.host, ports, megabytes=options.megabytes or demo.MEGABYTES, check=options.check)


def run_process() -> NoReturn:
    """Be `python -m bridge`: run the command line, and end with its status."""
    status = main()
    if sys.argv[1:2] == ["check"]:
        end_in_time(status)
    sys.exit(status)


def end_in_time(status: int) -> None:
    """End this process some time after its main thread: Python would wait for threads of the app's without end.

    Those of a pool end by themselves then, so nothing tells before which ones do not. The thread lives as long as the
    process.
    """
    from bridge.check import LIMIT

    def watch() -> None:
        threading.main_thread().join()
        time.sleep(LIMIT)
        left = [thread.name for thread in threading.enumerate() if not (thread.daemon or thread.name == "MainThread")]
        say(f"the exit does not wait for what the app has left running{': ' * bool(left)}{', '.join(left)}")
        os._exit(status)

    threading.Thread(target=watch, name="bridge-end", daemon=True).start()


if __name__ == "__main__":
    run_process()
