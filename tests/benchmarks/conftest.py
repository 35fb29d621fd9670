"""Makes the modules of benchmarks/ importable by name, as their scripts import them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
