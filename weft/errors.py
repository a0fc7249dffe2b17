"""Everything that can go wrong with a request, as one tree.

    WeftError
    ├── InvalidRequest       400  the client's fault; `param` names the field
    │   ├── PayloadTooLarge  413  larger than a stated limit
    │   ├── ContextLengthExceeded  400  prompt and completion are longer than the model's context
    │   └── NotFound         404  no such model or route
    ├── Unauthorized         401  no key, or one that is not known
    ├── Overloaded           429  admission said no; `retry_after_s` says when to come back
    │   └── QuotaExceeded    429  the tenant has used what it may
    ├── Unavailable          503  a role that the request needs is not there
    ├── DeadlineExceeded     504  a stated deadline passed
    ├── WorkerLost           500  the request took too many workers with it
    ├── DecodeError          500  bytes on the bus that are no message of ours
    ├── SettingsError          -  a bad setting or model folder; the process exits with status 2
    └── InvariantViolation   500  our own books do not balance: a bug

`ErrorInfo` in `messages.py` carries these across the bus by `code`; `from_code` brings them back.
"""

from __future__ import annotations

from typing import ClassVar


class WeftError(Exception):
    """Base of the tree; `str(error)` is safe to show to a client."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    # OpenAI's `error.type` for this class.
    openai_type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(WeftError):
    code = "invalid_request"
    http_status = 400
    openai_type = "invalid_request_error"


class PayloadTooLarge(InvalidRequest):
    code = "payload_too_large"
    http_status = 413


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class NotFound(InvalidRequest):
    code = "not_found"
    http_status = 404


class Unauthorized(WeftError):
    code = "invalid_api_key"
    http_status = 401
    openai_type = "authentication_error"


class Overloaded(WeftError):
    code = "overloaded"
    http_status = 429
    openai_type = "rate_limit_error"


class QuotaExceeded(Overloaded):
    code = "rate_limit_exceeded"


class Unavailable(WeftError):
    code = "unavailable"
    http_status = 503


class DeadlineExceeded(WeftError):
    code = "deadline_exceeded"
    http_status = 504


class WorkerLost(WeftError):
    code = "worker_lost"


class DecodeError(WeftError):
    code = "decode_error"


class SettingsError(WeftError):
    code = "bad_settings"


class InvariantViolation(WeftError):
    code = "invariant_violation"


_BY_CODE: dict[str, type[WeftError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        PayloadTooLarge,
        ContextLengthExceeded,
        NotFound,
        Unauthorized,
        Overloaded,
        QuotaExceeded,
        Unavailable,
        DeadlineExceeded,
        WorkerLost,
        DecodeError,
        SettingsError,
        InvariantViolation,
    )
}


def from_code(code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> WeftError:
    """Rebuild the error that `code` names; an unknown code becomes a plain `WeftError`."""
    return _BY_CODE.get(code, WeftError)(message, param=param, retry_after_s=retry_after_s)
