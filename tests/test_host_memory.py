"""keep_freed_memory, in a process of its own: large arrays freed and made again fault in no new pages."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from moejax.host_memory import keep_freed_memory

assert keep_freed_memory() == bool(int(sys.argv[1]))
for _ in range(3):
    np.ones(2**23)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("keep", [True, False])
def test_memory_is_used_again(keep):
    # 5 arrays of 64 MiB are 81920 pages of 4 KiB; numpy asks for huge pages of 2 MiB, of which they are 160
    program = PROGRAM if keep else PROGRAM.replace("keep_freed_memory() ==", "0 ==")
    run = subprocess.run([sys.executable, "-c", program, str(int(keep))], capture_output=True, text=True, check=True)
    assert (int(run.stdout) < 100) == keep


TRIM = """
import numpy as np
from moejax.host_memory import give_freed_memory_back, keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

keep_freed_memory()
before = resident()
np.ones(2**25)
kept = resident() - before
assert give_freed_memory_back()
print(kept, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_kept_memory_is_given_back():
    run = subprocess.run([sys.executable, "-c", TRIM], capture_output=True, text=True, check=True)
    kept, left = map(int, run.stdout.split())
    assert kept > 2**27 and left < 2**25  # an array of 2**28 bytes
