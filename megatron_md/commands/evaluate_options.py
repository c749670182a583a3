"""The options of `megatron-md evaluate`: which mode has which, and what they are where they are not given."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from megatron_md.commands.arguments import TEMPLATE, add_model_arguments, positive
from megatron_md.diffusion.conditional import ConditionalMethod
from megatron_md.diffusion.estimators import EstimatorName
from megatron_md.errors import UserError
from megatron_md.evaluate.detokenize import RULES

# A causal run has its own, and `neyman` needs to know what spread to expect.
ESTIMATORS = [name for name in get_args(EstimatorName) if name not in ("autoregressive", "neyman")]
METHODS = [name for name in get_args(ConditionalMethod) if name != "autoregressive"]

# What an option is where it is not given, by mode. An option that a mode does not have is refused there.
DEFAULTS: dict[str, dict[str, Any]] = {
    "nelbo": {
        "rows": None, "estimator": "complementary", "passes": 2, "stderr": None, "max_passes": 100, "seed": 0,
        "against": None, "state": None, "plot": None, "detokenizer": None, "words": False, "lines": False,
    },
    "tasks": {
        "include_path": None, "num_fewshot": None, "limit": None, "seeds": None, "seed": 0, "method": "monte_carlo",
        "draws": 128, "unsafe_code": False, "length": None, "steps": None, "block": None, "strategy": "low_confidence",
        "temperatures": None, "guidance": 0.0, "logits_eos_inf": False, "confidence_eos_eot_inf": False,
        "apply_chat_template": False, "template": None, "fewshot_as_multiturn": False, "state": None,
    },
    "generative": {
        "judge": None, "samples": 64, "length": None, "steps": None, "block": None, "strategy": "ancestral",
        "temperatures": [1.0], "reference": None, "seed": 0,
    },
}  # fmt: skip


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A list of numbers, as in 8,16,32."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part]

    parse.__name__ = "numbers"
    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    mode = parser.add_argument_group("what to evaluate (one of them)")
    mode.add_argument("--nelbo", nargs="+", metavar="DATA", help="likelihood on a manifest, or text files")
    mode.add_argument("--tasks", metavar="A,B", help="tasks of lm-evaluation-harness (pip install 'megatron-md[eval]')")
    mode.add_argument("--generative", action="store_true", help="perplexity of samples under a causal run, and entropy")
    parser.add_argument("--seed", type=int, help="seed of the masks and of sampling (0)")
    rows = "rows per forward pass (8)"
    parser.add_argument(
        "--micro-batch-size", "--batch-size", dest="micro_batch_size", type=positive, default=8, metavar="N", help=rows
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, and a card of the evaluation")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="keep what is found as it comes, and go on from it (--nelbo, --tasks)",
    )
    _add_nelbo(parser.add_argument_group("--nelbo"))
    _add_tasks(parser.add_argument_group("--tasks"))
    _add_generation(parser.add_argument_group("--generative, and tasks that generate"))


def _add_nelbo(group: Any) -> None:
    group.add_argument("--rows", type=positive, metavar="N", help="most rows to score (256; all with --words)")
    group.add_argument("--estimator", choices=ESTIMATORS, help="which positions are masked (complementary)")
    group.add_argument("--passes", type=int, metavar="N", help="least passes with new masks (2)")
    group.add_argument("--stderr", type=float, metavar="NATS", help="go on until the masks' part of the error is below")
    group.add_argument("--max-passes", type=int, metavar="N", help="but make at most so many (100)")
    group.add_argument("--against", metavar="RUN_B", help="compare with another run on the same rows and masks")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw cross-entropy by mask rate (.png, .svg, .pdf)")
    group.add_argument("--detokenizer", choices=sorted(RULES), help="undo the tokenisation that text files came with")
    _add_flag(group, "--words", "also perplexity per word of the files")
    _add_flag(group, "--lines", "each line of a file is a document")


def _add_tasks(group: Any) -> None:
    group.add_argument("--include-path", type=Path, metavar="DIR", help="folder with further tasks (YAML)")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (the task's own)")
    group.add_argument("--limit", type=float, metavar="N", help="only the first N questions of each task, or a share")
    group.add_argument("--seeds", type=_numbers(int), metavar="1,2,3", help="several seeds: means, spread, flip rates")
    group.add_argument("--method", choices=METHODS, help="how answers are scored (monte_carlo)")
    group.add_argument("--draws", type=positive, metavar="N", help="masked copies of an answer (128)")
    group.add_argument("--guidance", "--cfg", type=float, metavar="W", help="classifier-free guidance (0: off)")
    _add_flag(group, "--apply-chat-template", "put questions to RUN as its chat template says")
    group.add_argument("--template", metavar="T", help=TEMPLATE)
    _add_flag(group, "--fewshot-as-multiturn", "give the examples in the prompt as turns of the dialogue")
    _add_flag(group, "--logits-eos-inf", "never generate <eos>")
    _add_flag(group, "--confidence-eos-eot-inf", "generate what ends a text after all else")
    _add_flag(group, "--unsafe-code", "run tasks that execute what the model writes")


def _add_flag(group: Any, name: str, text: str) -> None:
    group.add_argument(name, action="store_true", default=None, help=text)


def _add_generation(group: Any) -> None:
    group.add_argument("--length", type=positive, metavar="N", help="tokens to generate (the task's; the run's row)")
    group.add_argument("--steps", type=_numbers(positive), metavar="8,16", help="denoising steps (one per token)")
    group.add_argument("--block", type=positive, metavar="N", help="tokens per block, filled left to right (all)")
    group.add_argument("--strategy", help="of the sampler (tasks: low_confidence, samples: ancestral)")
    group.add_argument(
        "--temperatures", "--temperature", type=_numbers(float), metavar="0.8,1", help="(the task's; samples: 1)"
    )
    group.add_argument("--judge", metavar="RUN_AR", help="the causal run that judges the samples")
    group.add_argument("--samples", type=positive, metavar="N", help="samples for each setting (64)")
    group.add_argument(
        "--reference", nargs="+", metavar="DATA", help="text to compare with (the run's data.valid, if it is there)"
    )


def settle(args: argparse.Namespace) -> str:
    """The mode, after its options got their defaults.

    Raises:
        UserError: not exactly one mode, or an option of another one.
    """
    modes = [mode for mode in DEFAULTS if getattr(args, mode)]
    if len(modes) != 1:
        raise UserError("give one of --nelbo DATA, --tasks NAMES and --generative; see megatron-md evaluate --help")
    (mode,) = modes
    known = DEFAULTS[mode]
    for name in sorted({name for options in DEFAULTS.values() for name in options}):
        if getattr(args, name) is None:
            setattr(args, name, known.get(name))
        elif name not in known:
            owners = " or ".join(f"--{owner}" for owner, options in DEFAULTS.items() if name in options)
            raise UserError(f"--{name.replace('_', '-')} belongs to {owners}, not to --{mode}")
    if mode == "tasks":
        args.steps, args.temperature = _one(args.steps, "--steps"), _one(args.temperatures, "--temperature")
        args.seeds = args.seeds or [args.seed]
        _check_tasks(args)
    if mode == "generative" and args.judge is None:
        raise UserError("--generative needs --judge RUN_AR: a causal run, such as an autoregressive baseline")
    return mode


def _check_tasks(args: argparse.Namespace) -> None:
    if args.limit is not None and not args.limit > 0.0:
        raise UserError(f"--limit {args.limit:g}: must be positive, a number of questions or a share below 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot}: must be 0 at least")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {','.join(map(str, args.seeds))}: one is there twice")
    for name in ("template", "fewshot_as_multiturn"):
        if getattr(args, name) and not args.apply_chat_template:
            raise UserError(f"--{name.replace('_', '-')} needs --apply-chat-template")


def _one(values: list[Any] | None, name: str) -> Any:
    if values is not None and len(values) != 1:
        raise UserError(f"{name}: tasks take one value, not {len(values)}")
    return values[0] if values else None


def settings_of(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Every option of a mode, for the evaluation's card."""
    names = [mode, *DEFAULTS[mode], "micro_batch_size", "device", "trust", "weights"]
    return {name: getattr(args, name) for name in names}
