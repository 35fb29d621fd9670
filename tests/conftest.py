"""What every test shares."""

import os

# Before torch is imported: the machine's cores belong to the ranks under test; with tiny tensors a second
# thread costs more than it brings, and it sums in another order.
os.environ["OMP_NUM_THREADS"] = "1"
