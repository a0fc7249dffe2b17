"""`python -m scheduler_svc`: whether, when and where requests run."""

from __future__ import annotations

from scheduler_svc.service import SchedulerService
from weft.service import main
from weft.settings import SchedulerSettings

if __name__ == "__main__":
    main(SchedulerSettings, "scheduler", SchedulerService, prog="scheduler_svc")
