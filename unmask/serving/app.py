"""The routes of the server, on starlette."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from unmask.errors import UnmaskError
from unmask.serving import answers
from unmask.serving.metrics import Metrics
from unmask.serving.protocol import RequestError
from unmask.serving.rows import Served
from unmask.serving.scheduler import Job, Scheduler
from unmask.serving.shapes import model_object

log = logging.getLogger(__name__)

LARGEST_BODY = 4 * 2**20  # bytes
BODY_SECONDS = 30.0  # until the whole body has come
SEND_SECONDS = 60.0  # that a client may take to read a chunk
REQUEST_SECONDS = 600.0  # of a request that says nothing else
LEFT = 499  # status in the metrics of a request whose client left

Respond = Callable[["Call"], Awaitable[None]]


class Call:
    """One request: what it asks for, and the way back to its client."""

    def __init__(self, server: Server, route: str, receive: Receive, send: Send):
        self.server, self.route, self.receive, self._send = server, route, receive, send
        self.body = b""
        self.seconds = REQUEST_SECONDS
        self.limit: asyncio.Timeout | None = None
        self.status = 0  # 0 = the response has not begun
        self.began = time.monotonic()
        kind = "chatcmpl" if "chat" in route else "cmpl"
        self.identity = f"{kind}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def within(self, seconds: float | None) -> None:
        """Set the time that the request has, from its beginning."""
        if seconds is not None and self.limit is not None:
            self.seconds = seconds
            self.limit.reschedule(asyncio.get_running_loop().time() + seconds - self.seconds_so_far)

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send a part of the response; a client that does not read it for too long is let go."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        async with asyncio.timeout(SEND_SECONDS):
            await self._send(message)  # pyright: ignore[reportArgumentType]

    @property
    def seconds_so_far(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self.began

    async def answer(self, response: Response) -> None:
        """Send a whole response."""
        await response({"type": "http"}, self.receive, self.send)

    async def json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send an object."""
        await self.answer(JSONResponse(content, status, headers))

    async def event(self, content: Any) -> None:
        """Send a server-sent event; `None` ends the stream."""
        if not self.status:
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            headers.append((b"x-accel-buffering", b"no"))  # nginx passes it on at once
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        data = "[DONE]" if content is None else json.dumps(content, ensure_ascii=False)
        body = f"data: {data}\n\n".encode()
        await self.send({"type": "http.response.body", "body": body, "more_body": content is not None})

    async def run(self, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Any]]:
        """Run jobs: (index, what it delivered), until each has ended; leaving it lets them go.

        Raises:
            RequestError: what one of them ended with.
        """
        loop, found = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()

        def deliver(index: int, item: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(found.put_nowait, (index, item))

        for index, job in enumerate(jobs):
            job.deliver = partial(deliver, index)
        self.server.scheduler.submit(jobs)
        left = len(jobs)
        try:
            while left:
                index, item = await found.get()
                if isinstance(item, Exception):
                    raise item
                left -= getattr(item, "done", True)
                yield index, item
        finally:
            if left:
                self.server.scheduler.cancel(jobs)


class Server:
    """What the routes share.

    Args:
        models: what requests can name; the first is for those that name none.
        api_key: what every request but those of /health has to bring.
    """

    def __init__(self, models: Sequence[Served], scheduler: Scheduler, api_key: str | None = None):
        self.models = {served.name: served for served in models}
        self.default = models[0]
        self.scheduler, self.metrics = scheduler, Metrics()
        self.key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        # Encodes prompts: one thread, since tokenizers are not shared between threads.
        self.encoding = ThreadPoolExecutor(1, "unmask-encode")

    def find(self, name: str | None) -> Served:
        """The model that a request names."""
        if name is None:
            return self.default
        if name not in self.models:
            known = ", ".join(self.models)
            raise RequestError(
                f"there is no model {name[:80]!r}; there is {known}.", "model", 404, "model_not_found"
            )
        return self.models[name]

    async def encoded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do what a tokenizer takes part in, outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.encoding, function, *arguments)

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Refuse a request without the key: `Bearer KEY`, or the password of HTTP's basic authentication."""
        if self.key is None:
            return
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip().encode("latin-1")  # as ASGI decodes headers
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                given = b""
        if kind.lower() not in ("bearer", "basic") or not hmac.compare_digest(
            hashlib.sha256(given).digest(), self.key
        ):
            error = RequestError("a valid API key is needed: Authorization: Bearer KEY.", status=401)
            error.code = "invalid_api_key"
            error.headers["WWW-Authenticate"] = 'Basic realm="unmask", charset="UTF-8"'  # browsers ask for it
            raise error

    def state(self) -> dict[str, float]:
        """What the metrics say of now."""
        return {
            "unmask_queue_requests": self.scheduler.waiting(),
            "unmask_running_rows": self.scheduler.num_running,
            "unmask_running_tokens": self.scheduler.tokens_running,
            "unmask_forward_passes_total": self.scheduler.forward_passes,
        }


