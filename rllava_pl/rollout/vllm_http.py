"""A vLLM server as its client sees it: addresses that are allowed, requests with limited retries, signs of life.

A long request says nothing until it is answered, so a server that hangs looks like one that works. Beside the requests
each server is therefore asked for a sign of life; one that gives none is named together with what it was working on.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar
from urllib.parse import urlsplit

from rllava_pl.distributed.signals import abort_if_asked

if TYPE_CHECKING:
    import httpx
    from tenacity import AsyncRetrying

POLL_SECONDS = 2.0
"""Pause between signs of life."""
RETRY_SECONDS = 0.5
"""Pause before the first retry; it doubles up to eight times as much."""
BUSY = frozenset({429, 502, 503, 504})
"""Answers after which the same request may succeed."""

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | float | bool | None"
T = TypeVar("T")


class ServerError(RuntimeError):
    """A vLLM server is dead, hung or set up otherwise than is needed; names the server and what was asked of it."""


@dataclass(frozen=True)
class Limits:
    """How long a server is waited for.

    Args:
        silence_seconds: A server that gives no sign of life for so long counts as dead.
        request_seconds: Longest time for one request, also on a server that is alive.
        max_retries: Further attempts at a request that changes nothing on the server and did not get through.
    """

    silence_seconds: float = 20.0
    request_seconds: float = 1800.0
    max_retries: int = 3

    def __post_init__(self) -> None:
        if self.silence_seconds <= 0 or self.request_seconds <= 0:
            raise ValueError(
                f"silence_seconds is {self.silence_seconds:g} and request_seconds {self.request_seconds:g}; both must "
                "be positive"
            )
        if self.max_retries < 0:
            raise ValueError(f"max_retries is {self.max_retries}; use 0 for a single attempt")


def require_client() -> None:
    """Refuse to go on where the HTTP client is missing.

    Raises:
        ModuleNotFoundError: Saying how to install it.
    """
    try:
        import httpx  # noqa: F401
        import tenacity  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"rollouts from a vLLM server need {error.name}, which is not installed: pip install "
            "'rllava-pl[vllm-server]'",
            name=error.name,
        ) from error


def base_url(url: str) -> str:
    """The address of a server without a slash at its end.

    Raises:
        ValueError: It is not of the form ``http://host:port``.
    """
    parts = urlsplit(url)
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ValueError(f"{url!r} is no address of a server; write it as http://host:port (keys go into VLLM_API_KEY)")
    return url.rstrip("/")


def check_host(url: str, *, allow_remote: bool) -> None:
    """Refuse a server outside this machine and the private networks around it.

    The routes that take weights ask for no key, so whoever reaches them owns the model; and prompts and weights travel
    in the clear.

    Raises:
        ValueError: An address of the host is public and ``allow_remote`` is not set.
        ServerError: The host's name has no address.
    """
    host = urlsplit(url).hostname or ""
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except socket.gaierror as error:
        raise ServerError(f"vLLM server {url}: the host name {host!r} has no address ({error.strerror})") from error
    public = sorted(address for address in found if not _private(address))
    if public and not allow_remote:
        raise ValueError(
            f"{url} is at the public address {public[0]}. Whoever reaches a server that takes weights can replace its "
            "model, so it belongs on the loopback or a private network; forward a port (ssh -L), or set "
            "allow_remote: true if something you trust guards the way"
        )


def _private(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_private or ip.is_loopback or ip.is_link_local


def new_client(limits: Limits) -> httpx.AsyncClient:
    """A client that goes straight to the servers: no proxies of the environment, no redirects.

    It opens a connection for every request. A kept one may have been closed by the server meanwhile, which is only
    noticed when a request is lost on it, and those that change weights must not be repeated.
    """
    import httpx

    key = os.environ.get("VLLM_API_KEY")
    return httpx.AsyncClient(
        timeout=httpx.Timeout(limits.request_seconds, connect=limits.silence_seconds),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        trust_env=False,
        follow_redirects=False,
    )


class Server:
    """One server.

    Args:
        url: Of the form ``http://host:port``.
        client: Shared by all servers.
        limits: How long to wait.
        concurrency: Rollout requests it is given at a time; it queues them itself, so this only bounds connections.
    """

    def __init__(self, url: str, client: httpx.AsyncClient, limits: Limits, *, concurrency: int) -> None:
        self.url = url
        self.context_tokens = 0
        """Longest prompt and response together; known after the first look at the server."""
        self.slots = asyncio.Semaphore(concurrency)
        self._client = client
        self._limits = limits
        self._doing: list[str] = []

    async def get(self, path: str, purpose: str, hints: Mapping[int, str] | None = None) -> Mapping[str, Json]:
        """Ask for something; see ``post``."""
        return await self._ask("GET", path, purpose, None, hints or {}, repeatable=True)

    async def post(
        self,
        path: str,
        purpose: str,
        body: Json | bytes = None,
        hints: Mapping[int, str] | None = None,
        *,
        repeatable: bool = False,
    ) -> Mapping[str, Json]:
        """Have something done.

        Args:
            path: Of the route, with its query.
            purpose: What it is for, in words that follow "at" or "for"; ends up in errors.
            body: JSON, or JSON already written as bytes.
            hints: By status, what to do about a refusal.
            repeatable: Doing it twice does no harm, so it may be sent again when it did not get through.

        Returns:
            The answer, empty where there is none.

        Raises:
            ServerError: No answer, or a refusal.
        """
        content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        return await self._ask("POST", path, purpose, content, hints or {}, repeatable=repeatable)

    async def _ask(
        self, method: str, path: str, purpose: str, content: bytes | None, hints: Mapping[int, str], *, repeatable: bool
    ) -> Mapping[str, Json]:
        import httpx

        self._doing.append(purpose)
        try:
            response: httpx.Response = await self._attempts(1 + self._limits.max_retries if repeatable else 1)(
                self._client.request,
                method,
                self.url + path,
                content=content,
                headers={"Content-Type": "application/json"} if content else {},
            )
        except httpx.TimeoutException as error:
            seconds = self._limits.request_seconds
            raise ServerError(f"vLLM server {self.url} did not answer within {seconds:g} s at {purpose}") from error
        except httpx.TransportError as error:
            detail = str(error) or type(error).__name__
            raise ServerError(f"vLLM server {self.url} could not be reached for {purpose}: {detail}") from error
        finally:
            self._doing.remove(purpose)
        if not response.is_success:
            hint = hints.get(response.status_code, _HINTS.get(response.status_code, ""))
            raise ServerError(
                f"vLLM server {self.url} answered {response.status_code} at {purpose}: {_detail(response).rstrip('.')}"
                + (f". {hint}" if hint else "")
            )
        return _read(response, f"vLLM server {self.url} at {purpose}")

    @staticmethod
    def _attempts(number: int) -> AsyncRetrying:
        import tenacity

        lost = tenacity.retry_if_exception_type(_lost())
        return tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(number),
            wait=tenacity.wait_exponential(multiplier=RETRY_SECONDS, max=8 * RETRY_SECONDS),
            retry=lost | tenacity.retry_if_result(lambda r: r.status_code in BUSY),
            retry_error_callback=lambda state: state.outcome.result(),  # the last answer, or the last error
        )

    async def watch(self) -> None:
        """Look after the server until cancelled.

        Raises:
            ServerError: It gave no sign of life for too long, or its engine has died; names what it was working on.
        """
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                async with asyncio.timeout(self._limits.silence_seconds):
                    await self._sign_of_life()
            except TimeoutError:
                raise ServerError(
                    f"vLLM server {self.url} gave no sign of life for {self._limits.silence_seconds:g} s; it hangs or "
                    f"is gone, at {self._work()}"
                ) from None

    async def _sign_of_life(self) -> None:
        """From the process that answers requests, and through it from the engine, which is another one."""
        import tenacity

        anew = tenacity.AsyncRetrying(
            wait=tenacity.wait_fixed(POLL_SECONDS / 2), retry=tenacity.retry_if_exception_type(_lost())
        )
        for path in ("/health", "/weight_info"):
            response: httpx.Response = await anew(self._client.get, self.url + path)
            if not response.is_success:
                raise ServerError(
                    f"the engine of vLLM server {self.url} has died ({path} answers {response.status_code}), at "
                    f"{self._work()}; its log says why"
                )

    def _work(self) -> str:
        if not self._doing:
            return "rest"
        others = len(self._doing) - 1
        return self._doing[0] + (f" and {others} more requests" if others else "")


def _lost() -> tuple[type[Exception], ...]:
    """Errors of requests that got through to no one, or whose answer was lost."""
    import httpx

    return httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout


_HINTS = {401: "Set VLLM_API_KEY to the key the server was started with"}


def _detail(response: httpx.Response) -> str:
    """The reason a server gives: ``{"error": {"message": ...}}``, ``{"error": ...}`` or ``{"detail": ...}``."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300] or "no reason given"
    reason = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return str(reason["message"] if isinstance(reason, dict) and "message" in reason else reason)[:1000]


