"""Contradictions in a config: each one gets its line, and a sound config gets its layout."""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from megatron_md.config import Config, ConfigError, config_from_mapping
from megatron_md.data.builder import build_shards
from megatron_md.data.corpus import documents, texts
from megatron_md.data.entries import Document
from megatron_md.data.tokenizer import Tokenizer, train_tokenizer
from megatron_md.run.check import Layout, check_config, resolve_config
from megatron_md.run.check_corpora import corpus_problems, missing_files


def config_of(folder: Path, **sections: Any) -> Config:
    return config_from_mapping({"run_dir": str(folder / "run"), **sections})


def problems(config: Config, world: int = 1) -> list[str]:
    try:
        check_config(config, world, corpora=False)
    except ConfigError as error:
        return error.lines
    return []


def test_layout_of_a_sound_config(tmp_path: Path) -> None:
    parallel = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True}
    train = {"global_batch_size": 24, "micro_batch_size": 2}
    config = config_of(tmp_path, parallel=parallel, train=train)
    assert config.parallel.replica == 4
    assert check_config(config, 12, corpora=False) == Layout(
        tensor=2, pipeline=2, context=1, data=3, micro_batches=4, world=12
    )


@pytest.mark.parametrize(
    ("sections", "world", "expected"),
    [
        ({"model": {"heads": 3, "hidden": 128}}, 1, "model.heads 3 does not divide model.hidden 128"),
        ({"model": {"heads": 4, "kv_heads": 3}}, 1, "model.kv_heads 3 does not divide model.heads 4"),
        ({"model": {"heads": 2, "head_dim": 15}}, 1, "rotary positions need an even width per head, got 15"),
        ({"model": {"max_length": 128}}, 1, "data.seq_length 256 is longer than model.max_length 128"),
        ({"parallel": {"tensor": 4}}, 4, "parallel.tensor 4 does not divide model.heads 2"),
        ({"model": {"heads": 4, "kv_heads": 2}, "parallel": {"tensor": 4}}, 4, "does not divide model.kv_heads 2"),
        ({"model": {"ffn": 345}, "parallel": {"tensor": 2}}, 2, "parallel.tensor 2 does not divide model.ffn 345"),
        ({"parallel": {"sequence_parallel": True}}, 1, "parallel.sequence_parallel needs parallel.tensor > 1"),
        (
            {"parallel": {"tensor": 2, "sequence_parallel": True}, "data": {"seq_length": 255}},
            2,
            "parallel.tensor 2 does not divide data.seq_length 255",
        ),
        (
            {"parallel": {"overlap_param_gather": True, "overlap_grad_reduce": False}},
            1,
            "needs parallel.overlap_grad_reduce",
        ),
        ({"parallel": {"context": 4}}, 4, "parallel.context 4 does not divide the 2 of model.heads 2"),
        (
            {"model": {"heads": 4, "hidden": 64}, "parallel": {"tensor": 2, "context": 4}},
            8,
            "parallel.context 4 does not divide the 2 of model.heads 4 that a tensor-parallel rank has",
        ),
        (
            {"parallel": {"context": 2}, "data": {"seq_length": 255}},
            2,
            "parallel.context 2 does not divide data.seq_length 255",
        ),
        (
            {
                "model": {"heads": 4, "hidden": 64},
                "parallel": {"tensor": 2, "sequence_parallel": True, "context": 2},
                "data": {"seq_length": 254},
            },
            4,
            "parallel.tensor 2 x parallel.context 2 does not divide data.seq_length 254, which",
        ),
        ({"parallel": {"context": 2}}, 3, "3 processes are more than the layout needs"),
        ({"parallel": {"pipeline": 3}}, 3, "parallel.pipeline 3 does not divide model.layers 4"),
        (
            {"parallel": {"pipeline": 2, "virtual_pipeline": 4}},
            2,
            "parallel.pipeline 2 x parallel.virtual_pipeline 4 does not divide model.layers 4",
        ),
        ({"parallel": {"virtual_pipeline": 2}}, 1, "parallel.virtual_pipeline 2 needs parallel.pipeline > 1"),
        (
            {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "train": {"global_batch_size": 24}},
            2,
            "makes 3 micro-batches per rank; parallel.virtual_pipeline needs a multiple of parallel.pipeline 2",
        ),
        ({"parallel": {"first_stage_layers": 2}}, 1, "parallel.first_stage_layers 2 need parallel.pipeline > 1"),
        (
            {"parallel": {"pipeline": 3, "first_stage_layers": 1}},
            3,
            "parallel.first_stage_layers 1 leave 3 of model.layers 4 to 2 other stage(s)",
        ),
        (
            {"parallel": {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 2}},
            2,
            "leave 1 of model.layers 4 to 0 other stage(s)",
        ),
        ({"parallel": {"tensor": 2, "pipeline": 2}}, 2, "the layout needs 4 processes (tensor 2 x pipeline 2"),
        ({"parallel": {"tensor": 2}}, 3, "3 processes are more than the layout needs"),
        ({}, 3, "train.global_batch_size 16 is no multiple of 24 = data-parallel 3 x train.micro_batch_size: "),
        ({"train": {"global_batch_size": 12}}, 1, "train.global_batch_size 12 is no multiple of 8"),
        (
            {"train": {"batch_ramp": {"start": 12, "increment": 8, "steps": 2}}},
            1,
            "train.batch_ramp.start 12 is no multiple of 8",
        ),
        (
            {"train": {"batch_ramp": {"start": 8, "increment": 4, "steps": 2}}},
            1,
            "train.batch_ramp.increment 4 is no multiple of 8",
        ),
        ({"train": {"batch_ramp": {"start": 32, "increment": 8, "steps": 2}}}, 1, "is above train.global_batch_size"),
        ({"train": {"batch_ramp": {"start": 8, "increment": 8, "steps": 999}}}, 1, "is more than train.steps 400"),
        ({"optimizer": {"lr": 1e-4, "lr_schedule": {"min_lr": 1e-3}}}, 1, "min_lr 0.001 is above optimizer.lr 0.0001"),
        ({"optimizer": {"lr_schedule": {"name": "piecewise"}}}, 1, "piecewise needs points"),
        (
            {"optimizer": {"lr_schedule": {"name": "piecewise", "points": [[0.5, 1.0], [0.1, 2.0]]}}},
            1,
            "must come in order",
        ),
        ({"optimizer": {"lr_schedule": {"points": [[0.5, 1.0]]}}}, 1, "belong to piecewise, but the name is cosine"),
        ({"optimizer": {"lr_schedule": {"name": "constant", "decay_steps": 3}}}, 1, "belongs to cosine and wsd"),
        ({"objective": {"mask_schedule": "uniform:0.55,0.45"}}, 1, "'uniform:0.55,0.45': lo must be below hi"),
        ({"objective": {"mask_schedule": "uniform:0.5,0.5"}}, 1, "lo must be below hi"),
        ({"objective": {"mask_schedule": "uniform:-0.1,0.5"}}, 1, "the window must lie in [0, 1]"),
        ({"objective": {"mask_schedule": "uniform:0.5,1.5"}}, 1, "the window must lie in [0, 1]"),
        ({"objective": {"mask_schedule": "unifrom:0,1"}}, 1, "did you mean 'uniform'?"),
        ({"objective": {"name": "masked_difusion"}}, 1, "did you mean 'masked_diffusion'?"),
        ({"objective": {"importance": True, "mask_schedule": "uniform:0.4,0.6"}}, 1, "needs a density above 0"),
        ({"objective": {"importance": True, "mask_schedule": "point:0.4"}}, 1, "needs a density above 0"),
        (
            {"objective": {"name": "autoregressive", "attention_annealing": 0.1}},
            1,
            "objective.attention_annealing: attention of autoregressive is always causal; set it to 0",
        ),
        (
            {"objective": {"attention_annealing": 0.1}, "data": {"document_attention": "within_document"}},
            1,
            "attention_annealing hides pairs of whole rows, and data.document_attention within_document cuts them up",
        ),
        (
            {"train": {"precision": "fp8", "device": "cpu"}, "model": {"ffn": 352}},
            1,
            "train.precision fp8 needs a CUDA device with Transformer",
        ),
        (
            {"train": {"precision": "fp8", "micro_batch_size": 1}, "data": {"seq_length": 200}, "model": {"ffn": 352}},
            1,
            "needs train.micro_batch_size x data.seq_length on a rank to be a multiple of 16, got 200 / 1",
        ),
        (
            {
                "train": {"precision": "fp8", "micro_batch_size": 1},
                "data": {"seq_length": 48},
                "model": {"ffn": 352},
                "parallel": {"tensor": 2, "sequence_parallel": True},
            },
            2,
            "needs train.micro_batch_size x data.seq_length on a rank to be a multiple of 16, got 48 / 2",
        ),
        ({"train": {"precision": "fp8"}, "model": {"ffn": 344}}, 1, "needs model.ffn on a rank to be a multiple of 16"),
        (
            {"train": {"precision": "fp8"}, "model": {"ffn": 352}, "data": {"random_length_fraction": 0.1}},
            1,
            "takes rows of one length",
        ),
        ({"imports": ["no_such_plugin"]}, 1, "module 'no_such_plugin' cannot be imported"),
    ],
)
def test_each_contradiction_gets_one_line(tmp_path: Path, sections: dict[str, Any], world: int, expected: str) -> None:
    (line,) = problems(config_of(tmp_path, **sections), world)
    assert expected in line
    assert "\n" not in line


