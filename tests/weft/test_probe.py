from __future__ import annotations

import socket

import pytest
from prometheus_client import CollectorRegistry

from weft import probe, telemetry


@pytest.mark.parametrize("ready", [True, False])
def test_probe_believes_ready(ready: bool) -> None:
    server = telemetry.serve("127.0.0.1", 0, CollectorRegistry(), lambda: True, lambda: ready)
    try:
        assert probe.is_ready(server.server_port) is ready
    finally:
        server.shutdown()
        server.server_close()


def test_probe_of_nobody_is_no() -> None:
    with socket.socket() as silent:
        # Bound only: others do not get its port, and connections are refused.
        silent.bind(("127.0.0.1", 0))
        assert not probe.is_ready(silent.getsockname()[1])
