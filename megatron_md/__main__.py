"""`python -m megatron_md …` and `torchrun -m megatron_md …`: the same command line as `megatron-md …`."""

import sys

from megatron_md.cli import main

if __name__ == "__main__":
    sys.exit(main())
