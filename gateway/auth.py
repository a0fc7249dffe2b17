"""API keys: who a request comes from. Keys are kept as SHA-256 only; without a keys file everybody is anonymous."""

from __future__ import annotations

import hmac
import re
from hashlib import sha256

from weft.errors import SettingsError, Unauthorized
from weft.tenants import NAME, read_lines

_LINE = re.compile(rf"({NAME}):([0-9a-f]{{64}})")


class ApiKeys:
    """The keys that are accepted, by tenant; `None` accepts everybody."""

    def __init__(self, hashes: dict[str, str] | None) -> None:
        """`hashes`: SHA-256 of a key, in hexadecimal, to its tenant."""
        self._hashes = hashes

    @classmethod
    def read(cls, path: str) -> ApiKeys:
        """Read a file of `tenant:sha256` lines; empty lines and `#` comments are skipped.

        Raises:
            SettingsError: the file cannot be read, or a line is not of that form.
        """
        if not path:
            return cls(None)
        hashes: dict[str, str] = {}
        for number, text in read_lines("api_keys_file", path):
            match = _LINE.fullmatch(text)
            if match is None:
                raise SettingsError(f"api_keys_file: {path}, line {number} is not `tenant:sha256 of the key`")
            hashes[match[2]] = match[1]
        if not hashes:
            raise SettingsError(f"api_keys_file: {path} has no keys; nobody could use this gateway")
        return cls(hashes)

    def tenant_of(self, authorization: str | None) -> str:
        """The tenant of an `Authorization: Bearer …` header; "" if no keys are asked for.

        Raises:
            Unauthorized: no key, or an unknown one.
        """
        if self._hashes is None:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("give an API key: `Authorization: Bearer YOUR_KEY`")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # Every entry is compared, so that the time says nothing about which ones exist.
        matches = [tenant for known, tenant in self._hashes.items() if hmac.compare_digest(known, digest)]
        if not matches:
            raise Unauthorized("this API key is not known")
        return matches[0]
