"""Nothing in a checkpoint runs: not in `.metadata`, not in `common.pt`, not in the shards; real ones pass."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import random
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_md.checkpoint import safe_pickle
from megatron_md.checkpoint.integrity import CheckpointError
from megatron_md.checkpoint.safe_pickle import check, guarded
from megatron_md.evaluate.load import _load
from megatron_md.run.saved import SavedRun
from tests.checkpoint.saved import SMALL, Call, hostile_pickles, save_checkpoint, write_index
from tests.ranks import run_ranks
from tests.small_run import small_run

NAMES = sorted(hostile_pickles(Path("x")))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_ranks(save_checkpoint, 1, tmp_path_factory.mktemp("run"))[0]


@pytest.fixture
def unsealed(sealed: Path, tmp_path: Path) -> Path:
    """A foreign checkpoint: nothing vouches for its files."""
    copy = tmp_path / "copy"
    shutil.copytree(sealed, copy)
    (copy / "manifest.json").unlink()
    return copy


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_real_metadata_passes(sealed: Path) -> None:
    check(sealed / ".metadata")
    metadata = pickle.loads((sealed / ".metadata").read_bytes())
    metadata.all_local_plans = None
    check(written(sealed.parent / "without_plans", pickle.dumps(metadata, protocol=5)))


def with_layout(sealed: Path, member: Any) -> bytes:
    """Real metadata that holds `member` where the versions of the format go."""
    metadata = pickle.loads((sealed / ".metadata").read_bytes())
    metadata.version = member
    return pickle.dumps(metadata, protocol=4)


def test_members_of_enumerations_may_come_as_attributes(sealed: Path, tmp_path: Path) -> None:
    # Python 3.11.0 to 3.11.3 write them so.
    check(written(tmp_path / ".metadata", with_layout(sealed, Call(getattr, WriteItemType, "BYTE_IO"))))
    for target, name in ((WriteItemType, "mro"), (WriteItemType, "__class__"), (Metadata, "A"), (MetadataIndex, "B")):
        content = with_layout(sealed, Call(getattr, target, name))
        with pytest.raises(CheckpointError, match=r"calls builtins\.getattr for something else than a member"):
            check(written(tmp_path / ".metadata", content))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_would_run_but_are_refused(name: str, tmp_path: Path) -> None:
    content = hostile_pickles(tmp_path / "planted")[name]
    path = written(tmp_path / ".metadata", content)
    with pytest.raises(CheckpointError, match=r"\.metadata: is (refused|damaged)"):
        check(path)
    assert not (tmp_path / "planted").exists()
    try:
        pickle.loads(content)
    except Exception:
        pass
    assert (tmp_path / "planted").exists(), "the test's pickle must be hostile"


@pytest.mark.parametrize("field", ["planner_data", "storage_data", "version", "all_local_plans"])
def test_a_call_hidden_in_real_metadata_is_refused(field: str, sealed: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((sealed / ".metadata").read_bytes())
    setattr(metadata, field, [Call(os.system, f"touch {tmp_path}/planted")])
    with pytest.raises(CheckpointError, match=r"it asks for posix\.system"):
        check(written(tmp_path / ".metadata", pickle.dumps(metadata)))
    assert not (tmp_path / "planted").exists()


def test_extension_registry_and_persistent_ids_are_refused(tmp_path: Path) -> None:
    copyreg.add_extension("posix", "system", 0x7A)
    try:
        with pytest.raises(CheckpointError, match="opcode EXT1 has no place there"):
            check(written(tmp_path / ".metadata", b"\x80\x04\x82\x7a\x8c\x04true\x85R."))
    finally:
        copyreg.remove_extension("posix", "system", 0x7A)
    with pytest.raises(CheckpointError, match="opcode BINPERSID has no place there"):
        check(written(tmp_path / ".metadata", b"\x80\x04\x8c\x01xQ."))


def pickled(target: Any, state: Any) -> bytes:
    """A pickle that sets `state` on `target` by BUILD."""
    body = pickle.dumps(target, protocol=4)[:-1] + pickle.dumps(state, protocol=4)[:-1]
    return body.replace(b"\x80\x04", b"") + b"b."


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x80\x04" + pickled(Metadata, {"x": 1}), "sets the state of"),
        (b"\x80\x04" + pickled(Metadata({}), {"__setstate__": 1}), "more than fields"),
        (b"\x80\x04" + pickled(Metadata({}), (None, {"version": 1})), "more than fields"),
        (pickle.dumps(Metadata({}), protocol=4) + b".", "bytes follow its end"),
        (pickle.dumps({}, protocol=4), "something else than the metadata"),
        (pickle.dumps(TensorProperties(), protocol=4), "something else than the metadata"),
        (pickle.dumps(Metadata({(1, 2): 1}), protocol=4), "neither a text nor an index"),
        (pickle.dumps(Metadata({}, storage_data={"weight": 1}), protocol=4), "no table of where its data lie"),
        (pickle.dumps(Metadata({}, storage_data=[1]), protocol=4), "no table of where its data lie"),
        (b"\x80\x04\x8c\x01xr\xff\xff\xff\x7f.", "opcode LONG_BINPUT has no place"),
        (b"\x80\x04\x8b\xff\xff\xff\x7f1.", "opcode LONG4 has no place"),
        (b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.", "damaged"),
        (b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + pickle.dumps(Metadata({}), protocol=4)[2:], "longer than"),
        (b"", "damaged"),
        (b"\x80\x04", "damaged"),
        (b"\x80\x04h\x07.", "damaged"),
    ],
)
def test_what_no_checkpoint_holds_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=expected):
        check(written(tmp_path / ".metadata", content))


@pytest.mark.parametrize(
    "path", ["../other.distcp", "/etc/passwd", "", "..", "a/b", Path("/etc/passwd"), Path("a"), None, 1, ("a",)]
)
def test_data_from_outside_the_checkpoint_is_refused(path: Any, tmp_path: Path) -> None:
    write_index(tmp_path, path)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        check(tmp_path / ".metadata")


def text(value: str) -> bytes:
    """Opcodes of a short text."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def made(cls: type, fields: bytes) -> bytes:
    """Opcodes of an object with fields, which are opcodes too: name, value, name, value."""
    return text(cls.__module__) + text(cls.__qualname__) + b"\x93)\x81}\x94(" + fields + b"ub"


