"""One thread a process: the tests start ranks beside each other on few cores, where more threads only wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
