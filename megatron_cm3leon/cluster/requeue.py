"""Former name of megatron_cm3leon.slurm.requeue, which submitted job scripts call."""

import sys

from megatron_cm3leon.slurm.requeue import main

if __name__ == "__main__":
    sys.exit(main())
