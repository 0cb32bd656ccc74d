"""The test process, before anything imports JAX: CPU, eight simulated devices, no compilation cache of the user's."""

import atexit
import os
import signal
import tempfile

# Where the tests are started in the background (`nohup`, `&` in a script) these are ignored, and would be by every
# program that a test starts and sends one of them to.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

os.environ["JAX_PLATFORMS"] = "cpu"
# The scheduler that is switched off starts independent collectives in different orders on different devices, which
# then wait for each other.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_backend_optimization_level=0"  # halves the compile time, which is most of what tests take
)
os.environ["PJRT_NPROC"] = "18"  # threads: a device that waits in a collective keeps one
os.environ["MTX_COMPILATION_CACHE"] = ""
_STATE = tempfile.TemporaryDirectory()
atexit.register(_STATE.cleanup)
os.environ["XDG_STATE_HOME"] = _STATE.name  # where launchers note their jobs
