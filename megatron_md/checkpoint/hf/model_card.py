"""The model card (README.md) of an export: what its run says of the model, under the metadata that Hugging Face reads.

It names no path of this machine. The licence, and what a model is good for, are left to its owner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_md import run_files
from megatron_md.checkpoint.directory import Weights, read_progress, read_record
from megatron_md.checkpoint.hf.families import Family
from megatron_md.config import ResolvedConfig
from megatron_md.installed import version
from megatron_md.json_file import parse_json
from megatron_md.messages import shown
from megatron_md.train.progress import Progress
from megatron_md.train.records import is_number, read_lines

CARD_NAME = "README.md"
_KINDS = {
    "masked_diffusion": "a masked-diffusion language model",
    "masked_diffusion_sft": "a masked-diffusion language model, fine-tuned on dialogues",
    "block_diffusion": "a block-diffusion language model",
    "autoregressive": "an autoregressive language model",
}
_PAGE = """---
# license: (the owner's to choose: put its identifier here, without the # in front)
library_name: {library}
pipeline_tag: text-generation
tags:
- megatron-md
- {tag}
---
<!-- Written by `megatron-md convert`. -->

# {name}

{what}

## Model
{model}

## Objective
{objective}

## Training
{training}

## Evaluation
{evaluation}

## How to load it
{loading}

