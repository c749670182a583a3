"""Tokenise text into shards: the same as `megatron-md data build`."""

import sys

from megatron_md.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "build", *sys.argv[1:]]))