def storing(name: bytes, more: bytes = b"") -> bytes:
    """Metadata that takes the tensor `weight` from the file so named, by opcodes."""
    index = made(MetadataIndex, text("fqn") + text("weight") + text("offset") + b"N" + text("index") + b"N")
    entry = made(_StorageInfo, text("relative_path") + name)
    fields = text("state_dict_metadata") + b"}" + text("storage_data") + b"}" + index + entry + b"s"
    return b"\x80\x04" + made(Metadata, fields + more) + b"."


def test_a_name_that_changes_once_it_was_given_does_not_deceive(tmp_path: Path) -> None:
    """An object has a copy of the fields that it was given; memo 2 is the dictionary that a name came in."""
    changed = text("planner_data") + b"h\x02" + text("relative_path") + text("a") + b"s"
    content = storing(text("/etc/passwd"), changed)
    metadata = pickle.loads(content)
    assert metadata.planner_data == {"relative_path": "a"}
    assert [entry.relative_path for entry in metadata.storage_data.values()] == ["/etc/passwd"]
    with pytest.raises(CheckpointError, match=r"takes data from '/etc/passwd', outside"):
        check(written(tmp_path / ".metadata", content))
    assert check(written(tmp_path / ".metadata", storing(text("a")))) == {"a"}


# A tuple with 2**60 leaves.
TUPLES = b")" + b"".join(b"\x94h" + bytes([number]) + b"\x86" for number in range(60))
METADATA = text(Metadata.__module__) + text("Metadata") + b"\x93)\x81}"
INDEX = text(MetadataIndex.__module__) + text("MetadataIndex") + b"\x93)\x81}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"(" * 10_000_000, "piles up values"),
        (b"}" * 10_000_000, "piles up values"),
        (b"(" + b"N" * 10_000_000 + b"t.", "piles up values"),
        (b"N" + b"\x85" * 1_000_000 + b".", "something else than the metadata"),
        (METADATA + text("planner_data") + b"}" + TUPLES + b"Nssb.", "neither a text nor an index"),
        (b"}" + INDEX + text("fqn") + text("x") + b"s" + text("offset") + TUPLES + b"sbNs.", "neither a text nor an"),
        (storing(TUPLES)[2:].replace(b"}\x94(", b"}("), "from something that is no text, outside"),
    ],
)
def test_bombs_are_refused_before_they_grow(content: bytes, expected: str, tmp_path: Path) -> None:
    path, start = written(tmp_path / ".metadata", b"\x80\x04" + content), time.process_time()
    with pytest.raises(CheckpointError, match=expected):
        check(path)
    assert time.process_time() - start < 10


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(tmp_path, "a")
    size = (tmp_path / ".metadata").stat().st_size
    monkeypatch.setattr(safe_pickle, "_LARGEST", size)
    check(tmp_path / ".metadata")
    monkeypatch.setattr(safe_pickle, "_LARGEST", size - 1)
    with pytest.raises(CheckpointError, match=f"more than {size - 1} bytes"):
        check(tmp_path / ".metadata")