## Licence
Not stated yet: the owner of the weights fills it in, here and in the metadata above.
"""


def model_card(
    checkpoint: Path, config: ResolvedConfig, family: Family, weights: Weights, *, hf_config: bytes | None
) -> bytes:
    """The card of an export.

    Args:
        checkpoint: what is exported.
        config: its config.
        family: the layout of the export.
        weights: those of the checkpoint, or their average.
        hf_config: `config.json` of the export; None: adapters alone.
    """
    progress, objective = read_progress(checkpoint), config.objective
    kind = _KINDS.get(objective.name, f"a language model of the objective {_code(objective.name)}")
    what = f"{kind[0].upper()}{kind[1:]}" if hf_config is not None else f"Adapters of {kind}"
    started = f", on the weights of {_code(_last(config.checkpoint.load))}" if config.checkpoint.load else ""
    parts = {
        "library": "peft" if hf_config is None else "transformers",
        "tag": "autoregressive" if objective.name == "autoregressive" else "masked-diffusion",
        "name": shown(_last(config.run_dir)).replace("<", "&lt;"),
        "what": f"{what}, from megatron-md {version('megatron-md') or ''}{started}.",
        "model": _table(_model(config, family)),
        "objective": _table(_objective(config)),
        "training": _table(_training(config, progress, weights)),
        "evaluation": _evaluation(checkpoint, config, progress),
        "loading": _adapters_loaded() if hf_config is None else _loaded(hf_config, config, family),
    }
    return _PAGE.format_map(parts).encode()


def _model(config: ResolvedConfig, family: Family) -> dict[str, str]:
    model = config.model
    attention = {"autoregressive": "causal", "block_diffusion": "bidirectional within blocks, causal between them"}
    return {
        "layout": _code(family.name),
        "shape": f"{model.layers} layers, {model.hidden:,} wide, {model.heads} heads ({model.key_heads} for keys)",
        "vocabulary": f"{model.vocab:,}",
        "longest row": f"{model.max_length:,} tokens",
        "attention": attention.get(config.objective.name, "bidirectional"),
        "logits at a position predict": "the next token" if config.objective.right_shift else "that position",
    }


def _objective(config: ResolvedConfig) -> dict[str, str]:
    objective = config.objective
    if objective.name == "autoregressive":
        return {"objective": _code(objective.name)}
    found = {
        "objective": _code(objective.name),
        "mask schedule": _code(_without_paths(objective.mask_schedule)),
        "weight of a row": _code(objective.weight),
    }
    if objective.pairs != "none":
        found["rows in pairs"] = _code(objective.pairs)
    if objective.token_rate is not None:
        found["rates of tokens"] = _code(objective.token_rate.get("name"))
    if objective.final_block_size is not None:
        found["block size"] = f"{objective.final_block_size:,}"
    return found


def _training(config: ResolvedConfig, progress: Progress, weights: Weights) -> dict[str, str]:
    tokens = f"{progress.tokens:,}, in {progress.step:,} steps"
    if not progress.step:
        tokens = "none by the run itself, which begins with weights that were converted, merged or drawn"
    found = {
        "tokens trained": tokens,
        "data": ", ".join(_code(_last(corpus.label)) for corpus in config.data.corpora()),
    }
    if config.lora is not None:
        found["adapters"] = f"rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    if weights == "ema":
        found["weights"] = f"their average, decay {config.train.ema_decay:g}"
    return {name: value for name, value in found.items() if value}


def _evaluation(checkpoint: Path, config: ResolvedConfig, progress: Progress) -> str:
    metrics = checkpoint.parent.parent / run_files.METRICS
    is_in_run = checkpoint.parent.name == run_files.CHECKPOINTS
    records = [line.record for line in read_lines(metrics) if line.record is not None] if is_in_run else []
    own = {"step": progress.step, "val_nelbo": read_record(checkpoint)["val_nelbo"]}
    scored = [one for one in (own, *records) if is_number(one.get("val_nelbo")) and one["step"] <= progress.step]
    if not scored:
        return "No validation is recorded."
    newest = max(scored, key=lambda record: (record["step"], "val_nelbo_stderr" in record))
    error = f" ± {newest['val_nelbo_stderr']:.4f}" if is_number(newest.get("val_nelbo_stderr")) else ""
    name = "cross-entropy" if config.objective.name == "autoregressive" else "NELBO, a bound on the cross-entropy"
    data = f", on {_code(_last(config.data.valid))}" if isinstance(config.data.valid, str) else ""
    of = "the average of the weights" if config.validation.weights == "ema" else "the weights"
    figure = f"{newest['val_nelbo']:.4f}{error} nats per token"
    return f"Validation {name}: {figure}{data}, at step {newest['step']:,}, of {of}."


def _loaded(hf_config: bytes, config: ResolvedConfig, family: Family) -> str:
    found = parse_json(hf_config, "config.json", "convert anew")
    auto = found.get("auto_map") if isinstance(found, dict) else None
    names = [name for name in ("AutoModelForCausalLM", "AutoModel") if isinstance(auto, Mapping) and name in auto]
    name, trust = (names[0], ", trust_remote_code=True") if names else ("AutoModelForCausalLM", "")
    notes = ""
    if names:
        notes = "`trust_remote_code` runs the code that `auto_map` in config.json names: look at it first.\n\n"
    elif config.objective.name != "autoregressive":
        notes = "Transformers' class of this layout has causal attention, which this model was not trained with.\n\n"
    again = 'megatron-md generate runs/it --prompt "Once upon a time"\n```'
    if family.causal != (config.objective.name == "autoregressive"):
        again = (
            "```\n\nThe run has the objective that its layout stands for: set `objective` as above to train from it."
        )
    return (
        f"```python\nfrom transformers import {name}\n\n"
        f'model = {name}.from_pretrained("path/to/this/folder"{trust})\n```\n\n'
        f"{notes}In megatron-md:\n\n"
        f"```bash\nmegatron-md convert path/to/this/folder runs/it --family {family.name} --to megatron\n{again}"
    )


def _adapters_loaded() -> str:
    return (
        "```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")  # base: the model they belong to\n'
        "```\n\nIn megatron-md a LoRA run starts from them with `lora.load: path/to/this/folder`."
    )


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _code(value: object) -> str:
    """A foreign text as Markdown that shows it as it is, in a table too."""
    text = shown(value if isinstance(value, str) else json.dumps(value))
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _last(path: str | None) -> str:
    """What a path or URL is called without the folders that it lies in; of a manifest, the folder of the shards."""
    parts = [part for part in str(path or "").partition("?")[0].split("/") if part and part != "manifest.json"]
    return parts[-1] if parts else "model"


def _without_paths(spec: Any) -> Any:
    """A mask schedule without the folder of the file that it may be read from."""
    if isinstance(spec, str):
        name, colon, rest = spec.partition(":")
        return f"knots:{_last(rest)}" if name.strip() == "knots" and colon else spec
    if isinstance(spec, Mapping):
        return {key: _last(str(value)) if key == "file" else _without_paths(value) for key, value in spec.items()}
    return [_without_paths(item) for item in spec] if isinstance(spec, (list, tuple)) else spec