def test_contradictions_are_reported_together(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        parallel={"tensor": 3, "context": 2},
        data={"seq_length": 255},
        objective={"mask_schedule": "uniform:2,1"},
    )
    # 3 does not divide heads nor ffn, 2 not the rows, one process is too few, the window is bad.
    assert len(problems(config)) == 5


def test_full_support_admits_importance(tmp_path: Path) -> None:
    floor = [{"weight": 0.9, "schedule": "uniform:0.45,0.55"}, {"weight": 0.1, "schedule": "uniform:0,1"}]
    schedule = {"name": "mixture", "components": floor}
    assert not problems(config_of(tmp_path, objective={"importance": True, "mask_schedule": schedule}))


def test_uneven_stages_that_fit_pass(tmp_path: Path) -> None:
    parallel = {"pipeline": 3, "first_stage_layers": 1, "last_stage_layers": 1}
    assert not problems(config_of(tmp_path, parallel=parallel), 3)


def test_run_dir_must_be_a_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    (line,) = problems(config_of(tmp_path))
    assert line == f"run_dir {tmp_path}/run: {tmp_path}/run is a file"


def test_checkpoint_keys_must_make_sense_together(tmp_path: Path) -> None:
    (line,) = problems(config_of(tmp_path, checkpoint={"load_only": "model"}))
    assert line.startswith("checkpoint.load_only says what to take of checkpoint.load")
    *_, line = missing_files(config_of(tmp_path, checkpoint={"load": str(tmp_path / "nowhere")}))
    assert line == f"checkpoint.load: {tmp_path}/nowhere: no such run or checkpoint"
    (line,) = problems(config_of(tmp_path, checkpoint={"keep_best": 1}, validation={"sequences": 0}))
    assert line.startswith("checkpoint.keep_best chooses by val_nelbo")
    assert not problems(config_of(tmp_path, checkpoint={"load": str(tmp_path), "load_only": "model", "keep_best": 1}))


