"""`python -m cache_svc`: one shard of the KV cache."""

from __future__ import annotations

from cache_svc.service import CacheService
from weft.service import main
from weft.settings import CacheSettings

if __name__ == "__main__":
    main(CacheSettings, "cache", CacheService, prog="cache_svc")
