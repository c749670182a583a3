"""Train a tokenizer: the same as `megatron-md tokenizer train`."""

import sys

from megatron_md.cli import main

if __name__ == "__main__":
    sys.exit(main(["tokenizer", "train", *sys.argv[1:]]))
