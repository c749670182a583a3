"""The documentation is true: every command in it runs, every YAML block is a config, every name and link exists."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_md import cli
from megatron_md.config import Config, config_from_mapping, load_config
from megatron_md.config.loader import parse_yaml
from megatron_md.config.schema import keys_of
from megatron_md.parity.validate import default_reference
from megatron_md.run.check import check_config
from megatron_md.simulate.guard import compiler
from tests.data.small_corpus import made_up_code
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
WITH_NAMES = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]

# Commands that are not run here: the file that runs them.
ELSEWHERE = dict.fromkeys(("make demo", "make test"), ".ci/run")
ELSEWHERE["bash examples/speedrun/speedrun.sh"] = "tests/test_speedrun.py"
PINNED_INSTALL = re.compile(r"pip install --no-deps( [\w.-]+==[\w.]+)+")

# Commands that change no file another one reads: what stands in several documents is run once.
ONCE = (
    "megatron-md simulate ", "megatron-md parity validate", "megatron-md window ", "megatron-md doctor",
    "megatron-md generate ", "megatron-md evaluate ", "megatron-md report ", "sbatch ",
)  # fmt: skip

# What is added to a command so that it takes seconds: the last word of an option wins, as does the last override.
SMALLER = {
    "tokenizer train": ["--vocab", "330"],
    "data build": ["--workers", "1"],
    "train": ["model.hidden=32", "train.global_batch_size=8", "train.micro_batch_size=2",
              "validation.sequences=4", "log.tensorboard=false", "train.device=cpu"],
    "parity sweep": ["sweep.seeds=[1]", "train.steps=2", "train.global_batch_size=16", "train.micro_batch_size=16",
                     "train.device=cpu"],
    "sweep": ['sweep.arms={"U[0, 1]": [], "[0.4, 0.5]": ["objective.mask_schedule=paper"]}', "sweep.seeds=[1]",
              "train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=4", "validation.sequences=8",
              "train.device=cpu"],
    "schedule fit": ["--rows", "8", "--group", "1"],
    "parity validate": ["--reference", "record.json"],
    "doctor": ["--nproc-per-node", "1"],
    "generate": ["--length", "16", "--steps", "4"],
    "generate --infill": ["--steps", "4"],
    "simulate --sweep": ["--sweep", "1", "model.layers=1"],
    "simulate": ["model.layers=1"],
    "generate --chat": ["--length", "16", "--steps", "4"],
    "chat": ["--length", "16", "--steps", "4"],
    "evaluate --nelbo": ["--rows", "4"],
    "merge runs/chat": ["--last", "1"],
    "evaluate --generative": ["--samples", "4", "--length", "16", "--steps", "4"],
}  # fmt: skip

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a document in one language."""
    return [body for name, body in FENCE.findall(document.read_text()) if name == language]


