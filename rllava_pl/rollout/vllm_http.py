"""The HTTP client of vLLM servers: allowed addresses, requests with limited retries, health checks.

A long request is silent until it is answered, so a server that hangs looks like one that works. The health of every
server is therefore checked beside its requests; the error names the server and the request it was working on.
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
from functools import partialmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rllava_pl.distributed.signals import abort_if_signalled
from rllava_pl.types import Json

if TYPE_CHECKING:
    import httpx
    from tenacity import AsyncRetrying

POLL_SECONDS = 2.0
"""Pause between health checks."""
RETRY_SECONDS = 0.5
"""Pause before the first retry; it doubles, up to eight times as much."""
BUSY = frozenset({429, 502, 503, 504})
"""Answers after which the same request may succeed."""

T = TypeVar("T")


class ServerError(RuntimeError):
    """A vLLM server is dead, hangs or was not started as needed; names the server and the request."""


@dataclass(frozen=True)
class RequestLimits:
    """How long to wait for a server.

    Args:
        silence_seconds: A server that fails its health check for so long counts as dead.
        request_seconds: Longest time for one request, also on a healthy server.
        max_retries: Further attempts at a request that changes nothing on the server and did not get through.
    """

    silence_seconds: float = 20.0
    request_seconds: float = 1800.0
    max_retries: int = 3

    def __post_init__(self) -> None:
        silence, request = self.silence_seconds, self.request_seconds
        if silence <= 0 or request <= 0:
            raise ValueError(f"silence_seconds is {silence:g} and request_seconds {request:g}; both must be positive")
        if self.max_retries < 0:
            raise ValueError(f"max_retries is {self.max_retries}; use 0 for a single attempt")


def require_client() -> None:
    """Check that the HTTP client is installed.

    Raises:
        ModuleNotFoundError: Saying how to install it.
    """
    try:
        import httpx  # noqa: F401
        import tenacity  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"rollouts from a vLLM server need {error.name}, which is not installed: pip install "
        raise ModuleNotFoundError(message + "'rllava-pl[vllm-server]'", name=error.name) from error


def base_url(url: str) -> str:
    """The address of a server without a slash at its end.

    Raises:
        ValueError: It is not of the form ``http://host:port``.
    """
    parts = urlsplit(url)
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ValueError(f"{url!r} is no address of a server; write http://host:port, and set a key as VLLM_API_KEY")
    return url.rstrip("/")


def check_host(url: str, *, allow_remote: bool) -> None:
    """Refuse a server outside of this machine and of private networks.

    The routes that take weights ask for no key, so everyone who reaches them controls the model; and prompts and
    weights are not encrypted.

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
            f"{url} is at the public address {public[0]}, where others could replace the model; use the loopback or a "
            "private network, forward a port (ssh -L), or set allow_remote: true if the connection is protected"
        )


