"""A service process that does nothing, for tests of the supervisor: `python stand_in.py ROLE [refuse | crash | mute]`.

`refuse` ends with status 2 and a sentence, `crash` with status 3, `mute` sends no heartbeat once it is ready.
"""

from __future__ import annotations

import sys
from typing import get_args

from weft.errors import SettingsError
from weft.messages import KvEvents, Role
from weft.prewarm import FLAG as PREWARM
from weft.service import Context, main
from weft.settings import CacheSettings
from weft.template import FLAG as TEMPLATE
from worker_svc.prewarm import become_worker
from worker_svc.template import fork_workers

ROLE: Role = next(role for role in get_args(Role) if role == sys.argv[1])
BEHAVIOUR = sys.argv[2] if len(sys.argv) > 2 else ""


class StandIn:
    def __init__(self, settings: CacheSettings, context: Context) -> None:
        self._context = context

    async def start(self) -> None:
        if BEHAVIOUR == "refuse":
            raise SettingsError("the folder has no weights")
        if BEHAVIOUR == "crash":
            sys.stderr.write("something snapped\n")
            sys.stderr.flush()
            sys.exit(3)

    async def drain(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def models(self) -> list[str]:
        return []

    def is_live(self) -> bool:
        return BEHAVIOUR != "mute"

    def stats(self) -> dict[str, float]:
        return {}

    def snapshot(self) -> KvEvents | None:
        return None


if __name__ == "__main__":
    start_times = {PREWARM: become_worker, TEMPLATE: fork_workers}.get(sys.argv[-1], lambda: None)()
    main(CacheSettings, ROLE, StandIn, prog="stand_in", argv=[], start_times=start_times)
