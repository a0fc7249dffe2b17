"""What a worker says about itself: numbered, and true of what it holds."""

from __future__ import annotations

from weft import model_folder
from weft.messages import BlockHash
from weft.settings import ModelSettings
from worker_svc import reports
from worker_svc.engine_io import EngineLoad
from worker_svc.reports import Reports


def test_what_the_engine_has_not_seen_yet_counts_as_waiting() -> None:
    folder = model_folder.read(ModelSettings(model="tales-1m"))
    status = Reports("w1", 7).status(folder, "ready", EngineLoad(num_running=2), num_sequences=5, max_num_seqs=8)
    assert (status.num_running, status.num_waiting, status.max_num_seqs) == (2, 3, 8)


def test_what_was_dropped_but_still_runs_does_not_count() -> None:
    folder = model_folder.read(ModelSettings(model="tales-1m"))
    status = Reports("w1", 7).status(folder, "ready", EngineLoad(num_running=2), num_sequences=1, max_num_seqs=8)
    assert (status.num_running, status.num_waiting) == (1, 0)


def test_kv_events_count_from_one_and_a_snapshot_has_the_last_number() -> None:
    made, block_hash = Reports("w1", 7), BlockHash(bytes(16))
    assert made.kv_snapshot([]).sequence == 0
    assert [made.kv_events([block_hash], []).sequence for _ in range(3)] == [1, 2, 3]
    snapshot = made.kv_snapshot([block_hash])
    assert (snapshot.sequence, snapshot.snapshot, snapshot.stored) == (3, True, block_hash)


def test_schedulers_that_are_gone_leave_the_books_when_there_are_many() -> None:
    made, folder = Reports("w1", 7), model_folder.read(ModelSettings(model="tales-1m"))
    for number in range(reports.MAX_SCHEDULERS + 1):
        made.accept(f"s{number}", 1, ["s3"])
    status = made.status(folder, "ready", EngineLoad(), num_sequences=0, max_num_seqs=8)
    assert status.accepted == {"s3": 1, f"s{reports.MAX_SCHEDULERS}": 1}
