"""`python -m megatron_rlhf`, the same as the console script."""

from __future__ import annotations

from megatron_rlhf.cli import run

if __name__ == "__main__":
    run()