def test_an_average_of_the_weights_is_there_to_be_validated(tmp_path: Path) -> None:
    (line,) = problems(config_of(tmp_path, validation={"weights": "ema"}))
    assert line.startswith("validation.weights ema needs an average of the weights: set train.ema_decay")
    assert not problems(config_of(tmp_path, train={"ema_decay": 0.99}, validation={"weights": "ema"}))
    for field in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        (line,) = problems(config_of(tmp_path, train={"ema_decay": 0.99}, megatron={"optimizer": {field: True}}))
        assert f"train.ema_decay does not go with megatron.optimizer.{field}" in line


def test_plugin_module_is_imported_before_its_schedule_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halves_plugin.py").write_text(
        "import dataclasses, numpy as np\n"
        "from megatron_md.diffusion.schedule import Uniform, register_schedule\n"
        "@register_schedule('lower_half')\n@dataclasses.dataclass(frozen=True)\n"
        "class LowerHalf(Uniform):\n    lo: float = 0.0\n    hi: float = 0.5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sections = {"objective": {"mask_schedule": "lower_half:0,0.5", "name": "of_the_plugin"}}
    assert "lower_half" in problems(config_of(tmp_path, **sections))[0]
    assert not problems(config_of(tmp_path, imports=["halves_plugin"], **sections))
    del sys.modules["halves_plugin"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tokenizers, shards by the first, and shards by a smaller one."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [Document(d.name, d.text[:2000]) for d in islice(texts(documents()), 60)]
    for name, vocab, sample in (("a", 500, words), ("b", 500, words[:40]), ("small", 450, words)):
        train_tokenizer(sample, vocab, folder / f"{name}.model")
    build_shards(words, folder / "a.model", folder / "train")
    build_shards(words, folder / "small.model", folder / "small")
    return folder


def data_of(corpus: Path, **keys: Any) -> dict[str, Any]:
    paths = {"train": "train/manifest.json", "valid": "train/manifest.json", "tokenizer": "a.model"} | keys
    return {name: str(corpus / path) if path else None for name, path in paths.items()}


def corpus_lines(corpus: Path, tmp_path: Path, *, vocab: int | None = None, **keys: Any) -> list[str]:
    config = config_of(tmp_path, data=data_of(corpus, **keys), model={"vocab": vocab})
    try:
        check_config(config, 1)
    except ConfigError as error:
        return error.lines
    return []


def test_matching_corpora_pass_with_and_without_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    assert not corpus_lines(corpus, tmp_path)
    assert not corpus_lines(corpus, tmp_path, tokenizer=None, vocab=500)
    assert not corpus_lines(corpus, tmp_path, train="train")


def test_vocabulary_comes_from_config_tokenizer_or_shards(corpus: Path, tmp_path: Path) -> None:
    assert resolve_config(config_of(tmp_path, data=data_of(corpus), model={"vocab": 1000})).model.vocab == 1000
    assert resolve_config(config_of(tmp_path, data=data_of(corpus))).model.vocab == 500
    assert resolve_config(config_of(tmp_path, data=data_of(corpus, tokenizer=None, train="small"))).model.vocab == 450
    with pytest.raises(ConfigError, match=r"model\.vocab is null"):
        resolve_config(config_of(tmp_path))


def test_missing_files_say_how_to_make_them(corpus: Path, tmp_path: Path) -> None:
    lines = corpus_lines(corpus, tmp_path, train="none/manifest.json", tokenizer="none.model")
    assert lines == [
        f"data.train: {corpus}/none/manifest.json: no such file; make it with `megatron-md data build`",
        f"data.tokenizer: {corpus}/none.model: no such file; make it with `megatron-md tokenizer train`",
    ]
    (tmp_path / "empty").mkdir()
    config = config_of(tmp_path, data=data_of(corpus, train=tmp_path / "empty"))
    assert [f"{tmp_path}/empty/manifest.json: no such file" in line for line in missing_files(config)] == [True]


def test_validation_needs_a_corpus_unless_it_is_off(tmp_path: Path) -> None:
    assert [line[:22] for line in missing_files(config_of(tmp_path))] == [
        "data.train is not set:",
        "data.valid is not set,",
    ]
    assert len(missing_files(config_of(tmp_path, validation={"sequences": 0}))) == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tokenizer": "b.model"}, ["data.train: .* was made with another tokenizer"] * 2),
        ({"tokenizer": "small.model"}, ["vocabulary of 500, but data.tokenizer .* has 450"] * 2),
        ({"valid": "small"}, ["data.valid: .* vocabulary of 450, but .* has 500"]),
        ({"valid": "small", "tokenizer": None}, ["data.valid: .* but data.train .* has 500"]),
        ({"vocab": 450}, ["model.vocab 450 is smaller than the vocabulary of data.tokenizer .*, 500"]),
        ({"vocab": 2}, ["the mask token id .* of data.tokenizer .* is outside the vocabulary: model.vocab is 2"]),
        ({"vocab": 2, "tokenizer": None}, ["the mask token id .* of data.train .* is outside the vocabulary"]),
    ],
)
def test_files_that_contradict_each_other(
    corpus: Path, tmp_path: Path, keys: dict[str, Any], expected: list[str]
) -> None:
    lines = corpus_lines(corpus, tmp_path, **keys)
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        with pytest.raises(ValueError, match=pattern.replace("data.train: ", "data.(train|valid): ")):
            raise ValueError(line)