def _private(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_private or ip.is_loopback or ip.is_link_local


def new_client(limits: RequestLimits) -> httpx.AsyncClient:
    """A client without proxies and redirects that opens a connection for every request.

    A connection that is kept may have been closed by the server, which only shows when a request is lost on it, and
    requests that change weights must not be repeated.
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
        concurrency: Open requests for samples; the server queues them itself, so this only bounds connections.
    """

    def __init__(self, url: str, client: httpx.AsyncClient, limits: RequestLimits, *, concurrency: int) -> None:
        self.url = url
        self.context_tokens = 0
        """Longest prompt and response together; 0 before the server was looked at."""
        self.slots = asyncio.Semaphore(concurrency)
        self._client = client
        self._limits = limits
        self._open: list[str] = []
        """Purposes of the requests that are not answered yet."""

    async def request(
        self,
        method: str,
        path: str,
        purpose: str,
        body: Mapping[str, object] | bytes | None = None,
        hints: Mapping[int, str] = MappingProxyType({}),
        *,
        repeatable: bool = False,
    ) -> Mapping[str, Json]:
        """Send a request and read its answer.

        Args:
            method: ``GET`` or ``POST``.
            path: Of the route, with its query.
            purpose: What the request is for, for errors; follows "at" or "for".
            body: JSON, or JSON already written as bytes.
            hints: By status, what to do about a refusal.
            repeatable: Doing it twice is harmless, so it may be sent again when it did not get through.

        Returns:
            The answer, empty where there is none.

        Raises:
            ServerError: No answer, or a refusal.
        """
        import httpx

        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if content else {}
        send = self._retrying(1 + self._limits.max_retries if repeatable or method == "GET" else 1)
        where = f"vLLM server {self.url} at {purpose}"
        self._open.append(purpose)
        try:
            response: httpx.Response = await send(
                self._client.request, method, self.url + path, content=content, headers=headers
            )
        except httpx.TimeoutException as error:
            seconds = self._limits.request_seconds
            raise ServerError(f"vLLM server {self.url} did not answer within {seconds:g} s at {purpose}") from error
        except httpx.TransportError as error:
            detail = str(error) or type(error).__name__
            raise ServerError(f"vLLM server {self.url} could not be reached for {purpose}: {detail}") from error
        finally:
            self._open.remove(purpose)
        status = response.status_code
        if not response.is_success:
            hint = hints.get(status, "Set VLLM_API_KEY to the key the server was started with" if status == 401 else "")
            reason = ". ".join(filter(None, (_refusal(response).rstrip("."), hint)))
            raise ServerError(f"vLLM server {self.url} answered {status} at {purpose}: {reason}")
        if not response.content:
            return {}
        try:
            answer = response.json()
        except ValueError as error:
            raise ServerError(f"{where} answered something that is not JSON: {response.text[:100]!r}") from error
        if not isinstance(answer, dict):
            raise ServerError(f"{where} answered {type(answer).__name__} in place of an object")
        return answer

    get = partialmethod(request, "GET")
    post = partialmethod(request, "POST")

    @staticmethod
    def _retrying(attempts: int) -> AsyncRetrying:
        import tenacity

        return tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_exponential(multiplier=RETRY_SECONDS, max=8 * RETRY_SECONDS),
            retry=tenacity.retry_if_exception_type(_lost()) | tenacity.retry_if_result(lambda r: r.status_code in BUSY),
            retry_error_callback=lambda state: state.outcome.result(),  # the last answer, or the last error
        )

    async def watch(self) -> None:
        """Check the server's health until cancelled.

        Raises:
            ServerError: It did not answer for too long, or its engine has died; names what it was working on.
        """
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                async with asyncio.timeout(self._limits.silence_seconds):
                    await self._check_health()
            except TimeoutError:
                raise ServerError(
                    f"vLLM server {self.url} did not answer health checks for {self._limits.silence_seconds:g} s; it "
                    f"hangs or is gone, at {self._work()}"
                ) from None

    async def _check_health(self) -> None:
        """Of the process that answers requests, and through it of the engine, which is another process."""
        import tenacity

        retrying = tenacity.AsyncRetrying(
            wait=tenacity.wait_fixed(POLL_SECONDS / 2), retry=tenacity.retry_if_exception_type(_lost())
        )
        for path in ("/health", "/weight_info"):
            response: httpx.Response = await retrying(self._client.get, self.url + path)
            if not response.is_success:
                raise ServerError(
                    f"the engine of vLLM server {self.url} has died ({path} answers {response.status_code}), at "
                    f"{self._work()}; its log says why"
                )

    def _work(self) -> str:
        if not self._open:
            return "no request"
        others = len(self._open) - 1
        return self._open[0] + (f" and {others} more requests" if others else "")


def _lost() -> tuple[type[Exception], ...]:
    """Errors of requests that did not get through, or whose answer was lost."""
    import httpx

    return httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout


def _refusal(response: httpx.Response) -> str:
    """The reason a server gives: ``{"error": {"message": ...}}``, ``{"error": ...}`` or ``{"detail": ...}``."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300] or "no reason given"
    reason = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return str(reason["message"] if isinstance(reason, dict) and "message" in reason else reason)[:1000]


async def run_while_healthy(
    servers: Sequence[Server], work: Sequence[Coroutine[object, object, T]], *, sampling: bool = False
) -> list[T]:
    """Results of ``work`` in order; the first failure, or the death of a server, cancels all of it.

    Raises:
        Aborted: The work is sampling, and the run is asked to end.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    watches = [asyncio.create_task(server.watch()) for server in servers]
    if sampling:
        watches.append(asyncio.create_task(_until_asked()))
    results = asyncio.gather(*tasks)
    try:
        ends: list[asyncio.Future[Any]] = [results, *watches]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for watch in watches:
            if watch.done() and not results.done():
                watch.result()  # raises: a watch ends in no other way
        return await results
    finally:
        for task in [*tasks, *watches]:
            task.cancel()
        await asyncio.gather(results, *tasks, *watches, return_exceptions=True)


async def _until_asked() -> None:
    while True:
        await asyncio.sleep(POLL_SECONDS / 4)
        abort_if_signalled()


class EventLoop:
    """An asyncio loop in a separate thread, because a notebook may already run one in the caller's."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """The coroutine's result; an interrupt of the caller cancels it."""
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
