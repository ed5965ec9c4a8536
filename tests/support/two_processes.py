"""Two processes on this machine, by torchrun, for what is cut or shared over several devices."""

import os
import signal
import subprocess
import sys
from pathlib import Path

LONGEST = 240


def run_on_two_processes(script: Path, *arguments, cwd: Path | None = None) -> str:
    """What the processes printed. `--standalone` finds a free port, and none of them outlives the call."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launch, str(script), *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    )
    try:
        printed, told = process.communicate(timeout=LONGEST)
    except BaseException:
        # torchrun ends its workers where it is asked to end.
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        raise
    assert process.returncode == 0, told[-3000:]
    return printed
