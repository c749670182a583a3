"""The command line: finds the command, runs it, and turns bad input into one line and exit code 2.

Only the module of the command that is asked for is imported, so that `--help` and refusals take no torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_md import __version__, cuda
from megatron_md.errors import EXIT_BAD_INPUT, EXIT_ERROR, RunFailedError, UserError, final
from megatron_md.installed import broken_ones_told
from megatron_md.messages import guard_tracebacks, shown, tell, tell_error

# Name: (module with `add_arguments(parser)` and `run(args) -> int`, what it does). The module's EXAMPLES, if any, are
# shown by --help.
COMMANDS = {
    "train": ("megatron_md.commands.train", "pretrain a model, as one YAML file says"),
    "simulate": (
        "megatron_md.commands.simulate",
        "memory, FLOPs, traffic and time of a step on GPUs that are not there",
    ),
    "tokenizer": ("megatron_md.commands.tokenizer", "train a tokenizer"),
    "data": ("megatron_md.commands.data", "build, verify and show tokenised corpora"),
    "generate": ("megatron_md.commands.generate", "write text with a trained model"),
    "chat": ("megatron_md.commands.chat", "talk with a trained model"),
    "convert": ("megatron_md.commands.convert", "convert checkpoints between Hugging Face and Megatron"),
    "merge": ("megatron_md.commands.merge", "write the mean of a run's checkpoints as a run"),
    "evaluate": (
        "megatron_md.commands.evaluate",
        "a run's likelihood, its answers to tasks, the quality of its samples",
    ),
    "inspect": ("megatron_md.commands.inspect", "say what a run or a checkpoint holds"),
    "window": ("megatron_md.commands.window", "predict a window of mask rates from a corpus"),
    "schedule": ("megatron_md.commands.schedule", "fit a mask schedule to a pilot run"),
    "plot": ("megatron_md.commands.plot", "draw a run's losses"),
    "report": ("megatron_md.commands.report", "write all that a run, or several, found as one page"),
    "sweep": ("megatron_md.commands.sweep", "train many variants of a run, with several seeds, and compare them"),
    "parity": ("megatron_md.commands.parity", "the k-parity task: theory against training, and a check of a machine"),
    "doctor": ("megatron_md.commands.doctor", "say what is installed here, what is missing, and whether training runs"),
    "compare": ("megatron_md.commands.compare", "say where two runs' figures part"),
}

EXAMPLES = """examples:
  megatron-md tokenizer train --help
  megatron-md data build --help
  megatron-md train examples/tiny/demo.yaml --nproc-per-node 2
  megatron-md train examples/8b/pretrain.yaml --dry-run --world-size 64
  megatron-md plot runs/demo
  megatron-md report runs/demo
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, shown(f"{self.prog}: {message}; see {self.prog} --help") + "\n")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command line, with the arguments of one command only."""
    description = "Pretraining of masked-diffusion language models on megatron-core."
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="megatron-md", description=description, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"megatron-md {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        module: Any = importlib.import_module(module_name) if name == command else None
        epilog = getattr(module, "EXAMPLES", None)
        sub = subparsers.add_parser(name, help=summary, description=summary, epilog=epilog, formatter_class=raw)
        if module is not None:
            module.add_arguments(sub)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line; ends the process with exit code 2 where there are others.

    Args:
        words: arguments without the program's name.
    """
    command = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser(command)
    args, rest = parser.parse_known_args(words)
    if rest:
        # argparse takes the words of `train CONFIG a=1 --dry-run b=2` only up to the first option.
        if not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
            parser.error(f"unknown argument(s) {' '.join(rest)}")
        args.overrides += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 2 bad input, 75 stopped on request with a saved checkpoint, 1 anything else.
    """
    if argv is None:
        guard_tracebacks()
    cuda.prepare_environment()
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        with broken_ones_told():
            module = importlib.import_module(COMMANDS[args.command][0])
            return final(int(module.run(args)))
    except (UserError, RunFailedError) as error:
        if os.environ.get("MEGATRON_MD_TRACEBACK"):
            raise
        _tell(error)
        return final(EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_ERROR)
    except (IsADirectoryError, NotADirectoryError, PermissionError, FileNotFoundError) as error:
        # A path on the command line that is not what it should be; in training such an error is a fault.
        if args.command == "train" or error.filename is None:
            raise
        tell(f"megatron-md: {error.filename}: {error.strerror}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        tell("megatron-md: interrupted")
        return EXIT_ERROR
    except BrokenPipeError:
        # The reader of our output has left (`| head`); nothing more can be said to it, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def _tell(error: Exception) -> None:
    """Print an error's lines; of several processes that meet it only the first one of each machine does."""
    if int(os.environ.get("RANK", "0")) == 0:
        tell_error(error)
    elif os.environ.get("LOCAL_RANK") == "0":
        tell_error(error, f"megatron-md on {socket.gethostname()}")
