"""`megatron-md generate`: continue prompts, or fill in what they leave open, and print the texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_md.commands.arguments import add_model_arguments, check_folder_of, placement, positive
from megatron_md.commands.sampler_arguments import (
    add_chat_arguments,
    add_sampler_arguments,
    check_strategy,
    print_text,
    sampler_keys,
)
from megatron_md.diffusion.sampler_config import EosHandling, SamplerConfig
from megatron_md.errors import UserError
from megatron_md.evaluate.canvas import can_stream
from megatron_md.evaluate.prompts import Prompt, read_prompts
from megatron_md.messages import tell
from megatron_md.run.saved import open_run

if TYPE_CHECKING:
    from megatron_md.evaluate.texts import Text

EXAMPLES = """examples:
  megatron-md generate runs/demo --prompt 'def main(' --length 64
  megatron-md generate runs/demo --length 128 --steps 32 --strategy ancestral --temperature 1 --samples 4
  megatron-md generate runs/demo --length 128 --block 32 --strategy threshold --threshold 0.8 --eos stop
  megatron-md generate runs/demo --prompt 'def [[4]](x): return [[12]] + 1' --infill
  megatron-md generate runs/demo --prompts-file prompts.jsonl --batch-size 16 --output texts.jsonl
  megatron-md generate runs/demo --prompt 'def main(' --save-trace trace.html
  megatron-md generate runs/demo --interactive
  megatron-md generate runs/sft --chat --prompt 'What is 2 + 3?' --block 32
"""

DEFAULT_LENGTH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    source = parser.add_argument_group(
        "what to write (default: a text without a prompt)"
    ).add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to continue")
    source.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help='a prompt on each line; {"prompt": TEXT} if it ends in .jsonl'
    )
    source.add_argument(
        "--interactive", action="store_true", help="read prompts from standard input, up to an empty line"
    )
    parser.add_argument(
        "--infill", action="store_true", help="fill in the prompt's placeholders: [[5]] stands for five open tokens"
    )
    how = parser.add_argument_group("how")
    add_sampler_arguments(how, length=DEFAULT_LENGTH)
    how.add_argument(
        "--eos", choices=get_args(EosHandling), help="what <eos> does: nothing (keep), end a text (with --chat), never"
    )
    how.add_argument("--logits-eos-inf", action="store_const", dest="eos", const="suppress", help="--eos suppress")
    add_chat_arguments(parser.add_argument_group("chat")).add_argument(
        "--chat", action="store_true", help='prompts are a user\'s messages; a .jsonl may hold {"messages": [...]}'
    )
    parser.add_argument("--samples", type=positive, default=1, help="texts for each prompt; their seeds follow --seed")
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="prompts of equal length that go together (8)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="FILE.jsonl", help="also write the texts as JSON lines")
    output.add_argument("--save-trace", type=Path, metavar="FILE.html", help="write a page that replays the steps")
    output.add_argument(
        "--no-stream", action="store_true", help="do not show a lone prompt's canvas at each step on a terminal"
    )


def run(args: argparse.Namespace) -> int:
    """Generate, print, and write what was asked for.

    Raises:
        UserError: bad input, with the way out.
    """
    # Before torch is imported.
    for name, path in (("--output", args.output), ("--save-trace", args.save_trace)):
        if path is not None and path.is_dir():
            raise UserError(f"{name} {path} is a folder: name a file")
        check_folder_of(path, f"{name} ")
    _check_infill(args)
    _check_chat(args)
    check_strategy(args)
    prompts = _prompts(args)
    _check_trace(args, prompts)
    sampler = {**({"eos": "stop"} if args.chat else {}), **sampler_keys(args)}
    length = DEFAULT_LENGTH if args.length is None else args.length
    if not args.infill:
        SamplerConfig(length=length, **sampler)
    saved = open_run(args.run_path, placement(args))

    from megatron_md.evaluate.texts import TextOptions, write_texts

    options = TextOptions(
        length=length,
        infill=args.infill,
        sampler=sampler,
        samples=args.samples,
        batch_size=args.batch_size,
        output=args.output,
        save_trace=args.save_trace,
        stream=not args.no_stream and can_stream(),
        chat=args.chat,
        template=args.template,
        system=args.system,
    )

    def show(text: Text, streamed: bool) -> None:
        if not streamed:
            print_text(text.text if args.infill or args.chat else text.prompt + text.text)
        tell(
            f"[{len(text.tokens)} tokens, {text.forward_passes} forward passes, {text.seconds:.1f} s, "
            f"step {saved.step} of {args.run_path}]"
        )

    write_texts(saved, prompts, options, show)
    return 0


def _check_infill(args: argparse.Namespace) -> None:
    if not args.infill:
        return
    if args.prompt is None and args.prompts_file is None and not args.interactive:
        raise UserError("--infill needs a prompt with placeholders, such as --prompt 'x = [[5]]'")
    for name in ("length", "block"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} does not go with --infill: the prompt says what is open; leave --{name} out")


def _check_chat(args: argparse.Namespace) -> None:
    for name in ("template", "system"):
        if getattr(args, name) is not None and not args.chat:
            raise UserError(f"--{name} belongs to --chat: ask for that, or leave --{name} out")
    if args.chat and args.infill:
        raise UserError("--infill fills in a text, --chat answers it: leave one out")
    if args.chat and args.prompt is None and args.prompts_file is None and not args.interactive:
        raise UserError("--chat needs a message: --prompt, --prompts-file or --interactive")


def _prompts(args: argparse.Namespace) -> list[Prompt] | None:
    """What to continue; None where it will be typed."""
    if args.interactive:
        return None
    if args.prompts_file is None:
        return [Prompt(args.prompt or "")]
    for name in ("output", "save_trace"):
        path = getattr(args, name)
        if path is not None and path.resolve() == args.prompts_file.resolve():
            raise UserError(f"--{name.replace('_', '-')} {path} would replace the prompts: name another file")
    return read_prompts(args.prompts_file, chat=args.chat)


def _check_trace(args: argparse.Namespace, prompts: list[Prompt] | None) -> None:
    if args.save_trace is None:
        return
    if prompts is None or len(prompts) != 1 or args.samples != 1:
        raise UserError("--save-trace replays one text: give one prompt and --samples 1")
    if args.output is not None and args.output.resolve() == args.save_trace.resolve():
        raise UserError(f"--output and --save-trace are both {args.output}: name two files")
