"""Memory that a step has freed stays with the process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import resource, sys, torch
from benchmark.train.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    kept = [torch.ones(1 << 20) for _ in range(8)]
    return float(sum(one.sum() for one in kept))
for _ in range(5):
    total = step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    total = step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20, total)
"""


# Where the system gives pages of 2 MB unasked, a step takes few of them.
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES = SETTING.exists() and "[always]" in SETTING.read_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_steps_after_the_first_ask_the_system_for_no_pages():
    def faults(mode: str) -> tuple[int, str]:
        printed = subprocess.run([sys.executable, "-c", STEPS, mode], check=True, capture_output=True, text=True).stdout.split()
        return int(printed[0]), printed[1]

    kept, usual = faults("keep"), faults("leave")
    assert kept[0] < 10
    assert usual[0] > (10 if HUGE_PAGES else 1000), "32 MB asked for anew are thousands of pages of 4 kB, and 16 of 2 MB"
    assert kept[1] == usual[1]
