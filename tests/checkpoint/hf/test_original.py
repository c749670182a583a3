"""What lies beside the weights travels: config, tokenizer and code files, as long as they are true of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md import run_files
from megatron_md.checkpoint.hf.original import hand_on
from megatron_md.config import Config, load_config, to_yaml
from megatron_md.config.objective import BlockStage
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.data.writer import Tokenised, Vocabulary, write_corpus
from tests.checkpoint.hf.test_convert import convert, export
from tests.checkpoint.hf_models import contents, shape_of, write_byte_tokenizer, write_model, write_tokenizer
from tests.ranks import run_ranks
from tests.small_run import variant
from tests.train.test_trainer import pretrain

TEXT = "the mask <|mdm_mask|> is no mask here: \u00e4\n\tthe end"


def content_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_lladas_tokenizer_and_special_ids_travel(tmp_path: Path) -> None:
    hf, run, back = (tmp_path / name for name in ("hf", "run", "back"))
    ids = {"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081}
    model = replace(shape_of("llada", vocab=126464), hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, layers=1)
    write_model(hf, "llada", model, shard_bytes=10**7, **ids)
    write_byte_tokenizer(hf, eos=126081, mask=126336)
    before = Tokenizer(hf)
    assert (before.mask_token_id, before.eos_token_id, before.pad_token_id) == (126336, 126081, 126081)
    convert(hf, run, "llada")
    export(run, back, "llada")
    assert contents(back) == contents(hf)
    assert {key: content_of(back)[key] for key in ids} == ids
    encoded = before.encode(TEXT)
    assert encoded[0] == 257 and not set(encoded.tolist()) & set(ids.values())
    for after in (Tokenizer(run / "tokenizer.model"), Tokenizer(back)):
        assert (after.mask_token_id, after.eos_token_id, after.pad_token_id) == (126336, 126081, 126081)
        assert after.encode(TEXT).tolist() == encoded.tolist() and after.decode(encoded) == TEXT


@pytest.mark.slow
def test_transformers_reads_the_tokenizer_alike(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_byte_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the other\tend"
    assert theirs(text, add_special_tokens=False)["input_ids"] == Tokenizer(tmp_path).encode(text).tolist()
    assert theirs.eos_token_id == 300


def going_on(run: Path, target: Path, **objective: Any) -> Config:
    """One step of training, with a corpus of the run's tokenizer, from the weights of a converted run."""
    config = load_config(run / "config.yaml")
    vocabulary = Vocabulary.of(Tokenizer(run / "tokenizer.model"))
    documents = [Tokenised(np.arange(100) % 11, 100) for _ in range(10)]
    corpus = target.with_name("corpus")
    write_corpus([documents], vocabulary, corpus, shard_tokens=1500)
    return replace(
        config,
        run_dir=str(target),
        data=replace(config.data, train=str(corpus / "manifest.json"), seq_length=32),
        objective=replace(config.objective, **objective),
        train=replace(config.train, steps=1, global_batch_size=4, micro_batch_size=4, device="cpu"),
        checkpoint=replace(config.checkpoint, load=str(run), load_only="model"),
        validation=replace(config.validation, sequences=0),
        log=replace(config.log, tensorboard=False),
    )


@pytest.mark.distributed
def test_a_run_that_goes_on_from_a_converted_one_gives_its_files_back(tmp_path: Path) -> None:
    hf, run, more, back = (tmp_path / name for name in ("hf", "run", "more", "back"))
    write_model(hf, "llada", replace(shape_of("llada", vocab=211)), transformers_version="4.46.3")
    write_tokenizer(hf)
    (hf / "configuration_llada.py").write_text("")
    convert(hf, run, "llada", add_mask_token=True)
    assert run_ranks(pretrain, 1, going_on(run, more)) == [0]
    export(more, back, "llada")
    before, after = contents(run / run_files.ORIGINAL), contents(back)
    assert all(after[name] == data for name, data in before.items() if name != "source.json")
    assert set(after) == set(contents(hf)) and content_of(back)["transformers_version"] == "4.46.3"
    assert Tokenizer(back).mask_token_id == Tokenizer(more / "tokenizer.model").mask_token_id == 12


@pytest.mark.distributed
def test_a_causal_model_becomes_a_block_model_with_its_tokenizer(tmp_path: Path) -> None:
    hf, run, more, back = (tmp_path / name for name in ("hf", "run", "more", "back"))
    write_model(hf, "qwen3", shape_of("qwen3"))
    write_tokenizer(hf)
    convert(hf, run, "qwen3", add_mask_token=True)
    keys = {"name": "block_diffusion", "block_size": 4, "mask_logit": "keep", "right_shift": False}
    assert run_ranks(pretrain, 1, going_on(run, more, **keys)) == [0]
    export(more, back, "sdar")
    written = content_of(back)
    assert (written["model_type"], written["block_size"], written["mask_token_id"]) == ("sdar", 4, 12)
    assert Tokenizer(back).mask_token_id == 12