def _read(response: httpx.Response, where: str) -> Mapping[str, Json]:
    if not response.content:
        return {}
    try:
        body = response.json()
    except ValueError as error:
        raise ServerError(f"{where} answered something that is not JSON: {response.text[:100]!r}") from error
    if not isinstance(body, dict):
        raise ServerError(f"{where} answered {type(body).__name__} in place of an object")
    return body


async def under_watch(
    servers: Sequence[Server], work: Sequence[Coroutine[object, object, T]], *, sampling: bool = False
) -> list[T]:
    """Results of ``work`` in order; the first failure, or the death of a server, ends all of it.

    Raises:
        Aborted: The work is sampling, and the run is asked to end.
    """
    tasks = [asyncio.create_task(piece) for piece in work]
    watches = [asyncio.create_task(server.watch()) for server in servers]
    if sampling:
        watches.append(asyncio.create_task(_until_asked()))
    everything = asyncio.create_task(_all(tasks))
    try:
        ends: list[asyncio.Task[object]] = [everything, *watches]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if everything not in done:
            next(watch for watch in watches if watch in done).result()  # raises: a watch ends in no other way
        return await everything
    finally:
        for task in [*tasks, *watches]:
            task.cancel()
        await asyncio.gather(everything, *tasks, *watches, return_exceptions=True)


async def _until_asked() -> None:
    while True:
        await asyncio.sleep(POLL_SECONDS / 4)
        abort_if_asked()


async def _all(tasks: Sequence[asyncio.Task[T]]) -> list[T]:
    return await asyncio.gather(*tasks)


class EventLoop:
    """An asyncio loop in a thread of its own: callers need none, and a notebook may have one running."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """Its result; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
