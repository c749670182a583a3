"""Say where two runs' figures part: `python tools/compare_losses.py RUN_A RUN_B [--rtol 1e-5]`."""

import sys

from megatron_md.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
