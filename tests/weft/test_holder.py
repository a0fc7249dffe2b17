"""What every holder of requests owes the gateways: claims, remembered cancels, and an eye on who is there."""

from __future__ import annotations

from tests.support.ring import make_request
from weft.columns import unpack_u32
from weft.holder import MISSING_GATEWAY_S, Cancelled, MissingGateways, make_claims
from weft.messages import Heartbeat
from weft.roster import Roster


def test_each_gateway_gets_the_claims_on_its_own_requests() -> None:
    held = [make_request(name, epoch=4, gateway=gateway) for name, gateway in (("a", "g1"), ("b", "g2"), ("c", "g1"))]
    claims = dict(make_claims("worker", "w1", held))
    assert {gateway: found.request_ids for gateway, found in claims.items()} == {"g1": ["a", "c"], "g2": ["b"]}
    assert unpack_u32(claims["g1"].epochs) == [4, 4]


def test_cancels_are_forgotten_oldest_first() -> None:
    cancelled = Cancelled(max_remembered=2)
    for name in "abac":
        cancelled.remember(name, 1)
    assert [cancelled.covers(name, 1) for name in "abc"] == [True, False, True]


def test_lower_cancel_does_not_lower_a_higher_one() -> None:
    cancelled = Cancelled()
    cancelled.remember("a", 3)
    cancelled.remember("a", 1)
    assert cancelled.covers("a", 3) and not cancelled.covers("a", 4)


def test_a_gateway_that_is_never_heard_of_is_missing_after_a_while() -> None:
    roster = Roster()
    missing = MissingGateways(roster)
    roster.apply(Heartbeat("gateway", "here", 1, "ready"), 0.0)
    assert missing.find(["here", "gone"], 0.0) == []
    assert missing.find(["here", "gone"], MISSING_GATEWAY_S) == []
    assert missing.find(["here", "gone"], MISSING_GATEWAY_S + 0.1) == ["gone"]
    missing.forgive()
    assert missing.find(["gone"], MISSING_GATEWAY_S + 0.2) == []
