"""`python -m tokenizer_svc`: chat templates, token ids and block hashes of one model."""

from __future__ import annotations

import sys
from typing import Final

from tokenizer_svc.service import TokenizerService
from weft.service import main
from weft.settings import TokenizerSettings

# A chat template that loops shares the interpreter with the event loop, which waits this long for each such thread.
SWITCH_INTERVAL_S: Final = 0.0005

if __name__ == "__main__":
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    main(TokenizerSettings, "tokenizer", TokenizerService, prog="tokenizer_svc")
