"""`python -m worker_svc`: one model replica."""

from __future__ import annotations

from weft.service import main
from weft.settings import WorkerSettings
from worker_svc.service import WorkerService

if __name__ == "__main__":
    main(WorkerSettings, "worker", WorkerService, prog="worker_svc")
