"""`python -m megatron_rlhf`, the same as the console script."""

from __future__ import annotations

import sys

from megatron_rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
