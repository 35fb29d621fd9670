"""What every test shares."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the machine's cores belong to the ranks under test
