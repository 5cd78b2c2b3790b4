"""One thread for every process of the tests.

Results are compared bit for bit, between threads, processes and resumed runs. Sums depend on how many threads share
them, and a pool of several does not always have all of them.
"""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before torch is imported
