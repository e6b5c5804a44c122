"""The site with each WSGI framework, and without any."""

import atexit
import io
import json
import os
import select
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from functools import partial
from http import HTTPStatus
from typing import Any

from tests.apps import (
    COOKIES,
    DOCUMENT,
    ETAG,
    HINT,
    LIMIT,
    TRAILER,
    Like,
    OnPurpose,
    Upload,
    board,
    broken,
    document,
    download,
    environ_seen,
    events,
    file_seen,
    noting_path_info,
    slow,
    ticks,
)
from tests.apps.django import django_wsgi

__all__ = [
    "bare_wsgi",
    "bottle_wsgi",
    "cherrypy_wsgi",
    "dash_wsgi",
    "django_wsgi",
    "falcon_wsgi",
    "flask_wsgi",
    "pyramid_wsgi",
]


def flask_wsgi() -> Any:
    import flask

    app = flask.Flask("tests")

    @app.get("/hello")
    def hello() -> Any:
        return flask.Response("hello", mimetype="text/plain")

    @app.get("/echo/<path:_>")
    def echo(_: str) -> Any:
        response = flask.jsonify(environ_seen(flask.request.environ))
        response.headers["X-Reply"] = flask.request.headers.get("X-Ask", "")
        for cookie in COOKIES:
            response.headers.add("Set-Cookie", cookie)
        return response

    @app.get("/empty")
    def empty() -> Any:
        return "", 204

    @app.get("/unchanged")
    def unchanged() -> Any:
        return "", 304, {"ETag": ETAG}

    @app.get("/error")
    def error() -> Any:
        raise OnPurpose("before the response")

    @app.get("/broken")
    def broken_() -> Any:
        return flask.Response(broken(), headers={"Content-Length": "1000"})

    @app.post("/form")
    def form() -> Any:
        return flask.jsonify(flask.request.form.to_dict())

    @app.post("/json")
    def json_() -> Any:
        return flask.jsonify(flask.request.get_json())

    @app.post("/multipart")
    def multipart() -> Any:
        file = flask.request.files["file"]
        return file_seen(file.filename, file.read())

    @app.post("/upload/<key>")
    def upload(key: str) -> Any:
        return Upload(key).read(flask.request.stream.read)

    @app.post("/refuse")
    def refuse() -> Any:
        return "too large", 413

    @app.get("/download")
    def download_() -> Any:
        return flask.Response(download(), mimetype="application/octet-stream")

    @app.get("/events/<key>")
    def events_(key: str) -> Any:
        return flask.Response(events(key), mimetype="text/event-stream")

    @app.get("/ticks/<key>")
    def ticks_(key: str) -> Any:
        return flask.Response(ticks(key), mimetype="text/event-stream")

    @app.get("/slow/<key>")
    def slow_(key: str) -> Any:
        return slow(key)

    @app.get("/document")
    def document_() -> Any:
        return flask.send_file(document())

    @app.get("/board/<name>")
    def look(name: str) -> Any:
        text = board.get(name)
        return ("", 404) if text is None else text

    @app.post("/board/<name>")
    def put(name: str) -> Any:
        board.put(name)
        return "", 204

    return app


def dash_wsgi() -> Any:
    """The site with Flask, and a dashboard below /dash/ that greets whom it is told to."""
    import dash

    site = flask_wsgi()
    dashboard = dash.Dash("tests", server=site, url_base_pathname="/dash/")
    dashboard.layout = dash.html.Div([dash.dcc.Input(id="name"), dash.html.P(id="greeting")])

    @dashboard.callback(dash.Output("greeting", "children"), dash.Input("name", "value"))
    def greet(name: str) -> str:
        return f"hello, {name}"

    return site