def test_damaged_files_are_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    (tmp_path / "bad.model").write_bytes(b"no model")
    lines = list(
        corpus_problems(config_of(tmp_path, data=data_of(corpus, valid=tmp_path, tokenizer=tmp_path / "bad.model")))
    )
    assert [line.split(": ")[:2] for line in lines] == [
        ["data.tokenizer", f"{tmp_path}/bad.model"],
        ["data.valid", f"{tmp_path}/manifest.json"],
    ]


def test_a_corpus_must_hold_at_least_one_row(corpus: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, data={**data_of(corpus), "seq_length": 10**6})
    lines = list(corpus_problems(config))
    assert len(lines) == 2 and all("less than data.seq_length 1000000" in line for line in lines)


def test_the_fixture_has_three_different_tokenizers(corpus: Path) -> None:
    assert len({Tokenizer(corpus / f"{name}.model").sha256 for name in ("a", "b", "small")}) == 3


def mixture_lines(corpus: Path, tmp_path: Path, train: list[dict[str, Any]]) -> list[str]:
    entries = [{**entry, "manifest": str(corpus / entry["manifest"])} for entry in train]
    try:
        check_config(config_of(tmp_path, data={**data_of(corpus), "train": entries}), 1)
    except ConfigError as error:
        return error.lines
    return []


