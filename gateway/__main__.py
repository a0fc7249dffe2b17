"""`python -m gateway`"""

from gateway.service import GatewayService
from weft.service import main
from weft.settings import GatewaySettings

if __name__ == "__main__":
    main(GatewaySettings, lambda settings: settings.mesh, "gateway", GatewayService, prog="gateway")