class Endpoint:
    """A route that takes JSON: checks the key, reads the body, and lets the work go when the client leaves."""

    def __init__(self, server: Server, respond: Respond):
        self.server, self.respond = server, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by ASGI."""
        call = Call(self.server, scope["path"], receive, send)
        status = None
        try:
            request = Request(scope, receive)
            self.server.check_key(request.headers)
            call.body = await _body(request)
            status = await self._respond(call)
        except (RequestError, UnmaskError) as error:
            await _refuse(call, error)
        except (ClientDisconnect, OSError):
            status = LEFT
        finally:
            metrics, route = self.server.metrics, scope["path"]
            metrics.add("unmask_requests_total", route=route, status=status or call.status or 500)
            metrics.observe("unmask_request_seconds", call.seconds_so_far, route=route)

    async def _respond(self, call: Call) -> int | None:
        """Respond within the request's time, as long as the client is there."""
        work, gone = asyncio.create_task(_work(self.respond, call)), asyncio.create_task(_gone(call.receive))
        try:
            async with asyncio.timeout(REQUEST_SECONDS) as call.limit:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return await work if work.done() else LEFT
        except TimeoutError:
            message = f"not done within {call.seconds:g} seconds."
            raise RequestError(message, status=504, code="timeout") from None
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _work(respond: Respond, call: Call) -> int | None:
    try:
        await respond(call)
    except UnmaskError as error:
        await _refuse(call, error)
    except TimeoutError:  # it does not read
        return LEFT
    return None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which other sites' pages cannot send
        raise RequestError("Content-Type must be application/json.", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise RequestError(f"the body exceeds {LARGEST_BODY:,} bytes.", status=413)
    except TimeoutError:
        raise RequestError(f"the body did not come within {BODY_SECONDS:g} seconds.", status=408) from None
    return bytes(body)


async def _refuse(call: Call, error: UnmaskError) -> None:
    """Send an error, as a response or, where that has begun, as the last event of the stream."""
    refusal = error if isinstance(error, RequestError) else RequestError(str(error))
    with suppress(OSError, TimeoutError):
        if call.status:
            await call.event(refusal.body())
            await call.event(None)
        else:
            await call.json(refusal.body(), refusal.status, refusal.headers)


def make_app(server: Server) -> Starlette:
    """Make the ASGI application; its lifespan starts and ends the thread of the models."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        server.scheduler.start()
        try:
            yield
        finally:
            await asyncio.to_thread(server.scheduler.close)
            server.encoding.shutdown()

    def checked(show: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                server.check_key(request.headers)
                return show(request)
            except RequestError as error:
                return JSONResponse(error.body(), error.status, error.headers)

        return endpoint

    async def health(_: Request) -> Response:
        alive = server.scheduler.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    def metrics(_: Request) -> Response:
        return PlainTextResponse(server.metrics.text(server.state()), media_type="text/plain; version=0.0.4")

    def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_object(one) for one in server.models.values()]})

    def one_model(request: Request) -> Response:
        return JSONResponse(model_object(server.find(request.path_params["name"])))

    page = (files("unmask") / "templates" / "playground.html").read_text(encoding="utf-8")

    def playground(_: Request) -> Response:
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        )
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {
            404: f"there is no route {request.url.path[:80]}.",
            405: f"{request.method} is not allowed here.",
        }
        refusal = RequestError(said.get(error.status_code, error.detail), status=error.status_code)
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    routes = [
        Route("/health", health),
        Route("/metrics", checked(metrics)),
        Route("/v1/models", checked(models)),
        Route("/v1/models/{name:path}", checked(one_model)),
        Route("/", checked(playground)),
    ]
    for path, respond in (
        ("/v1/chat/completions", answers.chat),
        ("/v1/completions", answers.completions),
        ("/v1/infill", answers.infill),
        ("/v1/score", answers.score),
    ):
        routes.append(Route(path, Endpoint(server, respond), methods=["POST"]))
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: not_found})
