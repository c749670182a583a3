"""`python -m megatron_md …` and `torchrun -m megatron_md …`: the same command line as `megatron-md …`."""

import sys

from megatron_md.cli import main
from megatron_md.processes import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()  # before torch is imported, which takes seconds
    sys.exit(main())
