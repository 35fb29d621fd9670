"""megatron_cm3leon: train CM3Leon, a decoder-only transformer over text and image tokens."""

import os

from megatron_cm3leon.common.version import __version__ as __version__

# A rank that ends makes torch's C++ warn in every other rank, with a stack of forty lines; the cause is told once
# instead (runtime/watchdog.py). torch reads the variable when it is loaded, and errors are still shown.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
