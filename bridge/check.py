"""`python -m bridge check module:app`: calls an app through the bridge, and tells what it did wrong by which sentence.

A WSGI app is called under `wsgiref.validate`, an ASGI app under a check of each message it sends; both through the
wrapper that they would be deployed with, which checks as well. The app's own code runs, for a few plain requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import re
import textwrap
import threading
import time
import traceback
import urllib.parse
import warnings
import wsgiref
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from wsgiref.validate import WSGIWarning, validator

from bridge import AsgiToWsgi, BridgeError, ClientDisconnected, LifespanFailure, ProtocolError, WsgiToAsgi
from bridge.errors import shown, words_of
from bridge.headers import HOP_BY_HOP
from bridge.kinds import Kind

__all__ = ["RULES", "Finding", "Report", "check"]

if TYPE_CHECKING:
    Headers = list[tuple[str, str]]

LIMIT = 10.0
"""Seconds that an app may take to answer."""

STREAM_SECONDS = 1.0
"""After that the client leaves a response that goes on and on."""

STREAM_BYTES = 32 * 1024 * 1024
"""And after so many bytes."""


# --- What the specifications say ----------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A sentence of a specification, word by word but for its markup."""

    sentence: str
    source: str


_START = 'PEP 3333, "The start_response() Callable"'
_DETAILS = 'PEP 3333, "Specification Details"'
_RESPONSE_START = 'ASGI, HTTP, "Response Start"'
_RESPONSE_BODY = 'ASGI, HTTP, "Response Body"'

