"""A process of a small synchronous run with a watch: RUN_DIR HANG_TIMEOUT_S PEER_TIMEOUT_S STEPS [MISTAKE_PROCESS]."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtx.errors import UserError
from mtx.health.journal import Journal
from mtx.health.watch import Watch
from mtx.mesh import start_process


def main() -> int:
    run_dir, hang_timeout_s, peer_timeout_s, steps, *mistake = sys.argv[1:]
    start_process(peer_timeout_s=float(peer_timeout_s))
    process = jax.process_index()
    journal = Journal(Path(run_dir), config_digest="none", process=process)
    try:
        with Watch(
            Path(run_dir),
            process=process,
            num_processes=jax.process_count(),
            hang_timeout_s=float(hang_timeout_s),
            peer_timeout_s=float(peer_timeout_s),
            record=journal.record,
        ) as watch:
            for step in range(1, int(steps) + 1):
                watch.enter("data", step)
                time.sleep(0.05)
                if step == 10 and str(process) in mistake:
                    raise UserError("a mistake of one process")
                watch.enter("step", step)
                multihost_utils.process_allgather(np.ones(1))
            watch.enter("finish", step)
    except UserError as error:
        print(f"mtx: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