def commands(document: Path) -> list[str]:
    """The command lines of a document, continuation lines joined, comments left out."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", document.read_text())


def main_in(folder: Path, words: list[str]) -> int:
    """`megatron-md WORDS` in a folder; also what a rank runs."""
    with contextlib.chdir(folder):
        return cli.main(words)


@dataclass
class Runner:
    """Runs documented commands in a folder, one after the other, each one smaller than it is written.

    Attributes:
        folder: where the files are that the documentation takes for given, at the same paths.
        steps: optimizer steps that each config has been trained for; the next command on it goes two further.
        launchers: kinds of launcher that have been started for real.
        done: commands of `ONCE`, and kinds of simulation, that have been run.
    """

    folder: Path
    steps: dict[str, int] = field(default_factory=dict)
    launchers: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    def run(self, command: str) -> None:
        """Run a command, or check it as far as one machine can.

        Raises:
            AssertionError: it failed, or nobody knows how to run it.
        """
        if command in self.done:
            return
        if command.startswith(ONCE):
            self.done.add(command)
        if command in ELSEWHERE:
            file = ELSEWHERE[command]
            assert command in (ROOT / file).read_text(), f"{file} does not run {command!r}"
        elif command == "pip install --no-deps .":
            flags = ["--no-build-isolation", "--no-index", "--target", str(self.folder / "installed")]
            self._start([sys.executable, "-m", "pip", "install", "-q", "--no-deps", *flags, str(ROOT)])
        elif PINNED_INSTALL.fullmatch(command):
            pins = (ROOT / "constraints.txt").read_text().splitlines()
            assert set(command.split()[3:]) <= set(pins), f"{command!r}: not the tested versions"
        elif command.startswith(("python docs/", "source ")):
            self._start(["bash", "-ec", command])
        elif command.startswith("sbatch "):
            self._submit(shlex.split(command)[1:])
        elif command.startswith("torchrun "):
            self._torchrun(shlex.split(command)[1:])
        elif command.startswith("megatron-md train "):
            self._train(shlex.split(command)[2:])
        else:
            assert command.startswith("megatron-md "), f"nobody runs {command!r}"
            self._command(shlex.split(command)[1:])

    def _command(self, words: list[str]) -> None:
        if words[0] == "simulate":
            kind = "simulate --sweep" if "--sweep" in words else "simulate"
            if kind in self.done:  # a layout takes as long as any other: the rest are checked
                args = cli.parse(words)
                config = load_config(self.folder / args.config, args.overrides)
                check_config(config, args.world_size or config.parallel.replica, corpora=False)
                return
            self.done.add(kind)
        names = [*(f"{words[0]} {word}" for word in words[1:]), words[0]]
        words = [*words, *next((SMALLER[name] for name in names if name in SMALLER), [])]
        # These start megatron-core's process groups, of which this process may hold some for other tests.
        starts_groups = (
            words[0] in ("generate", "evaluate", "chat", "schedule") or "--verify" in words or "validate" in words
        )
        code = run_ranks(main_in, 1, self.folder, words)[0] if starts_groups else main_in(self.folder, words)
        lacks_compiler = words[0] == "simulate" and compiler() is None
        assert code == (2 if lacks_compiler else 0), f"megatron-md {shlex.join(words)} returned {code}"

    def _train(self, words: list[str]) -> None:
        if "--nnodes" in words and "--dry-run" not in words:
            words = [*words, "--dry-run"]
        if "--dry-run" in words:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                assert main_in(self.folder, ["train", *words]) == 0, words
            assert "# layout and estimates" in output.getvalue()
            return
        count = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
        words = ["train", *words, *self._shorter(words)]
        if count > 1 and "megatron-md" not in self.launchers:
            self.launchers.add("megatron-md")
            self._start([sys.executable, "-m", "megatron_md", *words])
        else:
            assert run_ranks(main_in, count, self.folder, words) == [0] * count, words

    def _torchrun(self, words: list[str]) -> None:
        assert words[2:4] == ["-m", "megatron_md"] and words[4] in ("train", "parity"), words
        smaller = self._shorter(words[5:]) if words[4] == "train" else SMALLER["parity validate"]
        if "torchrun" in self.launchers:
            count = int(words[words.index("--nproc-per-node") + 1])
            assert run_ranks(main_in, count, self.folder, [*words[4:], *smaller]) == [0] * count, words
            return
        self.launchers.add("torchrun")
        self._start([sys.executable, "-m", "torch.distributed.run", *words, *smaller])

    def _shorter(self, words: list[str]) -> list[str]:
        """Overrides that make a run small, two steps further than the last one in the same directory."""
        place = next((word for word in words if word.startswith("run_dir=")), words[0])
        self.steps[place] = self.steps.get(place, 0) + 2
        return [*SMALLER["train"], "train.epochs=null", f"train.steps={self.steps[place]}"]

    def _submit(self, words: list[str]) -> None:
        """A batch script cannot run here: its syntax is checked, and its config with the words that it passes on."""
        script = next(number for number, word in enumerate(words) if not word.startswith("-"))
        subprocess.run(["bash", "-n", str(ROOT / words[script])], check=True)
        text = (ROOT / words[script]).read_text()
        (config,) = re.findall(r'^config="?(?:\$\{MEGATRON_MD_CONFIG:-)?([\w./]+)', text, re.MULTILINE)
        self._train([config, *words[script + 1 :], "--dry-run", "--world-size", "64"])

    def _start(self, words: list[str]) -> None:
        path = f"{self.folder / '.venv/bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def first_steps_of_the_record(steps: int) -> str:
    """The package's record of a k-parity run as if the run had ended early."""
    record = json.loads(default_reference().read_text())
    record["config"]["train"]["steps"] = record["config"]["accuracy"]["every_steps"] = steps
    record["config"]["log"]["every_steps"] = 1
    return json.dumps(
        {**record, "loss": record["loss"][:steps], "grad_norm": record["grad_norm"][:steps], "reached_step": None}
    )


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """A folder with text in `books`, dialogues, the examples, the environment and the documents' YAML files."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "books").mkdir()
    for number in range(200):
        (tmp_path / "books" / f"{number:03d}.txt").write_text(made_up_code(number))
    pairs = [{"prompt": made_up_code(number)[:80], "completion": made_up_code(number)[-80:]} for number in range(40)]
    (tmp_path / "dialogues.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/configuration.py").symlink_to(ROOT / "docs/configuration.py")
    (tmp_path / "record.json").write_text(first_steps_of_the_record(2))
    for document in DOCUMENTS:
        for body in blocks(document, "yaml"):
            heading = re.match(r"# ([\w/.-]+\.yaml)\n", body)
            if heading is not None:
                (tmp_path / heading[1]).write_text(body)
    yield Runner(tmp_path)


@pytest.mark.slow  # `make test-docs`, which .ci/run calls
@pytest.mark.distributed
@pytest.mark.timeout(900)  # some eighty commands, one after the other
def test_every_command_in_the_documentation_runs(runner: Runner) -> None:
    for document in DOCUMENTS:
        for command in commands(document):
            try:
                runner.run(command)
            except (AssertionError, subprocess.CalledProcessError, SystemExit, ValueError) as error:
                pytest.fail(f"{document.relative_to(ROOT)}: {command}\n{error}")
    assert runner.launchers == {"megatron-md", "torchrun"}, "one of the launchers was never started for real"
    # What the documents promise to be there afterwards.
    for name in (
        "summary.json",
        "metrics.jsonl",
        "config.yaml",
        "tokenizer.model",
        "env.json",
        "events.jsonl",
        "loss.png",
    ):
        assert (runner.folder / "runs/books" / name).is_file(), name
    assert (runner.folder / "docs/configuration.md").read_text() == (ROOT / "docs/configuration.md").read_text(), (
        "docs/configuration.md is out of date: python docs/configuration.py > docs/configuration.md"
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_block_is_a_config(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples/plugin"))
    for body in blocks(document, "yaml"):
        config = config_from_mapping(parse_yaml(body, document.name))
        check_config(config, config.parallel.tensor, corpora=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_fenced_block_says_what_it_is(document: Path) -> None:
    assert {name for name, _ in FENCE.findall(document.read_text())} <= {"bash", "yaml", "text", "python"}


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", WITH_NAMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_document_is_reached_from_the_readme() -> None:
    links = set(re.findall(r"\]\(([^)\s#]+)", prose(ROOT / "README.md")))
    assert {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")} <= links


KEYS = {".".join(path) for path, _ in keys_of(Config)}
SECTIONS = {key for key in KEYS if "." not in key}


def inline(document: Path) -> list[str]:
    """The inline code of a document."""
    return re.findall(r"`([^`\n]+)`", prose(document))


@pytest.mark.parametrize("document", WITH_NAMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_key_that_is_mentioned_exists(document: Path) -> None:
    for code in inline(document):
        key = re.match(r"([a-z_]+)(\.[a-z_]+)+(?=$|=|:| )", code)
        if key is None or key[1] not in SECTIONS or key[0].startswith("megatron.core"):
            continue
        assert key[0] in KEYS, f"`{code}`: no such key"


@pytest.mark.parametrize("document", WITH_NAMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_test_that_is_mentioned_exists(document: Path) -> None:
    for code in inline(document):
        path, _, test = code.partition("::")
        if not re.fullmatch(r"(megatron_md|tests|examples|benchmarks|tools|tokenizer|docs)/[\w./-]*", path):
            continue
        assert (ROOT / path).exists(), f"`{path}`: no such file"
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"`{code}`: no such test"


def test_versions_are_those_that_are_tested() -> None:
    text = (ROOT / "README.md").read_text()
    makefile, constraints = (ROOT / "Makefile").read_text(), (ROOT / "constraints.txt").read_text()
    (torch,) = re.findall(r"torch ([\d.]+\d)", text)
    assert f"torch=={torch}\n" in makefile
    core, newest = re.findall(r"megatron-core (0\.\d+\.\d+)", text)
    assert f"megatron-core=={core}\n" in constraints and f"NEWEST_CORE := {newest}\n" in makefile


def test_exit_codes_are_those_of_the_code() -> None:
    from megatron_md import errors as exit_codes

    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)}
    assert codes == {
        exit_codes.EXIT_DONE,
        exit_codes.EXIT_BAD_INPUT,
        exit_codes.EXIT_STOPPED,
        exit_codes.EXIT_ERROR,
    }
