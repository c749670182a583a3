"""What lies under RUN, a run's directory, by name; what a checkpoint holds is told in `checkpoint.directory`."""

from __future__ import annotations

CONFIG = "config.yaml"  # as resolved; in every checkpoint too
ENVIRONMENT = "env.json"
SUMMARY = "summary.json"
EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
VALIDATION = "validation.json"  # the newest validation, row by row
TOKENIZER = "tokenizer.model"  # of whatever kind
ORIGINAL = "huggingface"  # what a converted run keeps of the folder it came from
CHECKPOINTS = "checkpoints"
LATEST = "latest"  # among them: the name of the newest
ROLLBACK = "rollback.json"
LOCK = ".lock"
STOP = "stop"