def pyramid_wsgi() -> Any:
    from pyramid.config import Configurator
    from pyramid.response import FileResponse, Response

    def stream(blocks: Iterable[bytes], content_type: str = "text/event-stream", length: int | None = None) -> Any:
        return Response(app_iter=blocks, content_type=content_type, content_length=length)

    def hello(request: Any) -> Any:
        return Response("hello", content_type="text/plain")

    def echo(request: Any) -> Any:
        request.response.json_body = environ_seen(request.environ)
        request.response.headers["X-Reply"] = request.headers.get("X-Ask", "")
        for cookie in COOKIES:
            request.response.headers.add("Set-Cookie", cookie)
        return request.response

    def empty(request: Any) -> Any:
        return Response(status=204)

    def unchanged(request: Any) -> Any:
        return Response(status=304, headerlist=[("ETag", ETAG)])

    def error(request: Any) -> Any:
        raise OnPurpose("before the response")

    def broken_(request: Any) -> Any:
        return stream(broken(), length=1000)

    def form(request: Any) -> Any:
        return Response(json_body=dict(request.POST))

    def json_(request: Any) -> Any:
        return Response(json_body=request.json_body)

    def multipart(request: Any) -> Any:
        file = request.POST["file"]
        return Response(json_body=file_seen(file.filename, file.file.read()))

    def upload(request: Any) -> Any:
        return Response(json_body=Upload(request.matchdict["key"]).read(request.body_file.read))

    def refuse(request: Any) -> Any:
        return Response("too large", status=413)

    def download_(request: Any) -> Any:
        return stream(download(), "application/octet-stream")

    def events_(request: Any) -> Any:
        return stream(events(request.matchdict["key"]))

    def ticks_(request: Any) -> Any:
        return stream(ticks(request.matchdict["key"]))

    def slow_(request: Any) -> Any:
        return Response(slow(request.matchdict["key"]))

    def document_(request: Any) -> Any:
        return FileResponse(document(), request)

    def board_(request: Any) -> Any:
        name = request.matchdict["name"]
        if request.method == "POST":
            board.put(name)
            return Response(status=204)
        text = board.get(name)
        return Response(status=404) if text is None else Response(text)

    routes = {
        "/hello": hello,
        "/echo/{_:.*}": echo,
        "/empty": empty,
        "/unchanged": unchanged,
        "/error": error,
        "/broken": broken_,
        "/form": form,
        "/json": json_,
        "/multipart": multipart,
        "/upload/{key}": upload,
        "/refuse": refuse,
        "/download": download_,
        "/events/{key}": events_,
        "/ticks/{key}": ticks_,
        "/slow/{key}": slow_,
        "/document": document_,
        "/board/{name}": board_,
    }
    with Configurator() as config:
        for path, view in routes.items():
            config.add_route(path, path)
            config.add_view(view, route_name=path)
        return config.make_wsgi_app()


def falcon_wsgi() -> Any:
    import falcon

    class Get:
        """A resource that answers GET, and HEAD as well."""

        def __init__(self, answer: Any) -> None:
            self._answer = answer

        def on_get(self, request: Any, response: Any, **parameters: str) -> None:
            self._answer(request, response, **parameters)

        on_head = on_get

    class Post(Get):
        def on_post(self, request: Any, response: Any, **parameters: str) -> None:
            self._answer(request, response, **parameters)

    def hello(request: Any, response: Any) -> None:
        response.content_type = "text/plain"
        response.text = "hello"

    def echo(request: Any, response: Any, _: str) -> None:
        response.media = environ_seen(request.env)
        response.set_header("X-Reply", request.get_header("X-Ask") or "")
        for cookie in COOKIES:
            name, _, value = cookie.partition(";")[0].partition("=")
            response.set_cookie(name, value)

    def empty(request: Any, response: Any) -> None:
        response.status = 204

    def unchanged(request: Any, response: Any) -> None:
        response.status = 304
        response.set_header("ETag", ETAG)

    def error(request: Any, response: Any) -> None:
        raise OnPurpose("before the response")

    def broken_(request: Any, response: Any) -> None:
        response.stream, response.content_length = broken(), 1000

    def media(request: Any, response: Any) -> None:
        response.media = request.get_media()

    def multipart(request: Any, response: Any) -> None:
        for part in request.get_media():
            if part.name == "file":
                response.media = file_seen(part.filename, part.stream.read())

    def upload(request: Any, response: Any, key: str) -> None:
        response.media = Upload(key).read(
            request.bounded_stream.read if "CONTENT_LENGTH" in request.env else request.stream.read
        )

    def refuse(request: Any, response: Any) -> None:
        response.status, response.text = 413, "too large"

    def download_(request: Any, response: Any) -> None:
        response.content_type, response.stream = "application/octet-stream", download()

    def events_(request: Any, response: Any, key: str) -> None:
        response.content_type, response.stream = "text/event-stream", events(key)

    def ticks_(request: Any, response: Any, key: str) -> None:
        response.content_type, response.stream = "text/event-stream", ticks(key)

    def slow_(request: Any, response: Any, key: str) -> None:
        response.data = slow(key)

    def document_(request: Any, response: Any) -> None:
        response.set_stream(document().open("rb"), document().stat().st_size)

    def board_(request: Any, response: Any, name: str) -> None:
        text = board.get(name)
        if request.method == "POST":
            board.put(name)
            response.status = 204
        elif text is None:
            response.status = 404
        else:
            response.text = text

    app = falcon.App()
    gets = {
        "/hello": hello,
        "/echo/{_:path}": echo,
        "/empty": empty,
        "/unchanged": unchanged,
        "/error": error,
        "/broken": broken_,
        "/download": download_,
        "/events/{key}": events_,
        "/ticks/{key}": ticks_,
        "/slow/{key}": slow_,
        "/document": document_,
    }
    posts = {
        "/form": media,
        "/json": media,
        "/multipart": multipart,
        "/upload/{key}": upload,
        "/refuse": refuse,
        "/board/{name}": board_,
    }
    for resource, paths in (Get, gets), (Post, posts):
        for path, answer in paths.items():
            app.add_route(path, resource(answer))
    return app


