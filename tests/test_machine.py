"""What a measurement tells of this process alone."""

import subprocess
import sys

GROWN = """
import subprocess, sys
ballast = b"x" * 500_000_000
print(subprocess.check_output([sys.executable, "-c", sys.argv[1]]).decode())
"""
TELL = "from infold.machine import peak_bytes; print(peak_bytes())"


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it():
    told = subprocess.check_output([sys.executable, "-c", GROWN, TELL])
    assert 0 < int(told) < 200_000_000


def test_the_peak_stays_when_memory_is_given_back():
    code = "ballast = b'x' * 300_000_000; del ballast; " + TELL
    assert int(subprocess.check_output([sys.executable, "-c", code])) > 300_000_000