def test_the_files_that_data_come_from_are_told(sealed: Path) -> None:
    assert check(sealed / ".metadata") == {path.name for path in sealed.glob("*.distcp")}


def test_data_from_a_link_or_a_file_that_is_not_there_are_refused(unsealed: Path) -> None:
    file = unsealed / "__0_0.distcp"
    with guarded(unsealed):
        pass
    file.rename(unsealed.parent / "elsewhere")
    for _ in range(2):
        with (
            pytest.raises(CheckpointError, match=r"takes data from '__0_0\.distcp', which is no file"),
            guarded(unsealed),
        ):
            pass
        file.unlink(missing_ok=True)
        file.symlink_to(unsealed.parent / "elsewhere")


def load_trusted(checkpoint: Path, environment: dict[str, str]) -> str | None:
    """Load the weights as `generate --trust` does; the refusal, if any."""
    os.environ.update(environment)
    with small_run(SMALL) as run:
        saved = SavedRun(checkpoint, checkpoint, SMALL, 1, Path(), trust=True)
        try:
            _load([chunk.module for chunk in run.chunks], saved)
        except CheckpointError as error:
            return str(error)
        finally:
            assert all(os.environ[name] == value for name, value in environment.items())
            assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    return None


@pytest.mark.distributed
def test_trusted_load_of_a_foreign_checkpoint_works(unsealed: Path) -> None:
    assert run_ranks(load_trusted, 1, unsealed, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}) == [None]


@pytest.mark.distributed
@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_hostile_common_state_runs_nothing(environment: dict[str, str], unsealed: Path) -> None:
    planted = unsealed.parent / "planted"
    torch.save({"x": Call(os.system, f"touch {planted}")}, unsealed / "common.pt")
    (message,) = run_ranks(load_trusted, 1, unsealed, environment)
    assert message is not None
    assert "cannot be loaded" in message
    assert not planted.exists()