RULES = {
    "hop-by-hop": Rule(
        'Applications and middleware are forbidden from using HTTP/1.1 "hop-by-hop" features or headers, any '
        "equivalent features in HTTP/1.0, or any headers that would affect the persistence of the client's connection "
        "to the web server.",
        _START,
    ),
    "length": Rule(
        "Of course, if the application does not provide enough data to meet its stated Content-Length, the server "
        "should close the connection and log or otherwise report the error.",
        'PEP 3333, "Handling the Content-Length Header"',
    ),
    "too long": Rule(
        "If the application supplies a Content-Length header, the server should not transmit more bytes to the client "
        "than the header allows",
        'PEP 3333, "Handling the Content-Length Header"',
    ),
    "latin-1": Rule(
        'all "strings" referred to in this specification must contain only code points representable in ISO-8859-1 '
        "encoding",
        'PEP 3333, "Unicode Issues"',
    ),
    "header value": Rule(
        "Each header_value must not include any control characters, including carriage returns or linefeeds, either "
        "embedded or at the end.",
        _START,
    ),
    "header name": Rule(
        "Each header_name must be a valid HTTP header field-name (as defined by RFC 2616, Section 4.2), without a "
        "trailing colon or other punctuation.",
        _START,
    ),
    "header list": Rule(
        "The response_headers argument is a list of (header_name, header_value) tuples. It must be a Python list",
        _START,
    ),
    "status": Rule(
        "That is, it is a string consisting of a Status-Code and a Reason-Phrase, in that order and separated by a "
        "single space, with no surrounding whitespace or other characters.",
        _START,
    ),
    "second start": Rule(
        "More precisely, it is a fatal error to call start_response without the exc_info argument if start_response "
        "has already been called within the current invocation of the application.",
        _START,
    ),
    "exc_info": Rule("The exc_info argument, if supplied, must be a Python sys.exc_info() tuple.", _START),
    "positional": Rule("the application must invoke the start_response callable using positional arguments", _DETAILS),
    "no start": Rule(
        "the application must invoke the start_response() callable before the iterable yields its first body "
        "bytestring, so that the server can send the headers before any body content.",
        _DETAILS,
    ),
    "iterable": Rule(
        "When called by the server, the application object must return an iterable yielding zero or more bytestrings.",
        _DETAILS,
    ),
    "len": Rule(
        "That is, if the iterable returned by the application provides a working __len__() method, it must return an "
        "accurate result.",
        _DETAILS,
    ),
    "write": Rule(
        "The start_response callable must return a write(body_data) callable that takes one positional parameter: a "
        "bytestring to be written as part of the HTTP response body.",
        _DETAILS,
    ),
    "write late": Rule(
        "Applications must not invoke write() from within their return iterable, and therefore any bytestrings yielded "
        "by the iterable are transmitted after all bytestrings passed to write() have been sent to the client.",
        'PEP 3333, "The write() Callable"',
    ),
    "errors": Rule(
        'This should be a "text mode" stream; i.e., applications should use "\\n" as a line ending, and assume that it '
        "will be converted to the correct line ending by the server/gateway.",
        'PEP 3333, "environ Variables"',
    ),
    "no content": Rule(
        "A 204 response is terminated by the end of the header section; it cannot contain content or trailers.",
        'RFC 9110, "204 No Content"',
    ),
    "not modified": Rule(
        "A 304 response is terminated by the end of the header section; it cannot contain content or trailers.",
        'RFC 9110, "304 Not Modified"',
    ),
    "input closed": Rule(
        "In particular, applications must not attempt to close these streams, even if they possess close() methods.",
        'PEP 3333, "Input and Error Streams"',
    ),
    "closed early": Rule(
        "Applications returning a generator or other custom iterator should not assume the entire iterator will be "
        "consumed, as it may be closed early by the server.",
        _DETAILS,
    ),
    "trapped": Rule(
        "In general, applications should try to trap their own, internal errors, and display a helpful message in the "
        "browser.",
        'PEP 3333, "Error Handling"',
    ),
    "event": Rule(
        "If a server receives an invalid event dictionary - for example, having an unknown type, missing keys an event "
        "type should have, or with wrong Python types for objects (e.g. Unicode strings for HTTP headers) - it should "
        "raise an exception out of the send awaitable back to the application.",
        'ASGI, "Error Handling"',
    ),
    "reject": Rule(
        "Applications should actively reject any protocol that they do not understand with an Exception (of any type).",
        'ASGI, "Protocol Specifications"',
    ),
    "awaited": Rule("ASGI applications should be a single async callable", 'ASGI, "Applications"'),
    "lower-case": Rule("Header names must be lowercased.", _RESPONSE_START),
    "pseudo header": Rule("Pseudo headers (present in HTTP/2 and HTTP/3) must not be present.", _RESPONSE_START),
    "transfer-encoding": Rule(
        "You may send a Transfer-Encoding header in this message, but the server must ignore it.", _RESPONSE_START
    ),
    "start first": Rule(
        "Sent by the application to start sending a response to the client. Needs to be followed by at least one "
        "response content message.",
        _RESPONSE_START,
    ),
    "after the end": Rule(
        "If False, and the server is not expecting Response Trailers response will be taken as complete and closed, "
        "and any further messages on the channel will be ignored.",
        _RESPONSE_BODY,
    ),
    "not ended": Rule(
        "Signifies if there is additional content to come (as part of a Response Body message).", _RESPONSE_BODY
    ),
    "bubbled up": Rule(
        "Servers are free to surface errors that bubble up out of application instances they are running however they "
        "wish",
        'ASGI, "Error Handling"',
    ),
    "startup failed": Rule(
        "Sent by the application when it has failed to complete its startup. If a server sees this it should log/print "
        "the message provided and then exit.",
        'ASGI, Lifespan, "Startup Failed"',
    ),
    "shutdown failed": Rule(
        "Sent by the application when it has failed to complete its cleanup. If a server sees this it should log/print "
        "the message provided and then terminate.",
        'ASGI, Lifespan, "Shutdown Failed"',
    ),
    "shutdown complete": Rule(
        "Sent by the application when it has completed its cleanup. A server must wait for this message before "
        "terminating.",
        'ASGI, Lifespan, "Shutdown Complete"',
    ),
    "startup complete": Rule(
        "Sent by the application when it has completed its startup. A server must wait for this message before it "
        "starts processing connections.",
        'ASGI, Lifespan, "Startup Complete"',
    ),
}

