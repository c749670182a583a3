"""Folders go in, are loaded and saved on other layouts, and come out the same to the byte."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md.checkpoint.directory import checkpoint_name, latest_checkpoint
from megatron_md.checkpoint.hf.convert import open_export, open_import
from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.checkpoint.hf.folder import HuggingFaceFolder
from megatron_md.checkpoint.storage import TensorReader
from megatron_md.config import load_config, to_yaml
from megatron_md.config.objective import BlockStage
from tests.checkpoint.hf_models import FAMILY_NAMES, contents, shape_of, write_model, write_tokenizer
from tests.ranks import RankError, run_ranks


def convert(source: Path, target: Path, family: str, **keys: Any) -> None:
    with open_import(source, FAMILIES[family], **keys) as ready:
        ready.write(target)


def export(source: Path, target: Path, family: str, **keys: Any) -> None:
    with open_export(source, FAMILIES[family], **keys) as ready:
        ready.write(target)


SHAPES: tuple[dict[str, Any], ...] = ({"kv_heads": 2}, {"kv_heads": 4, "tied": True}, {"kv_heads": 4}, {"tied": True})


@pytest.mark.parametrize(
    "keys", [*SHAPES[:2], *(pytest.param(keys, marks=pytest.mark.slow) for keys in SHAPES[2:])], ids=str
)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_folders_come_back_the_same_to_the_byte(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path / "hf", family, shape_of(family, **keys))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    (tmp_path / "hf" / "modeling.py").write_text("raise SystemExit('code of a folder is never run here')")
    convert(tmp_path / "hf", tmp_path / "run", family)
    export(tmp_path / "run", tmp_path / "back", family)
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def resave(run_dirs: list[Path], layout: dict[str, Any]) -> None:
    """On each rank: load the weights of runs and save them on this layout, at step 1."""
    from megatron_md import parallel
    from megatron_md.checkpoint.manager import CheckpointManager
    from megatron_md.train.progress import Progress
    from tests.small_run import SmallRun

    checkpoints = [latest_checkpoint(run_dir) or run_dir for run_dir in run_dirs]
    overrides = [f"parallel.{key}={value}" for key, value in layout.items()]
    configs = [load_config(checkpoint / "config.yaml", overrides) for checkpoint in checkpoints]
    with parallel.session(configs[0]) as world:
        for run_dir, checkpoint, config in zip(run_dirs, checkpoints, configs, strict=True):
            run = SmallRun(replace(config, objective=replace(config.objective, name="masked_diffusion")), world)
            text = (checkpoint / "config.yaml").read_text()
            manager = CheckpointManager(run_dir, keep_last=2, resolved_config=text)
            manager.load_model_only(run.chunks, run.optimizer, checkpoint)
            manager.save(run.chunks, run.optimizer, Progress(1, 8, 256, 10_000))


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor2": (2, {"tensor": 2}),
    "tensor4": (4, {"tensor": 4}),
    "pipeline2": (2, {"pipeline": 2}),
    "tensor2xpipeline2": (4, {"tensor": 2, "pipeline": 2}),
}
GRID = [(name, FAMILY_NAMES) for name in LAYOUTS]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "families"),
    [("tensor2xpipeline2", ("qwen3",)), *(pytest.param(*case, marks=pytest.mark.slow) for case in GRID)],
)
def test_weights_survive_other_layouts(layout: str, families: tuple[str, ...], tmp_path: Path) -> None:
    # 67 rows of vocabulary divide by no tensor-parallel size: they are padded on the way in and cut on the way out.
    size, keys = LAYOUTS[layout]
    shapes = [{"kv_heads": 4}, {"kv_heads": 4, "tied": True}] if layout == "tensor4" else SHAPES[:2]
    cases = {f"{family}-{number}": (family, shape) for family in families for number, shape in enumerate(shapes)}
    for name, (family, shape) in cases.items():
        write_model(tmp_path / name / "hf", family, shape_of(family, **shape))
        convert(tmp_path / name / "hf", tmp_path / name / "run", family)
    run_ranks(resave, size, [tmp_path / name / "run" for name in cases], keys)
    for name, (family, _) in cases.items():
        assert latest_checkpoint(tmp_path / name / "run").name == checkpoint_name(1)  # type: ignore[union-attr]
        rows = TensorReader(tmp_path / name / "run/checkpoints" / checkpoint_name(1)).tensors
        tensor = keys.get("tensor", 1)
        assert rows["embedding.word_embeddings.weight"][0][0] == -(-67 // tensor) * tensor
        export(tmp_path / name / "run", tmp_path / name / "back", family)
        assert contents(tmp_path / name / "back") == contents(tmp_path / name / "hf"), name


def test_a_data_type_can_be_chosen(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "hf", "llama", shape_of("llama"))
    convert(tmp_path / "hf", tmp_path / "run", "llama", dtype=torch.bfloat16)
    export(tmp_path / "run", tmp_path / "back", "llama")
    with HuggingFaceFolder(tmp_path / "back") as folder:
        for name, tensor in tensors.items():
            assert torch.equal(folder.read(name), tensor.to(torch.bfloat16)), name


def test_bf16_weights_stay_as_they_are(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llada", shape_of("llada"), dtype=torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "run", "llada")
    export(tmp_path / "run", tmp_path / "back", "llada")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


@pytest.mark.parametrize("vocab", [12, 20])
def test_a_mask_token_joins_tokenizer_and_weights(vocab: int, tmp_path: Path) -> None:
    from megatron_md.data.tokenizer import Tokenizer

    tensors = write_model(tmp_path / "hf", "llama", shape_of("llama", vocab=vocab))
    write_tokenizer(tmp_path / "hf")  # 12 tokens
    convert(tmp_path / "hf", tmp_path / "run", "llama", add_mask_token=True)
    tokenizer = Tokenizer(tmp_path / "run" / "tokenizer.model")
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (12, 11)
    assert tokenizer.decode(tokenizer.encode("abcd h")) == Tokenizer(
        tmp_path / "run" / "huggingface" / "tokenizer.json"
    ).decode([9, 10, 8])
    export(tmp_path / "run", tmp_path / "back", "llama")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["mask_token_id"] == 12 and config["vocab_size"] == max(vocab, 13)
    assert Tokenizer(tmp_path / "back" / "tokenizer.json").mask_token_id == 12
    with HuggingFaceFolder(tmp_path / "back") as folder:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = folder.read(name)
            assert torch.equal(rows[:vocab], tensors[name])
            if vocab == 12:
                torch.testing.assert_close(rows[12], tensors[name].mean(dim=0))


def test_a_run_of_ours_becomes_llada_and_llama(tmp_path: Path) -> None:
    run_ranks(save_own, 1, tmp_path / "run")
    for family in ("llada", "llama"):
        export(tmp_path / "run", tmp_path / family, family)
        assert "auto_map" in json.loads((tmp_path / family / "config.json").read_text()) or family == "llama"
        convert(tmp_path / family, tmp_path / f"again_{family}", family)
        export(tmp_path / f"again_{family}", tmp_path / f"{family}_2", family)
        assert contents(tmp_path / f"{family}_2") == contents(tmp_path / family)
    with pytest.raises(
        ValueError, match=r"model\.qk_norm is False, which qwen3 cannot express; export as llada or llama"
    ):
        export(tmp_path / "run", tmp_path / "qwen3", "qwen3")
    assert not (tmp_path / "qwen3").exists()


def test_a_block_run_of_ours_becomes_sdar_and_a_run_again(tmp_path: Path) -> None:
    run_ranks(save_blocks, 1, tmp_path / "run")
    with pytest.raises(ValueError, match="the code of qwen3 knows no blocks; export as sdar"):
        export(tmp_path / "run", tmp_path / "qwen3", "qwen3")
    export(tmp_path / "run", tmp_path / "hf", "sdar")
    assert json.loads((tmp_path / "hf/config.json").read_text())["block_size"] == 8
    convert(tmp_path / "hf", tmp_path / "again", "sdar")
    before, after = (TensorReader(latest_checkpoint(tmp_path / name) or tmp_path) for name in ("run", "again"))
    for name, (shape, _) in after.tensors.items():
        assert torch.equal(after.read(name, (0,) * len(shape), shape), before.read(name, (0,) * len(shape), shape))
    export(tmp_path / "again", tmp_path / "hf2", "sdar")
    assert contents(tmp_path / "hf2") == contents(tmp_path / "hf")


def test_a_folder_of_a_block_model_becomes_a_run_in_blocks(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "sdar", shape_of("sdar"), block_size=None)
    convert(tmp_path / "hf", tmp_path / "run", "sdar", block_size=7)
    config = load_config(tmp_path / "run/config.yaml")
    assert (config.objective.name, config.objective.block_size, config.data.seq_length) == ("block_diffusion", 7, 63)
    assert (config.objective.mask_logit, config.objective.right_shift) == ("keep", False)
    export(tmp_path / "run", tmp_path / "back", "sdar")
    before, after = (contents(tmp_path / name) for name in ("hf", "back"))
    own, told = (json.loads(folder.pop("config.json")) for folder in (before, after))
    assert told == {**own, "block_size": 7} and before == after


def save_blocks(run_dir: Path) -> None:
    """A checkpoint of a small run with a curriculum of block sizes."""
    from megatron_md.checkpoint.manager import CheckpointManager
    from megatron_md.train.progress import Progress
    from tests.small_run import small_run, variant

    stages = [BlockStage(2, 0.5), BlockStage(8)]
    config = variant(model={"qk_norm": True}, objective={"name": "block_diffusion", "block_size": stages})
    with small_run(config) as run:
        run.train(0, 1)
        manager = CheckpointManager(run_dir, keep_last=2, resolved_config=to_yaml(config))
        manager.save(run.chunks, run.optimizer, Progress(1, 8, 256, 10_000))


def save_own(run_dir: Path) -> None:
    """A checkpoint of a small run of this framework."""
    from tests.checkpoint.saved import save_checkpoint

    save_checkpoint(run_dir)


WRITERS = ("megatron_md.checkpoint.new_run.seal", "megatron_md.checkpoint.hf.folder.write_synced")


def test_what_stops_a_conversion_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"))
    convert(tmp_path / "hf", tmp_path / "run", "llama")

    def stop(error: BaseException) -> Any:
        def stopped(*args: Any, **kwargs: Any) -> None:
            raise error

        return stopped

    full = OSError(errno.ENOSPC, "No space left on device")
    for target, call, source in (("run2", convert, "hf"), ("back", export, "run")):
        for names, error, caught in (
            (("torch.save", "safetensors.torch.save_file"), full, ValueError),
            (WRITERS, full, ValueError),
            (("torch.save", "safetensors.torch.save_file"), KeyboardInterrupt(), KeyboardInterrupt),
        ):  # fmt: skip
            with monkeypatch.context() as patch:
                for name in names:
                    patch.setattr(name, stop(error))
                with pytest.raises(
                    caught, match=r"cannot be written .*No space left" if caught is ValueError else None
                ):
                    call(tmp_path / source, tmp_path / target, "llama")
            assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def convert_and_die(source: Path, target: Path, number: int) -> None:
    """In a process of its own: kill -9 while tensor `number` is made."""
    left = iter(range(number))

    def advance() -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    opened = open_import if (source / "config.json").is_file() else open_export
    with opened(source, FAMILIES["llama"]) as ready:
        ready.write(target, advance=advance)


def test_a_killed_conversion_leaves_nothing_that_looks_complete_and_can_be_repeated(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"))
    for source, target, call in (("hf", "run", convert), ("run", "back", export)):
        with pytest.raises(RankError, match="died without a word"):
            run_ranks(convert_and_die, 1, tmp_path / source, tmp_path / target, 7)
        assert not (tmp_path / target).exists() and (tmp_path / f".writing_{target}").is_dir()
        call(tmp_path / source, tmp_path / target, "llama")
        assert not (tmp_path / f".writing_{target}").exists()
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