def hostile_shard(checkpoint: Path, planted: Path) -> None:
    """Put a hostile object where the metadata, itself harmless, says that a layer's extra state lies."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    names = [name for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)]
    for name in names:
        buffer = io.BytesIO()
        torch.save([Call(os.system, f"touch {planted}")], buffer)
        info = metadata.storage_data[MetadataIndex(name)]
        path = checkpoint / info.relative_path
        metadata.storage_data[MetadataIndex(name)] = _StorageInfo(
            info.relative_path, path.stat().st_size, buffer.tell()
        )
        with path.open("ab") as file:
            file.write(buffer.getvalue())
    assert names
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def load_whole(checkpoint: Path, safely: bool) -> bool:
    """Load all that layers save, as a resume does or as megatron-core does by itself; True if it went well.

    By itself it runs the object, then finds that it is no state of a layer.
    """
    with small_run(SMALL) as run, guarded(checkpoint) if safely else nullcontext():
        try:
            dist_checkpointing.load({"model": run.chunks[0].module.sharded_state_dict()}, str(checkpoint))
        except (Exception, CheckpointException):
            return False
    return True


@pytest.mark.distributed
def test_hostile_object_in_a_shard_runs_nothing(unsealed: Path) -> None:
    planted = unsealed.parent / "planted"
    assert run_ranks(load_whole, 1, unsealed, True) == [True]
    hostile_shard(unsealed, planted)
    check(unsealed / ".metadata")
    assert run_ranks(load_whole, 1, unsealed, True) == [False]
    # Weights alone are read without such objects.
    assert run_ranks(load_trusted, 1, unsealed, {}) == [None]
    assert not planted.exists()
    run_ranks(load_whole, 1, unsealed, False)
    assert planted.exists(), "the test's checkpoint must be hostile"


def test_other_backends_of_megatron_core_are_refused(unsealed: Path) -> None:
    (unsealed / "metadata.json").write_text('{"sharded_backend": "zarr", "common_backend": "torch"}')
    with pytest.raises(CheckpointError, match="zarr"), guarded(unsealed):
        pass


def test_random_damage_of_metadata_is_refused_or_harmless(sealed: Path, tmp_path: Path) -> None:
    content = (sealed / ".metadata").read_bytes()
    generator = random.Random(0)
    path, refused = tmp_path / ".metadata", 0
    for _ in range(150):
        damaged = bytearray(content[:4000])
        for _ in range(generator.choice((1, 1, 4))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        whole = bytes(damaged) + content[4000:]
        path.write_bytes(whole)
        try:
            check(path)
        except CheckpointError:
            refused += 1
        else:
            _unpickle_watched(whole)
    assert 30 < refused < 150


def _unpickle_watched(content: bytes) -> None:
    """What passes the check imports nothing but torch's records when it is unpickled for real."""

    class Watched(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            assert module.split(".")[0] in ("torch", "pathlib") or (module, name) == ("builtins", "getattr")
            return super().find_class(module, name)

    try:
        Watched(io.BytesIO(content)).load()
    except AssertionError:
        raise
    except Exception:
        pass  # values of the wrong kind, which loading refuses


def fuzz_loads(checkpoint: Path, seeds: int) -> list[str | None]:
    """Trusted loads with damaged metadata: refused, or harmless; nothing else may come out."""
    content = (checkpoint / ".metadata").read_bytes()
    outcomes: list[str | None] = []
    with small_run(SMALL) as run:
        saved = SavedRun(checkpoint, checkpoint, SMALL, 1, Path(), trust=True)
        for seed in range(seeds):
            generator, damaged = random.Random(seed), bytearray(content)
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
            (checkpoint / ".metadata").write_bytes(damaged)
            try:
                _load([chunk.module for chunk in run.chunks], saved)
                outcomes.append(None)
            except CheckpointError as error:
                outcomes.append(str(error))
    return outcomes


@pytest.mark.distributed
def test_damaged_metadata_that_is_trusted_never_crashes(unsealed: Path) -> None:
    (outcomes,) = run_ranks(fuzz_loads, 1, unsealed, 60)
    refused = [text for text in outcomes if text is not None]
    assert len(refused) > 10
    assert all(str(unsealed) in text for text in refused)
