"""The project's pages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from django.contrib import admin, messages
from django.db import transaction
from django.http import HttpResponse, HttpResponseRedirect, JsonResponse, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.urls import path, reverse
from django.views.decorators.csrf import csrf_exempt

from tests.hybrid.apps import facts
from tests.hybrid.models import Note

admin.site.register(Note)


def show_notes(request: Any) -> Any:
    if request.method == "POST":
        with transaction.atomic():
            Note.objects.create(text=request.POST["text"])
            if "fail" in request.GET:
                raise ValueError("after the insert")
        messages.success(request, f"{request.user.username} saved {request.POST['text']}")
        return HttpResponseRedirect(reverse("notes"))
    return JsonResponse(
        {
            "notes": [note.text for note in Note.objects.order_by("pk")],
            "messages": [str(message) for message in messages.get_messages(request)],
            "token": get_token(request),
            "url": request.build_absolute_uri(),
        }
    )


@csrf_exempt
def upload(request: Any) -> Any:
    digest = hashlib.sha256()
    for chunk in request.FILES["file"].chunks():
        digest.update(chunk)
    return HttpResponse(digest.hexdigest())


def stream(request: Any) -> Any:
    def lines() -> Iterator[str]:
        for number in range(200):
            yield f"{number}: {Note.objects.count()}\n"

    return StreamingHttpResponse(lines(), content_type="text/plain")


def show_facts(request: Any) -> Any:
    return JsonResponse(facts)


urlpatterns = [
    path("admin/", admin.site.urls),
    path("notes/", show_notes, name="notes"),
    path("upload/", upload),
    path("stream/", stream),
    path("facts/", show_facts),
]
