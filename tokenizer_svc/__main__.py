"""`python -m tokenizer_svc`: chat templates, token ids and block hashes of one model."""

from __future__ import annotations

from tokenizer_svc.service import TokenizerService
from weft.service import main
from weft.settings import TokenizerSettings

if __name__ == "__main__":
    main(TokenizerSettings, lambda settings: settings.mesh, "tokenizer", TokenizerService, prog="tokenizer_svc")
