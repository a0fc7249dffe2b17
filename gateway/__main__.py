"""`python -m gateway`: HTTP in, server-sent events out."""

from __future__ import annotations

from gateway.service import GatewayService
from weft.service import main
from weft.settings import GatewaySettings

if __name__ == "__main__":
    main(GatewaySettings, "gateway", GatewayService, prog="gateway")
