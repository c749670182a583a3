"""`megatron-md chat RUN`: talk with a run on the terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse

from megatron_md.commands.arguments import add_model_arguments, placement
from megatron_md.commands.sampler_arguments import (
    add_chat_arguments,
    add_sampler_arguments,
    check_strategy,
    print_text,
    sampler_keys,
)
from megatron_md.evaluate.canvas import can_stream
from megatron_md.run.saved import open_run

EXAMPLES = """examples:
  megatron-md chat runs/sft
  megatron-md chat runs/sft --system 'Answer in one word.' --length 64 --block 16 --strategy threshold
  megatron-md chat runs/llada --template llada --length 128 --block 32 --confidence-eos-eot-inf
  echo 'What is 2 + 3?' | megatron-md chat runs/sft

Each line is a message. /reset forgets the conversation, /system TEXT begins a new one with another system text, /quit
or Ctrl-D ends the chat; Ctrl-C stops an answer. The oldest exchanges are forgotten where there is no room for them.
"""

DEFAULT_LENGTH = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    add_chat_arguments(parser.add_argument_group("chat"))
    how = parser.add_argument_group("how")
    add_sampler_arguments(how, length=DEFAULT_LENGTH)
    how.add_argument(
        "--logits-eos-inf", action="store_const", dest="eos", const="suppress", help="never generate <eos>"
    )
    parser.add_argument("--no-stream", action="store_true", help="do not show an answer's canvas at each step")


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends.

    Raises:
        UserError: bad options, with the way out.
    """
    check_strategy(args)
    from megatron_md.evaluate.chat_options import ChatOptions

    options = ChatOptions(
        length=DEFAULT_LENGTH if args.length is None else args.length,
        sampler=sampler_keys(args),
        template=args.template,
        system=args.system,
        stream=not args.no_stream and can_stream(),
    )
    options.config()  # contradictions are told before torch is imported
    saved = open_run(args.run_path, placement(args))
    from megatron_md.evaluate.chat import chat

    chat(saved, options, print_text)
    return 0
