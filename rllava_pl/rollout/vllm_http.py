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
    """Raise a ModuleNotFoundError that says how to install the HTTP client, if it is missing."""
    try:
        import httpx  # noqa: F401
        import tenacity  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"rollouts from a vLLM server need {error.name}, which is not installed: pip install "
        raise ModuleNotFoundError(message + "'rllava-pl[vllm-server]'", name=error.name) from error


def base_url(url: str) -> str:
    """The address of a server without a slash at its end; a ValueError if it is not ``http://host:port``."""
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
        found = [ipaddress.ip_address(str(x[4][0]).partition("%")[0]) for x in socket.getaddrinfo(host, None)]
    except socket.gaierror as error:
        raise ServerError(f"vLLM server {url}: the host name {host!r} has no address ({error.strerror})") from error
    plain = {getattr(ip, "ipv4_mapped", None) or ip for ip in found}
    public = sorted(str(ip) for ip in plain if not ip.is_private)  # loopback and link-local addresses are private
    if public and not allow_remote:
        raise ValueError(
            f"{url} is at the public address {public[0]}, where others could replace the model; use the loopback or a "
            "private network, forward a port (ssh -L), or set allow_remote: true if the connection is protected"
        )


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
    ) -> Mapping[str, Any]:
        """Send a request and read its answer, empty where there is none.

        Args:
            method: ``GET`` or ``POST``.
            path: Of the route, with its query.
            purpose: What the request is for, for errors; follows "at" or "for".
            body: JSON, or JSON already written as bytes.
            hints: By status, what to do about a refusal.
            repeatable: Doing it twice is harmless, so it may be sent again when it did not get through.

        Raises:
            ServerError: No answer, or a refusal.
        """
        import httpx

        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if content else {}
        send = _retrying(1 + self._limits.max_retries if repeatable or method == "GET" else 1)
        server = f"vLLM server {self.url}"
        response: httpx.Response
        self._open.append(purpose)
        try:
            response = await send(self._client.request, method, self.url + path, content=content, headers=headers)
        except httpx.TimeoutException as error:
            seconds = self._limits.request_seconds
            raise ServerError(f"{server} did not answer within {seconds:g} s at {purpose}") from error
        except httpx.TransportError as error:
            detail = str(error) or type(error).__name__
            raise ServerError(f"{server} could not be reached for {purpose}: {detail}") from error
        finally:
            self._open.remove(purpose)
        if not response.is_success:
            status, key = response.status_code, "Set VLLM_API_KEY to the key the server was started with"
            hint = hints.get(status, key if status == 401 else "")
            reason = ". ".join(filter(None, (_refusal(response).rstrip("."), hint)))
            raise ServerError(f"{server} answered {status} at {purpose}: {reason}")
        try:
            answer = response.json() if response.content else {}
        except ValueError as error:
            text = response.text[:100]
            raise ServerError(f"{server} at {purpose} answered something that is not JSON: {text!r}") from error
        if not isinstance(answer, dict):
            raise ServerError(f"{server} at {purpose} answered {type(answer).__name__} in place of an object")
        return answer

    get = partialmethod(request, "GET")
    post = partialmethod(request, "POST")

    async def watch(self) -> None:
        """Check the health of the process that answers, and through it of its engine, until cancelled.

        Raises:
            ServerError: It did not answer for too long, or its engine has died; names what it was working on.
        """
        seconds = self._limits.silence_seconds
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                async with asyncio.timeout(seconds):
                    for path in ("/health", "/weight_info"):
                        response: httpx.Response = await _retrying()(self._client.get, self.url + path)
                        if not response.is_success:
                            fault = f"has died ({path} answers {response.status_code}), at {self._work()}"
                            raise ServerError(f"the engine of vLLM server {self.url} {fault}; its log says why")
            except TimeoutError:
                fault = f"vLLM server {self.url} did not answer health checks for {seconds:g} s; it hangs or is gone"
                raise ServerError(f"{fault}, at {self._work()}") from None

    def _work(self) -> str:
        others = len(self._open) - 1
        return (self._open[0] if self._open else "no request") + (f" and {others} more requests" if others > 0 else "")


def _retrying(attempts: int = 0) -> AsyncRetrying:
    """Repeats requests that did not get through or whose answer was lost, and those to a busy server.

    Without a number of attempts it does so until it is cancelled, at a constant pace, and a busy answer is an answer.
    """
    import httpx
    import tenacity

    lost = tenacity.retry_if_exception_type((httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout))
    if not attempts:
        return tenacity.AsyncRetrying(wait=tenacity.wait_fixed(POLL_SECONDS / 2), retry=lost)
    return tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_exponential(multiplier=RETRY_SECONDS, max=8 * RETRY_SECONDS),
        retry=lost | tenacity.retry_if_result(lambda response: response.status_code in BUSY),
        retry_error_callback=lambda state: state.outcome.result(),  # the last answer, or the last error
    )


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

    async def until_signalled() -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS / 4)
            abort_if_signalled()

    try:
        async with asyncio.TaskGroup() as group:
            watches = [group.create_task(server.watch()) for server in servers]
            watches += [group.create_task(until_signalled())] if sampling else []
            results = await asyncio.gather(*map(group.create_task, work))
            for watch in watches:
                watch.cancel()
        return results
    except BaseExceptionGroup as group_of_errors:
        first = group_of_errors.exceptions[0]
    raise first


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
