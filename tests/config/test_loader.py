"""Config loading: what is accepted, and the one line that each mistake gets."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_md.config import (
    Config,
    ConfigError,
    LRScheduleConfig,
    ModelConfig,
    as_dict,
    config_from_mapping,
    explain,
    load_config,
    load_resolved,
    preset_names,
    resolve,
    to_yaml,
)
from megatron_md.config.schema import keys_of


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def lines_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value) == "\n".join(caught.value.lines)
    return caught.value.lines


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == Config()


def test_precedence_is_override_file_preset_default(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {preset: 8b, layers: 6, ffn: 100}")
    model = load_config(path, ["model.ffn=200", "model.ffn=300"]).model
    assert (model.ffn, model.layers, model.hidden, model.rope_theta) == (300, 6, 4096, 500000.0)
    assert model.init_std == ModelConfig().init_std


def test_preset_may_come_from_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {preset: tiny, layers: 6}")
    model = load_config(path, ["model.preset=1b"]).model
    assert (model.preset, model.layers, model.hidden) == ("1b", 6, 2048)


def test_null_turns_a_preset_key_off(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "model: {preset: 8b, vocab: null}")).model.vocab is None


@pytest.mark.parametrize("text", ["3e-3", "3.0e-3", "0.003", ".003"])
def test_every_spelling_of_a_float_is_a_number(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, f"optimizer: {{lr: {text}}}")).optimizer.lr == 0.003
    assert load_config(write(tmp_path, ""), [f"optimizer.lr={text}"]).optimizer.lr == 0.003


def test_whole_numbers_serve_as_floats_but_not_the_other_way_round(tmp_path: Path) -> None:
    clip = load_config(write(tmp_path, "optimizer: {clip_grad: 2}")).optimizer.clip_grad
    assert clip == 2.0 and isinstance(clip, float)
    assert lines_of(write(tmp_path, "train: {steps: 10.0}")) == [
        f"{tmp_path}/run.yaml: train.steps must be whole number > 0, got 10.0"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_dir: 3", 'run_dir must be text, got 3; put it in quotes'),
        ("train: {steps: '10'}", 'train.steps must be whole number > 0, got "10"'),
        ("train: {deterministic: 1}", "train.deterministic must be true | false, got 1"),
        ("train: {deterministic: yes}", 'train.deterministic must be true | false, got "yes"'),
        ("train: {steps: true}", "train.steps must be whole number > 0, got true"),
        ("train: {steps: 0}", "train.steps must be whole number > 0, got 0"),
        ("optimizer: {lr: .nan}", "optimizer.lr must be number > 0, got NaN"),
        ("optimizer: {lr: .inf}", "optimizer.lr must be number > 0, got Infinity"),
        ("optimizer: {beta1: 1.0}", "optimizer.beta1 must be number >= 0 < 1, got 1.0"),
        ("train: {precision: fp16}", 'train.precision must be auto | fp32 | bf16 | fp8, got "fp16"'),
        ("data: {train: 1e3}", "data.train must be text or list of mapping or null, got 1000.0; put it in quotes"),
        ("model: 3", "model must be mapping, got 3"),
        ("model: {preset: tinny}", "model.preset 'tinny' is unknown; did you mean 'tiny'? "
         "(known: tiny, 50m, 1b, 1b-aligned, 8b)"),
        ("train: {batch_ramp: {start: 4, increment: 4}}", "train.batch_ramp.steps is missing"),
        ("imports: plugin", 'imports must be list of text, got "plugin"'),
    ],
)  # fmt: skip
def test_wrong_values_get_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert lines_of(write(tmp_path, text)) == [f"{tmp_path}/run.yaml: {expected}"]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("model.layer", "model.layers"),
        ("optimizer.learning_schedule", "optimizer.lr_schedule"),
        ("optimizer.warmup_steps", "optimizer.lr_schedule.warmup_steps"),
        ("train.batch_ramp.incremnt", "train.batch_ramp.increment"),
        ("modle", "model"),
        ("data.hang_timeout", "train.hang_timeout"),
    ],
)
def test_unknown_keys_suggest_the_nearest_one(tmp_path: Path, key: str, suggestion: str) -> None:
    lines = lines_of(write(tmp_path, ""), f"{key}=3")
    assert f"command line: unknown key {key}; did you mean {suggestion}?" in lines


def test_all_mistakes_are_reported_at_once_with_their_origin(tmp_path: Path) -> None:
    lines = lines_of(write(tmp_path, "modle: 1\ntrain: {steps: x}"), "log.every_steps=-1")
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/run.yaml", "command line", f"{tmp_path}/run.yaml"]
    assert all("pydantic" not in line and "\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2", ", line 2: key 'seed' appears twice"),
        ("model: {layers: 1, layers: 2}", ", line 1: key 'layers' appears twice"),
        ("model: [", ", line 1: "),
        ("- 1", ": must hold a mapping of keys, not [1]"),
        ("just text", ': must hold a mapping of keys, not "just text"'),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, text: str, expected: str) -> None:
    (line,) = lines_of(write(tmp_path, text))
    assert line.startswith(f"{tmp_path}/run.yaml{expected}")


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "none.yaml") == [f"{tmp_path}/none.yaml: no such file"]
    assert "is a directory" in lines_of(tmp_path)[0]


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "seed.deep=3"])
def test_malformed_overrides_are_quoted(tmp_path: Path, override: str) -> None:
    (line,) = lines_of(write(tmp_path, "seed: 1"), override)
    assert repr(override) in line


def test_empty_sections_are_defaults_and_empty_values_null(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "data:\n  # train: x\ntrain: {batch_ramp:}"), ["data.valid="])
    assert config == Config()


def test_overrides_hold_colons_mappings_and_lists(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, ""),
        [
            "objective.mask_schedule=uniform:0.45,0.55",
            "objective.options={a: [1, 2]}",
            "optimizer.lr_schedule.points=[[0, 1e-3], [1.0, 0]]",
        ],
    )
    assert config.objective.mask_schedule == "uniform:0.45,0.55"
    assert config.objective.options == {"a": [1, 2]}
    assert config.optimizer.lr_schedule.points == [(0.0, 1e-3), (1.0, 0.0)]


def test_yaml_round_trip_keeps_every_value(tmp_path: Path) -> None:
    config = config_from_mapping(
        {
            "run_dir": "3e-3",
            "model": {"preset": "50m"},
            "objective": {"mask_schedule": {"name": "mixture", "components": [{"weight": 1e-7, "schedule": "null"}]}},
            "train": {"batch_ramp": {"start": 1, "increment": 1, "steps": 2}},
            "optimizer": {"lr_schedule": {"name": "piecewise", "points": [[0.0, 1e-30], [1.0, 0.0]]}},
            "data": {"train": [{"manifest": "a", "weight": [[0, 1e-7], [9, 3]]}, {"manifest": "b", "weight": 1}]},
            "imports": ["yes", "1_0", ""],
        }
    )
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_config_from_mapping_leaves_its_argument_alone() -> None:
    mapping = {"model": {"preset": "tiny"}}
    config_from_mapping(mapping, ["train.steps=3", "seed=2", "model.layers=2"])
    assert mapping == {"model": {"preset": "tiny"}}


def test_as_dict_is_nested() -> None:
    config = replace(Config(), seed=7)
    assert as_dict(config)["seed"] == 7
    assert as_dict(config)["optimizer"]["lr_schedule"]["name"] == LRScheduleConfig().name


def test_explanation_covers_every_key() -> None:
    text = explain()
    described = {line.strip() for line in text.splitlines()}
    for path, _ in keys_of(Config):
        name = ".".join(path)
        assert any(line.startswith(f"{name}:") for line in described), name
    assert "" not in [line.strip() for line in text.splitlines() if line.startswith("      ")]


def test_presets_are_listed_by_size() -> None:
    assert preset_names() == ["tiny", "50m", "1b", "1b-aligned", "8b"]


def test_loading_and_checking_import_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {preset: 8b}\ntrain: {global_batch_size: 64, micro_batch_size: 1}")
    code = (
        "import sys\nfrom megatron_md.config import load_config\n"
        "from megatron_md.run.check import check_config, resolve_config\n"
        "from megatron_md.run.estimate import report\n"
        f"config = load_config({str(path)!r})\n"
        "report(resolve_config(config), check_config(config, 64, corpora=False))\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'sentencepiece')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_alias_is_overridden_in_one_place_only(tmp_path: Path) -> None:
    path = write(tmp_path, "megatron: {ddp: &shared {a: 1}, optimizer: *shared}")
    config = load_config(path, ["megatron.ddp.a=2"])
    assert (config.megatron.ddp, config.megatron.optimizer) == ({"a": 2}, {"a": 1})


def test_resolving_settles_vocabulary_and_length_and_records_keep_what_was_written(tmp_path: Path) -> None:
    open_, settled = (config_from_mapping({"model": model}) for model in ({}, {"vocab": 9, "max_length": 512}))
    model = resolve(open_, 300).model
    assert (model.vocab, model.max_length) == (300, open_.data.seq_length)
    assert (resolve(settled, 300).model.vocab, resolve(settled).model.max_length) == (9, 512)
    assert resolve(resolve(open_, 300), 9).model == model
    with pytest.raises(ConfigError, match=r"^model\.vocab is missing$"):
        resolve(open_)
    assert to_yaml(resolve(settled)) == to_yaml(settled)
    record = write(tmp_path, to_yaml(resolve(open_, 300)))
    assert load_config(record) == replace(open_, model=replace(open_.model, vocab=300))
    assert load_resolved(record) == resolve(open_, 300)
    with pytest.raises(ConfigError, match=r"run\.yaml: model\.vocab is missing"):
        load_resolved(write(tmp_path, to_yaml(open_)))


@pytest.mark.parametrize(("kv_heads", "head_dim", "expected"), [(None, None, (4, 8)), (2, 16, (2, 16))])
def test_a_shape_says_what_its_nulls_stand_for(
    kv_heads: int | None, head_dim: int | None, expected: tuple[int, int]
) -> None:
    model = ModelConfig(hidden=32, heads=4, kv_heads=kv_heads, head_dim=head_dim)
    assert (model.key_heads, model.head_width) == expected
