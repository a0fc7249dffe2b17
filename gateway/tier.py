"""Which class and priority a request has: what it asks for, within what its tenant may have. Pure.

Source: `service_tier` of OpenAI's API reference, and vLLM's `priority`, of which the lowest goes first.
"""

from __future__ import annotations

from typing import Final

from gateway.fields import Fields, invalid
from weft import limits
from weft.tenants import SLO_CLASSES, USUAL_PRIORITY, Tenant

# Service tier → SLO class; "auto" is the tenant's own. "fast" is OpenAI's newer name of "priority".
_TIERS: Final = {**SLO_CLASSES, "fast": "priority", "auto": None}


def read_slo_class(fields: Fields, tenant: Tenant) -> tuple[str, str | None]:
    """The class whose objectives hold, and what to call it in the answer.

    As OpenAI does, a tier that the tenant may not use becomes its own, and the answer says so.
    """
    tier = fields.string("service_tier", limits.MAX_NAME_CHARS)
    if tier is not None and tier not in _TIERS:
        raise invalid("service_tier", f"one of {', '.join(_TIERS)}", tier)
    asked = _TIERS[tier or "auto"]
    slo_class = tenant.slo_class if asked is None or not tenant.may_use(asked) else asked
    return slo_class, (slo_class or "default") if tier is not None else None


def read_priority(fields: Fields, tenant: Tenant, slo_class: str) -> int:
    """vLLM's number, or what is usual for the class; no earlier than the tenant may be."""
    priority = fields.integer("priority", -limits.MAX_PRIORITY, limits.MAX_PRIORITY)
    if priority is None:
        return max(USUAL_PRIORITY[slo_class], tenant.earliest_priority)
    if priority < tenant.earliest_priority:
        raise invalid(
            "priority", f"at least {tenant.earliest_priority}, the earliest that this key may ask for", priority
        )
    return priority
