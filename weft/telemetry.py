"""What a process tells about itself: log lines and, on a port of its own, /metrics, /live and /ready."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class FieldFormatter(logging.Formatter):
    """`12:00:01 worker-0 INFO request finished request_id=… tokens=…`"""

    def __init__(self, instance: str) -> None:
        super().__init__(f"%(asctime)s {instance} %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = " ".join(
            f"{name}={value if isinstance(value, int | float) else json.dumps(str(value))}"
            for name, value in vars(record).items()
            if name not in _PLAIN
        )
        head, newline, traceback = line.partition("\n")
        return f"{head} {fields}{newline}{traceback}" if fields else line


def start_logging(level: str, instance: str) -> None:
    """Log to standard error, one line a record."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FieldFormatter(instance))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("nats").setLevel(logging.CRITICAL)


def totals(counters: Any, prefix: str = "") -> dict[str, float]:
    """A dataclass of counters under the names of metrics, which end in `_total` for what only grows."""
    return {f"{prefix}{item.name}_total": float(getattr(counters, item.name)) for item in dataclasses.fields(counters)}


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds; they are not news."""


def serve(
    host: str, port: int, registry: CollectorRegistry, is_live: Callable[[], bool], is_ready: Callable[[], bool]
) -> WSGIServer:
    """Serve /metrics, /live and /ready from a thread; `shutdown()` the result to stop."""
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        check = {"/live": is_live, "/ready": is_ready}.get(environ["PATH_INFO"])
        if environ["PATH_INFO"] == "/metrics":
            body: Iterable[bytes] = metrics(environ, start_response)
            return body
        if check is None:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"try /metrics, /live or /ready\n"]
        good = check()
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if good else b"no\n"]

    server = make_server(host, port, application, handler_class=_QuietHandler)
    threading.Thread(target=server.serve_forever, name="telemetry", daemon=True).start()
    return server
