"""Third-party modules that a config names, and where they may be found."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import PathFinder

from megatron_md.config import Config, ConfigError


def import_plugins(config: Config, *, trust: bool = True) -> None:
    """Import the modules under `imports`, which register third-party schedules, objectives and callbacks.

    Args:
        config: the run.
        trust: they may also lie in the working directory, not only where PYTHONPATH and the installation say.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    with _working_directory_on_path(searched=trust) if config.imports else nullcontext():
        for name in config.imports:
            try:
                importlib.import_module(name)
            except Exception as error:  # whatever the module itself does wrong
                is_here = not trust and PathFinder.find_spec(name.partition(".")[0], [os.getcwd()]) is not None
                way_out = "only --trust imports from the working directory" if is_here else "is it on PYTHONPATH?"
                raise ConfigError(f"imports: module {name!r} cannot be imported ({error}); {way_out}") from None


@contextmanager
def _working_directory_on_path(*, searched: bool) -> Iterator[None]:
    """Search the working directory last and for good, as later imports of a plug-in may; or not at all."""
    here, before = os.getcwd(), list(sys.path)
    if searched:
        if here not in sys.path:
            sys.path.append(here)
        yield
        return
    # `python -m` has put it first; where PYTHONPATH or the installation name it too, that entry stays.
    if not sys.flags.safe_path and sys.path[0] in ("", here):
        del sys.path[0]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # `PYTHONPATH=/a:` names it by mistake.
    if any(named) and "" in named and here not in map(os.path.abspath, filter(None, named)):
        sys.path[:] = [entry for entry in sys.path if entry != here]
    try:
        yield
    finally:
        sys.path[:] = before
