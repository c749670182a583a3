"""Pretraining from a configuration, in this process's place in the job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_md import parallel
from megatron_md.config import Config, resolve
from megatron_md.data.cache import Cache
from megatron_md.data.shards import load_manifest
from megatron_md.errors import EXIT_DONE, EXIT_STOPPED
from megatron_md.plugins import import_plugins
from megatron_md.run.build import build
from megatron_md.run.epochs import count_steps
from megatron_md.run.lock import only_job
from megatron_md.train.callbacks.watchdog import Watchdog


def pretrain(config: Config) -> int:
    """Train as `config` says.

    Returns:
        The exit code: 0 when all steps are done, 75 when the run was asked to stop and has saved.

    Raises:
        UserError: bad input that only a started run can notice, such as a device that is not there.
    """
    import_plugins(config)
    config = count_steps(config)
    cache = Cache.of(config.data)
    manifests = [load_manifest(corpus.manifest, cache=cache) for corpus in config.data.corpora()]
    assert manifests, "checked before"
    train = config.train.settled(parallel.select_device(config.train.device).type)
    resolved = resolve(replace(config, train=train), manifests[0].vocab_size)
    directory = Path(config.run_dir)
    with (
        parallel.session(resolved) as world,
        only_job(directory, world),
        Watchdog(config.train.hang_timeout, world, directory) as dog,
    ):
        trainer, restore, keeper = build(resolved, world, manifests, dog)
        if restore.resume(trainer):
            with keeper.record(trainer, dog):
                trainer.fit()
                dog.disarm()
        elif world.is_main:
            keeper.close_late(trainer)
        return EXIT_STOPPED if trainer.stopped_by else EXIT_DONE