# What tells, in the words of wsgiref.validate and of our own errors, which sentence was broken; the first that fits.
_SIGNS = {
    Kind.WSGI: [
        ("body has at least", "too long"),
        ("body ended after|Content-Length", "length"),
        ("latin-1", "latin-1"),
        ("Bad header value|CR, LF or NUL", "header value"),
        ("[Hh]eader name|Names may not|Status header", "header name"),
        ("[Hh]eaders? .*(type|list|str)|as value of|of str, got", "header list"),
        ("exc_info .* is not a tuple", "exc_info"),
        ("second time", "second start"),
        ("[Ss]tatus|invalid literal for int", "status"),
        ("keyword arguments|number of arguments", "positional"),
        ("start_response", "no start"),
        (r"write\(\) expected", "write"),
        (r"type\(s\) is str", "errors"),
        ("bytes|should not return a string|must return an iter|not iterable", "iterable"),
        (r"close\(\) must not be called", "input closed"),
        ("ignored GeneratorExit", "closed early"),
    ],
    Kind.ASGI: [
        ("no message after the end", "after the end"),
        ("expected 'http.response.(start|body)', got|without (sending|any)", "start first"),
        ("body ended after|before it had sent its whole body|body has at least", "not ended"),
        ("as header name, got b':", "pseudo header"),
        ("await", "awaited"),
        ("the app raised", "bubbled up"),
    ],
}
_OTHERWISE = {Kind.WSGI: "trapped", Kind.ASGI: "event"}
# Where the error is none of a check's.
_OTHERS = {Kind.WSGI: "trapped", Kind.ASGI: "bubbled up"}


# --- The report ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Something that an app did wrong.

    Attributes:
        what: What it did, in one line.
        rule: The sentence that it broke, by its name in `RULES`.
        severe: False for what goes well here and breaks, or surprises, elsewhere.
    """

    what: str
    rule: str
    severe: bool = True


@dataclass
class Report:
    """What came of a check.

    Attributes:
        answers: For each request, what was answered, in one line.
        findings: Each with the requests in which it was found.
        hangs: Whether the app has not answered in time; then something in it still runs, and may never end.
        refusal: What is to be known of a check that has seen nothing but error pages; else empty.
    """

    answers: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    findings: dict[Finding, list[str]] = field(default_factory=dict[Finding, list[str]])
    refusal: str = ""
    hangs: bool = False

    @property
    def severe(self) -> int:
        return sum(finding.severe for finding in self.findings)

    def add(self, request: str, finding: Finding) -> None:
        requests = self.findings.setdefault(finding, [])
        if request not in requests:
            requests.append(request)

    def text(self) -> str:
        width = max((len(request) for request, _ in self.answers), default=0)
        lines = [f"{request.ljust(width)}  {answer}" for request, answer in self.answers]
        for number, (finding, requests) in enumerate(
            sorted(self.findings.items(), key=lambda item: not item[0].severe), 1
        ):
            rule = RULES[finding.rule]
            mark = "" if finding.severe else " (a hint)"
            everywhere = len(requests) > 1 and requests == [request for request, _ in self.answers]
            where = "each request" if everywhere else ", ".join(requests)
            margin = "   "
            what = textwrap.indent(finding.what.strip(), margin)
            lines += ["", f"{number}. In {where}{mark}:", what, f"{margin}{rule.source}:"]
            lines += textwrap.wrap(
                f'"{rule.sentence}"', 96, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
            )
        hints = len(self.findings) - self.severe
        faults = f"{self.severe} fault{'s' * (self.severe != 1)}" if self.severe else "No faults"
        told = f"{faults}, {hints} hint{'s' * (hints != 1)}." if hints else f"{faults}."
        return "\n".join([*lines, "", f"{told} {self.refusal}" if self.refusal else told])


# --- The requests -------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What a client sends."""

    name: str
    method: str
    target: str
    body: tuple[bytes, ...] = ()
    """In the pieces in which it comes."""
    headers: tuple[tuple[str, str], ...] = ()
    leaves: bool = False
    """After the first block of the response."""
    is_plain: bool = False
    """Whether any page that is there answers it."""


_FORM = b"name=Zo%C3%AB&message=1+%2B+1"
_FORM_TYPE = ("content-type", "application/x-www-form-urlencoded")


