"""A small HTTP proxy in front of an object store that fails on request: by method and path, a number of times.

It listens on the loopback interface only, and forwards everything that no rule concerns.
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade"})


@dataclass
class Rule:
    """What happens to requests whose method and path (percent-decoded, with its query) match, ``count`` times."""

    method: str = ".*"
    path: str = ".*"
    count: float = float("inf")
    """How many requests it concerns; infinite for all."""
    skip: int = 0
    """How many matching requests pass before it begins."""
    status: int | None = None
    """Answer this status without asking the store."""
    code: str = "SlowDown"
    """The S3 error code of that answer."""
    delay: float = 0.0
    """Seconds before anything else happens."""
    reset: bool = False
    """Break the connection without asking the store."""
    lose_answer: bool = False
    """Let the store do it, then break the connection instead of answering."""
    cut_body: int | None = None
    """Break the connection after this many bytes of the answer's body."""
    then_down: bool = False
    """Once it has happened, every later request is reset."""
    hits: int = field(default=0, init=False)
    """How many requests matched."""

    def applies_to(self, method: str, path: str) -> bool:
        """Whether a request that came in falls under the rule; counts those that match."""
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self.hits += 1
        return self.skip < self.hits <= self.skip + self.count


@dataclass(frozen=True)
class Request:
    """One request that came in, and how it was answered (0: not at all)."""

    method: str
    path: str
    status: int


class FaultProxy:
    """Runs the proxy on a free port; ``rules`` apply first match first and may be changed at any time."""

    def __init__(self, upstream: str) -> None:
        self.rules: list[Rule] = []
        self.requests: list[Request] = []
        self.admits: Callable[[str], bool] | None = None
        """Whether the store takes the key that a request is signed with; a refused one is told that it has expired."""
        self.lock = threading.Lock()
        self.upstream = urlsplit(upstream)
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reset(self) -> None:
        """Forget every rule and request."""
        with self.lock:
            self.rules, self.requests, self.admits = [], [], None

    @contextmanager
    def failing(self, *rules: Rule) -> Iterator[Rule]:
        """Apply rules while the block runs; yields the first."""
        with self.lock:
            self.rules, before = [*rules, *self.rules], self.rules
        try:
            yield rules[0]
        finally:
            with self.lock:
                self.rules = before

    def rule_for(self, method: str, path: str) -> Rule | None:
        """The rule that this request falls under; counts it."""
        with self.lock:
            rule = next((rule for rule in self.rules if rule.applies_to(method, path)), None)
            if rule is not None and rule.then_down:
                self.rules = [Rule(reset=True)]
            return rule


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path)
        signed = re.search(r"(?:Credential=|OSS )([^/:]+)[/:]", self.headers.get("Authorization", ""))
        if self.owner.admits is not None and not self.owner.admits(signed[1] if signed else ""):
            text = "<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>it has expired</Message></Error>"
            self._answer(path, 403, {"Content-Type": "application/xml"}, text.encode())
            return
        rule = self.owner.rule_for(self.command, path)
        if rule is None:
            self._answer(path, *self._forward(body))
            return
        time.sleep(rule.delay)
        if rule.status is not None:
            text = f"<?xml version='1.0'?><Error><Code>{rule.code}</Code><Message>injected</Message></Error>"
            self._answer(path, rule.status, {"Content-Type": "application/xml"}, text.encode())
        elif rule.reset:
            self._break(path)
        elif rule.lose_answer:
            self._forward(body)
            self._break(path)
        else:
            self._answer(path, *self._forward(body), cut=rule.cut_body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815 - the names that the base class looks for

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = self.owner.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def _answer(self, path: str, status: int, headers: dict[str, str], body: bytes, *, cut: int | None = None) -> None:
        self.owner.requests.append(Request(self.command, path, status))
        self.send_response_only(status)
        given = {name.lower(): value for name, value in headers.items()}
        for name, value in given.items():
            if name not in _HOP_BY_HOP:
                self.send_header(name, value)
        length = given.get("content-length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        self.wfile.flush()
        if cut is not None and cut < len(body):
            self._hang_up()

    def _break(self, path: str) -> None:
        self.owner.requests.append(Request(self.command, path, 0))
        self._hang_up()

    def _hang_up(self) -> None:
        # With linger 0 the peer gets a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