def bottle_wsgi() -> Any:
    import bottle

    app = bottle.Bottle()
    request, response = bottle.request, bottle.response

    @app.get("/hello")
    def hello() -> Any:
        response.content_type = "text/plain"
        return "hello"

    @app.get("/echo/<_:path>")
    def echo(_: str) -> Any:
        response.set_header("X-Reply", request.get_header("X-Ask", ""))
        for cookie in COOKIES:
            response.add_header("Set-Cookie", cookie)
        return environ_seen(request.environ)

    @app.get("/empty")
    def empty() -> Any:
        response.status = 204

    @app.get("/unchanged")
    def unchanged() -> Any:
        return bottle.HTTPResponse(status=304, headers={"ETag": ETAG})

    @app.get("/error")
    def error() -> Any:
        raise OnPurpose("before the response")

    @app.get("/broken")
    def broken_() -> Any:
        response.set_header("Content-Length", "1000")
        return broken()

    @app.post("/form")
    def form() -> Any:
        return dict(request.forms.decode())

    @app.post("/json")
    def json_() -> Any:
        return request.json

    @app.post("/multipart")
    def multipart() -> Any:
        file = request.files["file"]
        return file_seen(file.raw_filename, file.file.read())

    @app.post("/upload/<key>")
    def upload(key: str) -> Any:
        # `request.body` would hold it all before the first byte is seen.
        return Upload(key).read(request.environ["wsgi.input"].read)

    @app.post("/refuse")
    def refuse() -> Any:
        response.status = 413
        return "too large"

    @app.get("/download")
    def download_() -> Any:
        response.content_type = "application/octet-stream"
        return download()

    @app.get("/events/<key>")
    def events_(key: str) -> Any:
        response.content_type = "text/event-stream"
        return events(key)

    @app.get("/ticks/<key>")
    def ticks_(key: str) -> Any:
        response.content_type = "text/event-stream"
        return ticks(key)

    @app.get("/slow/<key>")
    def slow_(key: str) -> Any:
        return slow(key)

    @app.get("/document")
    def document_() -> Any:
        return bottle.static_file(document().name, root=document().parent)

    @app.get("/board/<name>")
    def look(name: str) -> Any:
        text = board.get(name)
        return bottle.HTTPResponse(status=404) if text is None else text

    @app.post("/board/<name>")
    def put(name: str) -> Any:
        board.put(name)
        response.status = 204

    return noting_path_info(app)


def cherrypy_wsgi() -> Any:
    import cherrypy

    request, response = cherrypy.request, cherrypy.response

    def exposed(**config: Any) -> Any:
        def expose(handler: Any) -> Any:
            handler.exposed, handler._cp_config = True, config
            return handler

        return expose

    streamed = {"response.stream": True}

    class Site:
        @exposed()
        def hello(self) -> Any:
            response.headers["Content-Type"] = "text/plain"
            return "hello"

        @exposed()
        def echo(self, *path: str, **query: str) -> Any:
            response.headers["Content-Type"] = "application/json"
            response.headers["X-Reply"] = request.headers.get("X-Ask", "")
            for cookie in COOKIES:
                name, _, value = cookie.partition(";")[0].partition("=")
                response.cookie[name] = value
            return json.dumps(environ_seen(request.wsgi_environ)).encode()

        @exposed()
        def empty(self) -> Any:
            response.status = 204

        @exposed()
        def unchanged(self) -> Any:
            response.status = 304
            response.headers["ETag"] = ETAG

        @exposed()
        def error(self) -> Any:
            raise OnPurpose("before the response")

        @exposed(**streamed)
        def broken(self) -> Any:
            response.headers["Content-Length"] = "1000"
            return broken()

        @exposed()
        def form(self, **form: str) -> Any:
            return json.dumps(form).encode()

        @exposed(**{"tools.json_in.on": True})
        def json(self) -> Any:
            return json.dumps(request.json).encode()

        @exposed()
        def multipart(self, file: Any, other: str) -> Any:
            return json.dumps(file_seen(file.filename, file.file.read())).encode()

        @exposed(**{"request.process_request_body": False})
        def upload(self, key: str) -> Any:
            return json.dumps(Upload(key).read(request.rfile.read)).encode()

        @exposed(**{"request.process_request_body": False})
        def refuse(self) -> Any:
            response.status = 413
            return "too large"

        @exposed(**streamed)
        def download(self) -> Any:
            response.headers["Content-Type"] = "application/octet-stream"
            return download()

        @exposed(**streamed)
        def events(self, key: str) -> Any:
            response.headers["Content-Type"] = "text/event-stream"
            return events(key)

        @exposed(**streamed)
        def ticks(self, key: str) -> Any:
            response.headers["Content-Type"] = "text/event-stream"
            return ticks(key)

        @exposed()
        def slow(self, key: str) -> Any:
            return slow(key)

        @exposed()
        def document(self) -> Any:
            return cherrypy.lib.static.serve_file(str(document()))

        @exposed()
        def board(self, name: str) -> Any:
            text = board.get(name)
            if request.method == "POST":
                board.put(name)
                response.status = 204
            elif text is None:
                response.status = 404
            else:
                return text

    return noting_path_info(cherrypy.Application(Site(), script_name=None))


