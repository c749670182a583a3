"""What `import megatron_md as md` offers: the commands as functions, each on this process alone or on a job's.

Nothing of the work is imported before a function is called.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from megatron_md.checkpoint.directory import Weights
    from megatron_md.data.dialogues import ChatSettings
    from megatron_md.data.encoding import Errors
    from megatron_md.data.shards import Manifest
    from megatron_md.data.tokenizer import Tokenizer
    from megatron_md.diffusion.nelbo import NelboReport
    from megatron_md.evaluate.compare import Difference
    from megatron_md.evaluate.texts import Text
    from megatron_md.run.saved import Device
    from megatron_md.train.inference import Inference

PathLike = str | Path
Split = Literal["all", "train", "valid"]


def train_tokenizer(
    inputs: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    vocab: int = 8192,
    split: Split = "all",
    encoding: str | None = None,
    errors: Errors = "strict",
) -> Tokenizer:
    """Train a SentencePiece tokenizer that keeps text and code exactly.

    Args:
        inputs: text files, folders of them, or `embedded` for Python's standard library.
        output: model file to write.
        vocab: number of pieces.
        split: documents to use.
        encoding: of the files; UTF-8 if None.
        errors: whether bytes that are not in it cost the document, are replaced or are left out.

    Raises:
        UserError: there is no text, or too little for so many pieces.

    Examples:
        >>> tokenizer = md.train_tokenizer("books/", "corpus/tokenizer.model", vocab=320)
        >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
        'Once upon a time'
    """
    from megatron_md.data import tokenizer
    from megatron_md.data.corpus import documents, texts
    from megatron_md.data.encoding import Encoding
    from megatron_md.data.readers import Reading

    corpus = documents(_list(inputs), split, reading=Reading(encoding=Encoding(encoding, errors)))
    return tokenizer.train_tokenizer(texts(corpus), vocab, output)


def build_data(
    inputs: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    tokenizer: PathLike,
    split: Split = "all",
    workers: int = 1,
    encoding: str | None = None,
    errors: Errors = "strict",
    chat: ChatSettings | None = None,
) -> Manifest:
    """Tokenise text, or dialogues, into a corpus of shards.

    Args:
        inputs: files, folders of them, or what else `megatron-md data build --input` takes.
        output: folder to create; an earlier build is replaced, an interrupted one goes on.
        tokenizer: SentencePiece model or `tokenizer.json`.
        split: documents to write, by a hash of their names.
        workers: processes that tokenise.
        encoding: of text files and JSON; UTF-8 if None.
        errors: whether bytes that are not in it cost the document, are replaced or are left out.
        chat: read dialogues, and mark their answers: `ChatSettings(ChatTemplate.of(Tokenizer(path), "llada"))`, from
            `megatron_md.data.dialogues`, `.chat_template` and `.tokenizer`.

    Raises:
        UserError: an input cannot be read.

    Examples:
        >>> corpus = md.build_data("books/", "corpus/train", tokenizer="corpus/tokenizer.model", split="train")
        >>> corpus.tokens > 1000
        True
        >>> valid = md.build_data("books/", "corpus/valid", tokenizer="corpus/tokenizer.model", split="valid")
    """
    from megatron_md.data.builder import build_corpus
    from megatron_md.data.encoding import Encoding

    return build_corpus(
        _list(inputs),
        tokenizer,
        output,
        split=split,
        workers=workers,
        encoding=Encoding(encoding, errors),
        chat=chat,
    )


def train(config: PathLike | Mapping[str, Any], **keys: Any) -> Path:
    """Train as a YAML file says, in this process or its place in a job; a run that exists goes on.

    Args:
        config: the file, or its sections as nested mappings.
        keys: what to change: `run_dir` and `seed`, sections as mappings, and the keys of the section `train`.

    Returns:
        The run directory. A run that was asked to stop has saved: the same call goes on.

    Raises:
        ConfigError: the config cannot be run, with a line for everything that is wrong.

    Examples:
        >>> run = md.train("books.yaml", steps=3, run_dir="runs/books", optimizer={"lr": 1e-3})
        >>> (run / "metrics.jsonl").exists()
        True
    """
    from megatron_md.config import Config, config_from_mapping, load_config
    from megatron_md.run.check import check_config

    given: dict[str, Any] = {}
    for name, value in keys.items():
        if name not in Config.__dataclass_fields__:
            given[f"train.{name}"] = value
        elif isinstance(value, Mapping):
            given |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            given[name] = value
    # JSON is YAML.
    overrides = [f"{name}={json.dumps(value, default=str)}" for name, value in given.items()]
    if isinstance(config, Mapping):
        asked = config_from_mapping(dict(config), overrides)
    else:
        asked = load_config(config, overrides)
    check_config(asked, int(os.environ.get("WORLD_SIZE", "1")))
    from megatron_md.run.pretrain import pretrain

    with _signals_kept():
        pretrain(asked)
    return Path(asked.run_dir)


def evaluate(
    run: PathLike,
    data: PathLike | Sequence[PathLike],
    *,
    device: Device = "auto",
    trust: bool = False,
    weights: Weights = "model",
    **options: Any,
) -> NelboReport:
    """A bound on the likelihood of data under a run (the likelihood itself of a causal one), with its error.

    Args:
        run: run directory or checkpoint.
        data: a corpus, or text files.
        device: where to compute.
        trust: load a checkpoint that has no manifest, and import what its config says.
        weights: the run's, or their average: `ema` (`train.ema_decay`).
        options: of `LikelihoodOptions`, such as `rows`, `passes`, `stderr` and `seed`.

    Raises:
        UserError: bad input, with the way out.

    Examples:
        >>> md.evaluate("runs/books", "corpus/valid", rows=8).nelbo < 20.0
        True
    """
    from megatron_md.run.saved import Placement, open_run

    saved = open_run(run, Placement(device=device, trust=trust, weights=weights))
    from megatron_md.evaluate.likelihood import LikelihoodOptions, likelihoods

    (table,) = likelihoods([saved], [str(path) for path in _list(data)], LikelihoodOptions(**options))
    return table.report()


@overload
def generate(run: PathLike, prompt: str = "", *, length: int = 64, **options: Any) -> Text: ...


@overload
def generate(run: PathLike, prompt: Sequence[str], *, length: int = 64, **options: Any) -> list[Text]: ...


def generate(
    run: PathLike,
    prompt: str | Sequence[str] = "",
    *,
    length: int = 64,
    infill: bool = False,
    batch_size: int = 8,
    device: Device = "auto",
    trust: bool = False,
    weights: Weights = "model",
    **sampler: Any,
) -> Text | list[Text]:
    """Continue a prompt, or several.

    Args:
        run: run directory or checkpoint.
        prompt: a text, or a list of them.
        length: tokens to write.
        infill: fill in the placeholders of the prompts instead: `[[5]]` stands for five open tokens.
        batch_size: prompts of equal length that go together.
        device: where to compute.
        trust: load a checkpoint that has no manifest, and import what its config says.
        weights: the run's, or their average: `ema` (`train.ema_decay`).
        sampler: of `SamplerConfig`, such as `steps`, `temperature`, `strategy` and `seed`.

    Returns:
        What was written, and how; a list for a list of prompts.

    Raises:
        UserError: bad input, with the way out.

    Examples:
        >>> text = md.generate("runs/books", "Once", length=8, steps=4, temperature=1.0)
        >>> len(text.tokens), text.forward_passes
        (8, 4)
    """
    from megatron_md.run.saved import Placement, open_run

    saved = open_run(run, Placement(device=device, trust=trust, weights=weights))
    from megatron_md.evaluate.prompts import Prompt
    from megatron_md.evaluate.texts import TextOptions, write_texts

    prompts = [Prompt(text, "prompt") for text in ([prompt] if isinstance(prompt, str) else prompt)]
    texts = write_texts(saved, prompts, TextOptions(length, infill, sampler, batch_size=batch_size))
    return texts[0] if isinstance(prompt, str) else texts


@contextmanager
def load(
    run: PathLike, *, device: Device = "auto", trust: bool = False, weights: Weights = "model"
) -> Iterator[tuple[Inference, Tokenizer]]:
    """A run's model, which gives logits, and its tokenizer, for as long as the block lasts; one at a time.

    Args:
        run: run directory or checkpoint.
        device: where to compute.
        trust: load a checkpoint that has no manifest, and import what its config says.
        weights: the run's, or their average: `ema` (`train.ema_decay`).

    Raises:
        UserError: bad input, with the way out.

    Examples:
        >>> with md.load("runs/books") as (model, tokenizer):
        ...     tokens = [*tokenizer.encode("Once upon"), tokenizer.mask_token_id]
        ...     logits = model(torch.tensor([tokens], device=model.device))
        >>> logits.shape[1] == len(tokens)
        True
    """
    from megatron_md.run.saved import Placement, open_run

    saved = open_run(run, Placement(device=device, trust=trust, weights=weights))
    from megatron_md import parallel
    from megatron_md.data.tokenizer import Tokenizer
    from megatron_md.evaluate.load import load_model

    tokenizer = Tokenizer(saved.tokenizer)
    with parallel.session(saved.config) as world:
        yield load_model(saved, world, tokenizer), tokenizer


def convert(
    source: PathLike,
    target: PathLike,
    *,
    family: str | None = None,
    to: Literal["megatron", "hf", "peft"],
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    trust: bool = False,
    weights: Weights = "model",
) -> Path:
    """Convert a Hugging Face folder into a run at step 0, or a run or checkpoint into a Hugging Face folder.

    Args:
        source: what to convert.
        target: folder to create.
        family: llada, dream, llama, qwen2 or qwen3; none where a LoRA run becomes a run.
        to: the direction; peft writes adapters alone, which are merged with their base otherwise.
        dtype: data type of the weights; as they are if None.
        trust: open a checkpoint that has no manifest to verify it by.
        weights: of a run that becomes a folder: its own, or their average (`ema`).

    Returns:
        The target.

    Raises:
        UserError: bad input; nothing has been written then.

    Examples:
        >>> md.convert("runs/books", "hf/books", family="llada", to="hf").name
        'books'
    """
    from megatron_md.checkpoint.hf import convert as conversion

    keys: dict[str, Any] = {"family": family, "to": to, "dtype": dtype}
    return conversion.convert(source, target, **keys, trust=trust, weights=weights, tell=lambda line: None)


def compare(run_a: PathLike, run_b: PathLike, *, rtol: float = 1e-5) -> dict[str, Difference]:
    """Where the figures that two runs have logged part, figure by figure.

    Raises:
        UserError: a run has no metrics, or they share no step.

    Examples:
        >>> md.compare("runs/books", "runs/books", rtol=0.0)["loss"].first_step is None
        True
    """
    from megatron_md.evaluate.compare import compare_runs

    return compare_runs(run_a, run_b, rtol=rtol)


def plot(run: PathLike, output: PathLike | None = None) -> Path:
    """Draw a run's losses.

    Args:
        run: run directory.
        output: picture to write (.png, .svg, .pdf); RUN/loss.png by default.

    Returns:
        Where the picture is.

    Raises:
        UserError: the run has no metrics, or the picture's format is unknown.

    Examples:
        >>> md.plot("runs/books").name
        'loss.png'
    """
    from megatron_md.evaluate.plot import plot_run

    picture = Path(output or Path(run) / "loss.png")
    plot_run(Path(run), picture)
    return picture


def _list(paths: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Training handles the signals that ask it to stop; afterwards they are the caller's again."""
    from megatron_md.train.resilience import SIGNALS

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
