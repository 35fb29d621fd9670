"""Former name of megatron_cm3leon.runtime.preflight, which submitted job scripts call."""

import sys

from megatron_cm3leon.runtime.preflight import main

if __name__ == "__main__":
    sys.exit(main())
