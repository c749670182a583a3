"""Convert checkpoints between Hugging Face and Megatron: the same as `megatron-md convert`."""

import sys

from megatron_md.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