def requests_for(path: str) -> list[Request]:
    target = urllib.parse.quote(path, safe="/%?=&+;,:@!$'()*~")
    joint = "&" if "?" in target else "?"
    length = ("content-length", str(len(_FORM)))
    return [
        Request(f"GET {path}", "GET", target, is_plain=True),
        Request(f"HEAD {path}", "HEAD", target),
        Request("GET with an odd query", "GET", f"{target}{joint}q=%FF&empty&=%00", is_plain=True),
        Request("GET of an odd path", "GET", "/%FF/%2F/caf%C3%A9"),
        Request("POST of a form", "POST", target, (_FORM[:5], _FORM[5:]), (_FORM_TYPE, length)),
        Request("POST without a length", "POST", target, (_FORM,), (_FORM_TYPE,)),
        Request("GET, the client leaves", "GET", target, leaves=True, is_plain=True),
    ]


@dataclass
class Answer:
    """What a client got."""

    status: int | None = None
    blocks: int = 0
    size: int = 0
    left: bool = False
    hangs: bool = False
    error: BaseException | None = None
    since: float = field(default_factory=time.monotonic)

    def take(self, block: bytes, request: Request) -> bool:
        """Count a block; False if the client has enough of it."""
        self.blocks += bool(block)
        self.size += len(block)
        tired = time.monotonic() - self.since > STREAM_SECONDS or self.size > STREAM_BYTES
        self.left = self.left or tired or (request.leaves and self.blocks > 0)
        return not self.left

    def text(self) -> str:
        if self.status is None:
            return "no answer"
        blocks = f"{self.size:,} byte{'s' * (self.size != 1)} in {self.blocks} block{'s' * (self.blocks != 1)}"
        return f"{self.status}, {blocks}{', then the client left' if self.left else ''}"


def check(app: Any, kind: Kind, path: str = "/") -> Report:
    """Call an app of a kind, and tell what it did wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WSGIWarning)  # what it warns of is checked here
        return (_WsgiCheck if kind is Kind.WSGI else _AsgiCheck)(app).run(path)


class _Check:
    """What both checks do."""

    kind: Kind

    def __init__(self, app: Any) -> None:
        self.app = app
        self.report = Report()
        self.request = ""  # its name
        self.told: set[str] = set()  # the rules broken in it
        self.reported: list[BaseException] = []

    def run(self, path: str) -> Report:
        statuses: set[int | None] = set()
        for request in requests_for(path):
            self.request = request.name
            self.told.clear()
            answer = self.ask(request)
            if request.is_plain:
                statuses.add(answer.status)
            self.report.answers.append((request.name, answer.text()))
            if answer.hangs:
                self.report.hangs = True
                self.tell(f"the app did not answer within {LIMIT:g} s", _OTHERS[self.kind])
                break  # it would go on so
            if answer.error is not None:
                self.report_error(answer.error)
        if all(status is not None and status >= 400 for status in statuses):
            self.report.refusal = _refusal(path, cast("set[int]", statuses))
        return self.report

    def ask(self, request: Request) -> Answer:
        raise NotImplementedError

    def tell(self, what: str, rule: str, severe: bool = True) -> None:
        self.told.add(rule)
        self.report.add(self.request, Finding(what, rule, severe))

    def check_body(self, status: str) -> None:
        """Tell of a body that the status does not let be."""
        rule = {"204": "no content", "304": "not modified"}.get(status)
        if rule is not None:
            self.tell(f"the response has the status {status}, and a body", rule)

    def report_error(self, error: BaseException) -> None:
        """Tell what was raised, once, wherever it comes by."""
        if isinstance(error, ClientDisconnected) or any(error is other for other in self.reported):
            return
        self.reported.append(error)
        by_rules = isinstance(error, (AssertionError, BridgeError)) and _is_ours(error)
        text = words_of(error) or (_unsaid(error) if by_rules else "")
        for pattern, rule in _SIGNS[self.kind]:
            if re.search(pattern, text) and (by_rules or isinstance(error, (TypeError, ValueError, RuntimeError))):
                if rule not in self.told:
                    self.tell(text if by_rules else _told(error), rule)
                return
        if by_rules:
            self.tell(text, _OTHERWISE[self.kind])
        else:
            self.tell(f"raised {_told(error)}", _OTHERS[self.kind])


def _refusal(path: str, statuses: set[int]) -> str:
    told = " or ".join(map(str, sorted(statuses)))
    advice = " Say --path, for a page that is there." if statuses == {404} else ""
    return f"But each GET of {path} was answered {told}: only the app's own error page was checked.{advice}"


_CHECKERS = {Path(wsgiref.__file__).parent, Path(__file__).parent}


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by a check, and not by the app's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent in _CHECKERS


def _unsaid(error: BaseException) -> str:
    """What a check of the validator's looks for that raises without a word, and where the app came to it."""
    *frames, check, _ = traceback.extract_tb(error.__traceback__)  # the last is assert_() itself
    place = next((frame for frame in reversed(frames) if Path(frame.filename).parent not in _CHECKERS), check)
    return f"wsgiref.validate expected {check.line}, in {check.name}() ({place.filename}, line {place.lineno})"


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {words_of(error)}{place}"


