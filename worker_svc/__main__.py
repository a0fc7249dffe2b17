"""`python -m worker_svc`: one model replica."""

from __future__ import annotations

import sys

from weft.prewarm import FLAG
from weft.service import main
from weft.settings import WorkerSettings
from worker_svc import prewarm
from worker_svc.service import WorkerService

if __name__ == "__main__":
    began = None
    if is_prewarmed := sys.argv[1:] == [FLAG]:
        prewarm.import_engine()
        began = prewarm.wait_for_orders()
    main(
        WorkerSettings,
        "worker",
        WorkerService,
        prog="worker_svc",
        argv=[] if is_prewarmed else None,
        began=began,
    )