def edit(run: Path, section: str, **keys: Any) -> None:
    """Change a section of a run's config, as an override would have."""
    from megatron_md.checkpoint.integrity import seal

    checkpoint = next((run / "checkpoints").glob("step_*"))
    config = load_config(checkpoint / "config.yaml")
    (checkpoint / "config.yaml").write_text(to_yaml(variant(config, **{section: keys})))
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)


@pytest.mark.parametrize(
    ("keys", "their", "value"),
    [({"rope_theta": 1e6}, "rope_theta", 1e6), ({"max_length": 128}, "max_position_embeddings", 128)],
)
def test_a_config_that_is_no_longer_true_is_not_given_back(
    keys: dict[str, Any], their: str, value: float, tmp_path: Path
) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"), transformers_version="4.46.3")
    convert(tmp_path / "hf", tmp_path / "run", "llama")
    edit(tmp_path / "run", "model", init_std=0.1)
    export(tmp_path / "run", tmp_path / "same", "llama")
    assert content_of(tmp_path / "same") == content_of(tmp_path / "hf")
    edit(tmp_path / "run", "model", **keys)
    export(tmp_path / "run", tmp_path / "back", "llama")
    changed = content_of(tmp_path / "back")
    assert changed[their] == value and "transformers_version" not in changed
    assert (changed["mask_token_id"], changed["eos_token_id"]) == (5, 2)


def test_another_block_size_is_written_into_the_config(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "sdar", shape_of("sdar"), transformers_version="4.52.4")
    convert(tmp_path / "hf", tmp_path / "run", "sdar")
    edit(tmp_path / "run", "objective", block_size=[BlockStage(4, 0.5), BlockStage(8)])
    export(tmp_path / "run", tmp_path / "back", "sdar")
    changed = content_of(tmp_path / "back")
    assert changed["block_size"] == 8 and "transformers_version" not in changed
    assert (changed["mask_token_id"], changed["eos_token_id"], changed["fuse_cross_entropy"]) == (5, 2, True)
    assert changed["auto_map"]["AutoModelForCausalLM"] == "JetLM/SDAR-1.7B-Chat--modeling_sdar.SDARForCausalLM"


def test_another_family_with_the_same_tensors_has_its_own_config(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "qwen2", shape_of("qwen2"))
    convert(tmp_path / "hf", tmp_path / "run", "qwen2")
    edit(tmp_path / "run", "objective", name="masked_diffusion")  # as it would be after an adaptation
    export(tmp_path / "run", tmp_path / "dream", "dream")
    config = content_of(tmp_path / "dream")
    assert config["architectures"] == ["DreamModel"] and "--modeling_dream" in config["auto_map"]["AutoModel"]
    assert (tmp_path / "dream/generation_config.json").read_bytes() == (
        tmp_path / "hf/generation_config.json"
    ).read_bytes()


def test_a_tokenizer_of_our_own_gets_the_names_that_hugging_face_looks_for(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama", vocab=320))
    convert(tmp_path / "hf", tmp_path / "run", "llama")
    write_byte_tokenizer(tmp_path)
    Tokenizer(tmp_path).save(tmp_path / "run" / "tokenizer.model")
    export(tmp_path / "run", tmp_path / "back", "llama")
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert not (tmp_path / "back/tokenizer.model").exists()
    assert content_of(tmp_path / "back")["mask_token_id"] == Tokenizer(tmp_path / "back").mask_token_id == 310


def test_a_damaged_original_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"))
    convert(tmp_path / "hf", tmp_path / "run", "llama")
    kept = tmp_path / "run" / run_files.ORIGINAL
    record = json.loads((kept / "source.json").read_text())
    escaping = {**record, "shards": {f"../{name}": tensors for name, tensors in record["shards"].items()}}
    for name, text in (
        ("source.json", "{"),
        ("source.json", "{}"),
        ("source.json", json.dumps(escaping)),
        ("config.json", "[]"),
    ):
        before = (kept / name).read_text()
        (kept / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{run_files.ORIGINAL}/{name}: .*; remove .* to export"):
            export(tmp_path / "run", tmp_path / "back", "llama")
        (kept / name).write_text(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    export(tmp_path / "run", tmp_path / "back", "llama")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def test_nothing_is_handed_on_where_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir(), (tmp_path / "target").mkdir()
    hand_on(tmp_path / "source", tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())