def _is_hop_by_hop(name: str) -> bool:
    return name.lower().encode("latin-1", "replace") in HOP_BY_HOP


# --- A WSGI app ---------------------------------------------------------------------------------------------------

_is_status_line = re.compile(r"[1-9][0-9][0-9] [^\x00-\x1f]+").fullmatch


class _WsgiCheck(_Check):
    """A WSGI app under `wsgiref.validate`, called by an ASGI server in memory through WsgiToAsgi."""

    kind = Kind.WSGI

    def ask(self, request: Request) -> Answer:
        application = WsgiToAsgi(cast("Any", validator(cast("Any", self.call))))
        answer = Answer()
        try:
            asyncio.run(self.serve_in_time(application, request, answer))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            answer.error = error
        if not answer.hangs:
            application.close()
        return answer

    async def serve_in_time(self, application: WsgiToAsgi, request: Request, answer: Answer) -> None:
        limit = asyncio.timeout(LIMIT)
        try:
            async with limit:
                await self.serve(application, request, answer)
        except TimeoutError:
            answer.hangs = limit.expired()
            if not answer.hangs:  # it is the app's
                raise

    async def serve(self, application: WsgiToAsgi, request: Request, answer: Answer) -> None:
        gone = asyncio.Event()
        pieces = list(request.body) or [b""]

        async def receive() -> Any:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
            elif not answer.take(message.get("body", b""), request) and message.get("more_body"):
                gone.set()
                await asyncio.sleep(0)

        await application(cast("Any", _make_scope(request)), receive, cast("Any", send))

    def call(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """The app as the validator sees it."""
        environ["wsgi.input"] = _Input(environ["wsgi.input"])
        statuses: list[str] = []
        has_returned = False

        def checked_start(*args: Any, **kwargs: Any) -> Any:
            if len(args) > 1 and not kwargs:
                args = (args[0], self.check_headers(args[0], args[1]), *args[2:])
            try:
                write = start_response(*args, **kwargs)
            except (AssertionError, BridgeError, ValueError) as error:  # the app may catch it
                self.report_error(error)
                raise
            statuses.extend(map(str, args[:1]))
            return functools.partial(checked_write, write)

        def checked_write(write: Callable[[bytes], object], data: Any) -> None:
            if has_returned:
                self.tell("write() was called when the app had returned its iterable", "write late", severe=False)
            if type(data) is not bytes:  # of which the validator says no word
                words = f"write() expected bytes, got {shown(data)}"
                self.tell(words, "write")  # the app may catch it
                raise ProtocolError(words)
            if data:
                self.check_body(statuses[-1][:3])
            write(data)

        result = self.app(environ, checked_start)
        has_returned = True
        if not any(hasattr(result, way) for way in ("__iter__", "__getitem__")):  # the validator would stumble
            raise ProtocolError(f"the app expected to return an iterable of bytes, returned {shown(result)}")
        return result if isinstance(result, (str, bytes)) else _Watched(result, statuses, self)

    def check_headers(self, status: Any, headers: Any) -> Any:
        if isinstance(status, str) and not _is_status_line(status):
            self.tell(f"start_response() got the status {shown(status)}", "status")
        pairs: Any = headers
        if not isinstance(headers, list) or not all(map(_is_pair, pairs)):
            return pairs  # the validator says so
        for name, _ in pairs:
            if _is_hop_by_hop(name):
                self.tell(f"start_response() got the hop-by-hop header {shown(name)}", "hop-by-hop")
        return _with_content_type(str(status), pairs)


def _is_pair(header: Any) -> bool:
    return type(header) is tuple and list(map(type, cast("tuple[object, ...]", header))) == [str, str]


def _with_content_type(status: str, headers: Headers) -> Headers:
    """What the validator wants to see: it asks for a Content-Type in each answer but 204 and 304, where it must not be.

    That is stricter than HTTP, and most frameworks do otherwise.
    """
    others = [(name, value) for name, value in headers if name.lower() != "content-type"]
    if status[:3] in ("204", "304"):
        return others
    return headers if len(others) < len(headers) else [*headers, ("Content-Type", "application/octet-stream")]


class _Input:
    """`wsgi.input`, with what PEP 3333 allows and the validator does not: read() without a size."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> Any:
        return self._stream.read(-1 if size is None else size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)


class _Watched:
    """What an app returned; its blocks are counted, and compared with its length and with the status."""

    def __init__(self, result: Any, statuses: list[str], check: _Check) -> None:
        self._result = result
        self._statuses = statuses
        self._check = check

    def __iter__(self) -> Any:
        count = 0
        for block in self._result:
            count += 1
            if block and self._statuses:
                self._check.check_body(self._statuses[-1][:3])
            yield block
        try:
            length = len(self._result)
        except TypeError:  # it has none, or no working one
            return
        if length != count:
            self._check.tell(f"it yielded {count} blocks, len() of what it returned is {length}", "len")

    def close(self) -> None:
        close = getattr(self._result, "close", None)
        if close is not None:
            close()


def _make_scope(request: Request) -> dict[str, Any]:
    path, _, query = request.target.partition("?")
    headers = [("host", "testserver"), ("user-agent", "bridge check"), ("accept", "*/*"), *request.headers]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": urllib.parse.unquote(path, errors="replace"),
        "raw_path": path.encode("ascii"),
        "query_string": query.encode("ascii"),
        "root_path": "",
        "headers": [(name.encode("ascii"), value.encode("ascii")) for name, value in headers],
        "client": ("127.0.0.1", 50000),
        "server": ("testserver", 80),
        "extensions": {},
    }


# --- An ASGI app --------------------------------------------------------------------------------------------------


class _Hangs(Exception):
    """Stands for what an app would have raised, had it come to an end."""


class _AsgiCheck(_Check):
    """An ASGI app under a check of its messages, called by a WSGI server in memory through AsgiToWsgi."""

    kind = Kind.ASGI

    def run(self, path: str) -> Report:
        self.request = "an unknown protocol"
        self.in_time(self.offer_unknown)
        self.application = AsgiToWsgi(cast("Any", self.call))
        self.status = ""  # of the response that has started last
        self.stops = False  # whether the app has received lifespan.shutdown
        self.request = "lifespan"
        started = self.in_time(self.application.startup)
        if isinstance(started, _Hangs):
            self.report.hangs = True
            self.tell(f"the app did not answer lifespan.startup within {LIMIT:g} s", "startup complete")
            return self.report
        if isinstance(started, LifespanFailure):
            self.tell(str(started).strip(), "startup failed")
            return self.report
        if started is not None:
            self.report_error(started)
        super().run(path)
        if self.report.hangs:
            return self.report
        self.request = "lifespan"
        ended = self.in_time(self.application.close)
        if isinstance(ended, _Hangs) and self.stops:
            self.report.hangs = True
            self.tell(f"the app did not answer lifespan.shutdown within {LIMIT:g} s", "shutdown complete")
        elif ended is not None:  # as by background work, which may end yet
            self.tell(f"the app did not shut down: {ended}", "shutdown complete", severe=False)
        return self.report

    def in_time(self, call: Callable[[], object]) -> BaseException | None:
        """Call in a thread, as servers do; what was raised, or that it took too long."""
        errors: list[BaseException] = []

        def run() -> None:
            try:
                call()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="bridge-check", daemon=True)
        thread.start()
        thread.join(LIMIT)
        if thread.is_alive():
            return _Hangs(f"it did not end within {LIMIT:g} s")
        return errors[0] if errors else None

    def offer_unknown(self) -> None:
        async def receive() -> Any:
            await asyncio.sleep(0.01)
            return {"type": "bridge.check"}

        async def send(message: Any) -> None:
            raise ValueError("the protocol is not known")

        async def offer() -> bool:
            try:
                await asyncio.wait_for(self.app({"type": "bridge.check", "asgi": {"version": "3.0"}}, receive, send), 1)
            except Exception:
                return True
            return False

        if not asyncio.run(offer()):
            self.tell("the app returned without a word from a scope of type 'bridge.check'", "reject", severe=False)

    def ask(self, request: Request) -> Answer:
        answer = Answer()
        error = self.in_time(lambda: self.serve(request, answer))
        answer.hangs = isinstance(error, _Hangs)
        answer.error = error
        return answer

    def serve(self, request: Request, answer: Answer) -> None:
        def start_response(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
            answer.status = int(status[:3])
            return lambda data: None

        def through_validator(environ: Any, start: Callable[..., Any]) -> Iterable[bytes]:
            def start_with_type(status: str, headers: Headers, *more: Any) -> Any:
                return start(status, _with_content_type(status, headers), *more)

            return self.application(environ, start_with_type)

        result = validator(cast("Any", through_validator))(_make_environ(request), cast("Any", start_response))
        with contextlib.closing(cast("Any", result)):
            # No block comes of an answer to HEAD, so nothing would tell that it never ends.
            for block in result if request.method != "HEAD" else ():
                if not answer.take(block, request):
                    break

    async def call(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """The app as the bridge sees it."""

        async def checked_receive() -> Any:
            message = await receive()
            self.stops = self.stops or message["type"] == "lifespan.shutdown"
            return message

        async def checked_send(message: Any) -> None:
            if isinstance(message, Mapping):
                self.check_message(cast("Mapping[str, Any]", message))
            try:
                await send(message)
            except BridgeError as error:  # the app may catch it
                if scope["type"] == "lifespan":
                    self.tell(str(error), "reject", severe=False)
                else:
                    self.report_error(error)
                raise

        # Not the very callables of the bridge: what an app keeps of them shall be checked, too.
        result = self.app(scope, checked_receive, checked_send)
        if not hasattr(result, "__await__"):
            raise ProtocolError(f"the app returned {shown(result)}, which cannot be awaited")
        try:
            await result
        except (Exception, SystemExit) as error:
            if self.stops and scope["type"] == "lifespan":  # the wrapper only logs it
                self.tell(f"raised {_told(error)} when it was to stop", "shutdown failed")
            raise

    def check_message(self, message: Mapping[str, Any]) -> None:
        kind = message.get("type")
        if kind == "lifespan.shutdown.failed":
            self.tell(f"the app failed to shut down: {message.get('message', '')}", "shutdown failed")
        elif kind == "http.response.start":
            self.status = str(message.get("status"))
            headers: Any = message.get("headers") or ()
            for header in headers if type(headers) in (list, tuple) else ():
                self.check_header(header)
        elif kind == "http.response.body":
            body: Any = message.get("body", b"")
            more_body: Any = message.get("more_body", False)
            if body:
                self.check_body(self.status)
            if type(body) in (bytearray, memoryview):
                self.tell(f"'http.response.body' got a {type(body).__name__} as body", "event", severe=False)
            if not isinstance(more_body, bool):
                self.tell(f"'http.response.body' got {shown(more_body)} as more_body", "event")

    def check_header(self, header: Any) -> None:
        if type(header) not in (list, tuple) or not header or type(header[0]) is not bytes:
            return  # the bridge says so
        name: bytes = header[0]
        if name != name.lower():
            self.tell(f"'http.response.start' got the header name {name!r}", "lower-case", False)
        elif name in HOP_BY_HOP:
            self.tell(
                f"'http.response.start' got the header {name!r}, which is the server's", "transfer-encoding", False
            )


def _make_environ(request: Request) -> dict[str, Any]:
    path, _, query = request.target.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": urllib.parse.unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "REQUEST_URI": request.target,
        "SERVER_NAME": "testserver",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "testserver",
        "HTTP_USER_AGENT": "bridge check",
        "HTTP_ACCEPT": "*/*",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(b"".join(request.body)),
        "wsgi.input_terminated": True,
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in request.headers:
        environ[name.upper().replace("-", "_")] = value
    return environ
