"""The site with Django, as a WSGI app and as an ASGI app, and with Channels."""

import json
from collections.abc import AsyncIterable, Callable, Iterable
from typing import Any, TypeAlias

from tests.apps import (
    COOKIES,
    ETAG,
    EVENTS,
    OnPurpose,
    Upload,
    board,
    broken,
    broken_async,
    document,
    download,
    download_async,
    environ_seen,
    events,
    events_async,
    file_seen,
    noting_path_info,
    scope_seen,
    slow,
    ticks,
    ticks_async,
)

__all__ = ["channels_asgi", "django_asgi", "django_wsgi"]

Blocks: TypeAlias = Iterable[bytes] | AsyncIterable[bytes]


def django_wsgi() -> Any:
    configure_django(DjangoStreams(download, broken, events, ticks))
    from django.core.wsgi import get_wsgi_application

    return noting_path_info(get_wsgi_application())


def django_asgi() -> Any:
    configure_django(DjangoStreams(download_async, broken_async, events_async, ticks_async))
    from django.core.asgi import get_asgi_application

    return get_asgi_application()


def channels_asgi() -> Any:
    """Django's site behind the router of Channels, with two paths that consumers answer."""
    site = django_asgi()
    from channels.generic.http import AsyncHttpConsumer
    from channels.routing import ProtocolTypeRouter, URLRouter
    from django.urls import path, re_path

    class Hello(AsyncHttpConsumer):  # type: ignore[misc]
        async def handle(self, body: bytes) -> None:
            await self.send_response(200, b"hello", headers=[(b"Content-Type", b"text/plain")])

    class Events(AsyncHttpConsumer):  # type: ignore[misc]
        async def handle(self, body: bytes) -> None:
            await self.send_headers(headers=[(b"Content-Type", b"text/event-stream")])
            async for event in events_async(self.scope["url_route"]["kwargs"]["key"]):
                await self.send_body(event, more_body=event != EVENTS[-1])

    routes = [path("hello", Hello.as_asgi()), path("events/<key>", Events.as_asgi()), re_path("", site)]
    return ProtocolTypeRouter({"http": URLRouter(routes)})


class DjangoStreams:
    """The streams of the site: under ASGI, Django would collect those that are not async."""

    def __init__(
        self,
        download: Callable[[], Blocks],
        broken: Callable[[], Blocks],
        events: Callable[[str], Blocks],
        ticks: Callable[[str], Blocks],
    ) -> None:
        self.download, self.broken, self.events, self.ticks = download, broken, events, ticks


def configure_django(streams: DjangoStreams) -> None:
    from django.conf import settings
    from django.http import FileResponse, HttpResponse, HttpResponseNotModified, JsonResponse, StreamingHttpResponse
    from django.urls import path

    def hello(request: Any) -> Any:
        return HttpResponse("hello", content_type="text/plain")

    def echo(request: Any, _: str) -> Any:
        seen = scope_seen(request.scope) if hasattr(request, "scope") else environ_seen(request.META)
        response = JsonResponse(seen)
        response["X-Reply"] = request.headers.get("X-Ask", "")
        for cookie in COOKIES:
            name, _, value = cookie.partition(";")[0].partition("=")
            response.set_cookie(name, value)
        return response

    def empty(request: Any) -> Any:
        return HttpResponse(status=204)

    def unchanged(request: Any) -> Any:
        return HttpResponseNotModified(headers={"ETag": ETAG})

    def error(request: Any) -> Any:
        raise OnPurpose("before the response")

    def broken_(request: Any) -> Any:
        return StreamingHttpResponse(streams.broken(), headers={"Content-Length": "1000"})

    def form(request: Any) -> Any:
        return JsonResponse(request.POST.dict())

    def json_(request: Any) -> Any:
        return JsonResponse(json.loads(request.body))

    def multipart(request: Any) -> Any:
        file = request.FILES["file"]
        return JsonResponse(file_seen(file.name, file.read()))

    def upload(request: Any, key: str) -> Any:
        return JsonResponse(Upload(key).read(request.read))

    def refuse(request: Any) -> Any:
        return HttpResponse("too large", status=413)

    def download_(request: Any) -> Any:
        return StreamingHttpResponse(streams.download(), content_type="application/octet-stream")

    def events_(request: Any, key: str) -> Any:
        return StreamingHttpResponse(streams.events(key), content_type="text/event-stream")

    def ticks_(request: Any, key: str) -> Any:
        return StreamingHttpResponse(streams.ticks(key), content_type="text/event-stream")

    def slow_(request: Any, key: str) -> Any:
        return HttpResponse(slow(key))

    def document_(request: Any) -> Any:
        return FileResponse(document().open("rb"))

    def board_(request: Any, name: str) -> Any:
        if request.method == "POST":
            board.put(name)
            return HttpResponse(status=204)
        text = board.get(name)
        return HttpResponse(status=404) if text is None else HttpResponse(text)

    class Urls:
        urlpatterns = [  # noqa: RUF012  # as in every Django project
            path("hello", hello),
            path("echo/<path:_>", echo),
            path("empty", empty),
            path("unchanged", unchanged),
            path("error", error),
            path("broken", broken_),
            path("form", form),
            path("json", json_),
            path("multipart", multipart),
            path("upload/<key>", upload),
            path("refuse", refuse),
            path("download", download_),
            path("events/<key>", events_),
            path("ticks/<key>", ticks_),
            path("slow/<key>", slow_),
            path("document", document_),
            path("board/<name>", board_),
        ]

    settings.configure(
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=Urls,
        SECRET_KEY="of the tests",
        LOGGING={  # else Django would keep its errors to itself
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"console": {"class": "logging.StreamHandler"}},
            "loggers": {"django": {"handlers": ["console"], "level": "ERROR"}},
        },
    )
