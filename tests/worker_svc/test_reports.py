"""What a worker says about itself: numbered, and true of what it holds."""

from __future__ import annotations

from weft import model_folder
from weft.columns import unpack_u32
from weft.messages import BlockHash
from weft.settings import ModelSettings
from worker_svc import reports
from worker_svc.engine_io import EngineLoad
from worker_svc.held import HeldRequest
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


def test_ended_choices_are_told_with_their_tenant_and_lengths() -> None:
    ann, bob = (HeldRequest(f"r-{name}", 1, "g1", {0}, {}, name, prompt) for name, prompt in (("ann", 7), ("bob", 9)))
    ended = Reports("w1", 7).ended("m", [(ann, 30), (ann, 0), (bob, 5)])
    assert (ended.worker, ended.model) == ("w1", "m")
    assert ended.request_ids == ["r-ann", "r-ann", "r-bob"] and ended.tenants == ["ann", "ann", "bob"]
    assert unpack_u32(ended.num_prompt_tokens) == [7, 7, 9] and unpack_u32(ended.num_output_tokens) == [30, 0, 5]


def test_status_says_what_the_worker_is_for() -> None:
    folder = model_folder.read(ModelSettings(model="tales-1m"))
    status = Reports("w1", 7, "decode").status(folder, "ready", EngineLoad(), 0, 8, block_load_s=0.25)
    assert (status.role, status.block_load_s) == ("decode", 0.25)
