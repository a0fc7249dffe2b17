"""`python -m worker_svc`: one model replica."""

from __future__ import annotations

import sys

from weft.prewarm import FLAG as PREWARM
from weft.service import main
from weft.settings import WorkerSettings
from weft.template import FLAG as TEMPLATE
from worker_svc import prewarm, template
from worker_svc.service import WorkerService

PROG = "worker_svc"

if __name__ == "__main__":
    argv, start_times, models = sys.argv[1:], None, None
    if argv == [PREWARM]:
        prewarm.import_engine()
        start_times = prewarm.become_worker()
    elif argv == [TEMPLATE]:
        models = template.load_to_share(PROG)
        start_times = template.fork_workers()
    main(
        WorkerSettings,
        "worker",
        lambda settings, context: WorkerService(settings, context, models),
        prog=PROG,
        argv=argv if start_times is None else [],
        start_times=start_times,
    )