def bare_wsgi() -> Any:
    """What a server does by itself. The board tells whether an app can hear of the end."""
    board.put("native-startup")
    atexit.register(board.put, "native-shutdown")

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        kind, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        status, headers, body = "200 OK", [("Content-Type", "text/plain")], b"hello"
        if kind in ("events", "ticks"):
            start_response(status, [("Content-Type", "text/event-stream")])
            return events(key) if kind == "events" else ticks(key)
        if kind == "broken":
            start_response(status, [*headers, ("Content-Length", "1000")])
            return broken()
        if kind == "like":
            return answer_like(Like.told_by(key), environ, start_response)
        if kind == "document":
            wrap = environ.get("wsgi.file_wrapper")
            headers += [("Content-Length", str(len(DOCUMENT))), ("X-Wrapped", str(wrap is not None))]
            start_response(status, headers)
            return wrap(document().open("rb"), 65536) if wrap else [document().read_bytes()]
        if kind == "echo":
            seen = environ_seen(environ)
            # A worker without a lifespan starts what it needs by itself.
            body = json.dumps(seen | {"started_in": seen["started_in"] or os.getpid()}).encode()
        elif kind == "upload":
            stream = environ["wsgi.input"]
            if not environ.get("wsgi.input_terminated"):
                stream = io.BytesIO(stream.read(int(environ.get("CONTENT_LENGTH") or 0)))
            body = json.dumps(Upload(key).read(stream.read)).encode()
        elif kind == "refuse":
            status, body = "413 Content Too Large", b"too large"
        elif kind == "board":
            board.put(key)
        elif kind == "slow":
            body = slow(key)
        elif kind == "gone":
            wait_until_gone(environ, key)
        elif kind == "hints" and "wsgi.early_hints" in environ:
            environ["wsgi.early_hints"]([("Link", HINT)])
        elif kind == "trailers" and "gunicorn.http2.send_trailers" in environ:
            start_response(status, headers)
            return with_trailers(environ)
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [body]

    return app


def answer_like(like: Like, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    if like.raises == "before":
        raise OnPurpose("before the response")
    headers = [("Content-Length", str(len(like.body)))] if like.is_sized else []
    start_response(f"{like.status} {HTTPStatus(like.status).phrase}", headers)
    body = b"" if environ["REQUEST_METHOD"] == "HEAD" else like.body
    return Blocks(body, raises=like.raises == "behind")


class Blocks:
    """A body in one block; a server cannot count the blocks, and may hear of an error when it closes them."""

    def __init__(self, body: bytes, *, raises: bool) -> None:
        self._body = body
        self._raises = raises

    def __iter__(self) -> Iterator[bytes]:
        yield self._body

    def close(self) -> None:
        if self._raises:
            raise OnPurpose("behind the response")


def with_trailers(environ: dict[str, Any]) -> Iterable[bytes]:
    yield b"hello"
    environ["gunicorn.http2.send_trailers"]([TRAILER])


def wait_until_gone(environ: dict[str, Any], key: str) -> None:
    """Return at once, and put "<key>-unseen" on the board, where the server does not let it be seen."""
    board.put(f"{key}-begun")
    connection = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    is_gone = environ.get("waitress.client_disconnected")
    if connection and not isinstance(connection, ssl.SSLSocket):  # where nobody can look ahead
        is_gone = partial(has_ended, connection)
    if not is_gone:
        board.put(f"{key}-unseen")
        return
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if is_gone():
            board.put(f"{key}-gone")
            return
        time.sleep(0.01)


def has_ended(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0]) and not connection.recv(1, socket.MSG_PEEK)