def test_mixtures_are_checked_corpus_by_corpus(corpus: Path, tmp_path: Path) -> None:
    good = {"manifest": "train", "weight": 2}
    assert not mixture_lines(corpus, tmp_path, [good])
    for train, expected in [
        ([], ["data.train is not set"]),
        ([good, {"manifest": "none", "weight": 1}], [r"data.train\[.*/none\]: .*none: no such file"]),
        ([good, {"manifest": "small", "weight": 1, "name": "b"}], [r"data.train\[b\]: .* vocabulary of 450, but"]),
        ([good, {**good, "name": "b"}], [r"data.train\[b\]: the same corpus as data.train\[.*/train\]; give it"]),
        ([{**good, "name": "b"}, {"manifest": "small", "weight": 1, "name": "b"}], ["called 'b'", "of 450"]),
        ([{**good, "weight": 0}], ["data.train: at row 0 all weights are 0"]),
        ([{**good, "weight": [[0, 1], [9, 0]]}], ["data.train: at row 9 all weights are 0"]),
        ([{**good, "weight": [[0, 1], [9, 2], [4, 1]]}], ["data.train: the rows .* must ascend"]),
        ([{"manifest": "train"}], ["data.train.weight is missing"]),
        ([{**good, "wieght": 1}], [r"unknown key data.train.wieght; did you mean data.train.weight\?"]),
        ([{**good, "weight": -1}], ["data.train.0.weight must be greater than or equal to 0, got -1"]),
        ([{**good, "weight": "much"}], ['data.train.0.weight must be .*number.* got "much"']),
    ]:
        lines = mixture_lines(corpus, tmp_path, train)
        assert len(lines) == len(expected), (train, lines)
        for line, pattern in zip(lines, expected, strict=True):
            assert re.search(pattern, line), (line, pattern)


def test_random_lengths_need_room(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"data": {"random_length_fraction": 0.1, "seq_length": 6}, "parallel": {"tensor": 4}}
    sections["model"] = {"heads": 4, "kv_heads": 4, "hidden": 64, "ffn": 64}
    assert not problems(config_of(tmp_path, **sections), 4)
    sections["data"]["seq_length"] = 2
    (line,) = problems(config_of(tmp_path, **sections), 4)
    assert line.startswith("data.random_length_fraction needs data.seq_length of at least 4")


def test_right_shift_and_attention_within_documents_exclude_each_other(tmp_path: Path) -> None:
    shifted = {"right_shift": True}
    assert not problems(config_of(tmp_path, objective=shifted))
    (line,) = problems(config_of(tmp_path, objective=shifted, data={"document_attention": "within_document"}))
    assert line.startswith("objective.right_shift predicts a document's first token from the document before it")
