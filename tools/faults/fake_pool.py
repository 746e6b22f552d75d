"""`python -m tools.faults.fake_pool key=value ...`: a pool's real process, with fake engines."""

from __future__ import annotations

from actors import __main__ as command
from actors import pool

if __name__ == "__main__":
    pool.ENGINE = ("-m", "tools.faults.fake_engine")
    command.main()
