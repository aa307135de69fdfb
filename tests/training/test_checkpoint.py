"""Checkpoints: bitwise round trips, damage that is always seen, saves interrupted anywhere."""

import errno
import hashlib
import json
import math
import os
import random
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import run_script
from hypothesis import given
from hypothesis import strategies as st
from numbered_saves import IDS, TINY, edit, equal, holds, replace_data, save, saved_step
from refusals import refused

from crate_mini import UserError
from crate_mini.model import LM, preset
from crate_mini.training import checkpoint

VARIANTS = [
    dict(kind="crate"),
    dict(kind="gpt2"),
    dict(kind="crate+"),
    dict(kind="gpt2", activation="gelu"),
    dict(kind="crate", learned_lam=True, unit_norm=True, bias=False, expansion=2),
]


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", VARIANTS)
def test_round_trip_is_bitwise_and_leaves_randomness_alone(tmp_path, change):
    path = tmp_path / "out" / "last"
    lm, state = save(path, **change)
    before = torch.get_rng_state()
    loaded, meta = checkpoint.load(path)
    meta_again, resume, weights = checkpoint.load_resume(path)
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.config == lm.config and not loaded.training
    assert equal(dict(loaded.state_dict()), dict(weights))
    assert equal(dict(weights), dict(lm.state_dict()))
    assert equal(resume, state) and equal(meta, meta_again)
    assert all(w.requires_grad and w.dtype == torch.float32 for w in loaded.parameters())
    assert torch.equal(loaded(IDS), lm.eval()(IDS))
    torch.optim.AdamW(loaded.parameters()).load_state_dict(resume["optimizer"])
    assert meta["training"] == {"step": 1, "val_loss": 0.1 + 0.2, "best": float("inf")}
    assert meta["tokenizer"] == {"spec": "bytes", "hash": "abc"}
    assert meta["torch"] == torch.__version__


def test_a_new_save_replaces_all_files(tmp_path):
    for step in range(1, 4):
        save(tmp_path, step)
        (tmp_path / "mine.txt").write_text("kept")
        (tmp_path / "weights-999.pt.7.tmp").write_bytes(b"left by a kill")
        (tmp_path / "config.json.7.tmp").write_bytes(b"left by a kill")
    save(tmp_path, 9, resume=False)
    assert sorted(p.name[:7] for p in tmp_path.iterdir()) == ["config.", "mine.tx", "weights"]
    refused("resume from last", checkpoint.load_resume, tmp_path)
    assert int(checkpoint.load(tmp_path)[0].positions.weight[0, 0]) == 9


class Wrapper(torch.nn.Module):
    """As DataParallel and EMA models are: the model is its attribute `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPPINGS = [
    [torch.compile],
    [torch.nn.DataParallel],
    [torch.compile, Wrapper],
    [Wrapper, torch.compile],
    [Wrapper, torch.compile, torch.nn.DataParallel, torch.compile],
]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("wrappers", WRAPPINGS)
def test_wrapped_models_save_what_loads(tmp_path, wrappers, inner):
    lm = wrapped = LM(preset("2L", **TINY))
    want = {name: w.clone() for name, w in lm.state_dict().items()}
    if inner:  # a part of the model is wrapped as well
        lm.blocks[1] = torch.compile(Wrapper(torch.compile(lm.blocks[1])))
    for wrap in wrappers:
        wrapped = wrap(wrapped)
    checkpoint.save(
        tmp_path, wrapped, tokenizer={"spec": "bytes", "hash": None}, training={"step": 1}
    )
    loaded, _ = checkpoint.load(tmp_path)
    assert loaded.config == lm.config and equal(dict(loaded.state_dict()), want)


def test_the_tokenizer_must_be_that_of_the_training():
    meta = {"config": {"vocab_size": 320}, "tokenizer": {"spec": "bytes", "hash": "abc"}}
    fitting = SimpleNamespace(name="t", hash="abc", vocab_size=257)
    other = SimpleNamespace(name="t", hash="xyz", vocab_size=257)
    large = SimpleNamespace(name="t", hash="abc", vocab_size=321)
    checkpoint.check_tokenizer(meta, fitting)
    foreign = {**meta, "tokenizer": {"spec": "gpt2"}}  # no hash to compare
    checkpoint.check_tokenizer(foreign, other)
    refused("use --tokenizer bytes", checkpoint.check_tokenizer, meta, other)
    refused("321 ids", checkpoint.check_tokenizer, meta, large)


def test_an_untrained_model_is_that_of_its_seed_and_leaves_randomness_alone():
    config = preset("1L", n_embd=8, n_head=2, vocab_size=23, block_size=6)
    torch.manual_seed(5)
    want = LM(config)
    before = torch.get_rng_state()
    lm = checkpoint.untrained(config, 5)
    assert torch.equal(before, torch.get_rng_state())
    assert not lm.training and equal(dict(lm.state_dict()), dict(want.state_dict()))
    other = checkpoint.untrained(config, 6)
    assert not torch.equal(other.tokens.weight, lm.tokens.weight)


# ---- damage --------------------------------------------------------------------------------------


def test_each_kind_of_damage_has_its_sentence(tmp_path):
    path = tmp_path / "last"
    refused("No checkpoint in", checkpoint.load, path)
    path.mkdir()
    refused("expected a folder", checkpoint.load_resume, path)
    save(path)
    config = json.loads((path / "config.json").read_bytes())["config"]
    for changes, match in (
        ({"format": 2}, "has format 2"),
        ({"config": {**config, "n_layer": 2}}, "do not fit"),
        ({"config": {**config, "hue": 1}}, "do not fit"),
        ({"config": {**config, "n_head": 3}}, "does not divide"),
    ):
        edit(path, **changes)
        refused(match, checkpoint.load, path)
        edit(path, format=checkpoint.FORMAT, config=config)
    assert holds(path, 1)
    edit(path, seal=False, training={"step": 2})
    refused("damaged or was edited", checkpoint.load, path)
    save(path)
    for content in (b"", b"[1]", b"{}", b"\xff\xfe", b"[" * 100_000):
        (path / "config.json").write_bytes(content)
        refused("damaged or not from crate_mini", checkpoint.load, path)
    save(path)
    next(path.glob("resume-*")).unlink()
    refused("is missing", checkpoint.load_resume, path)
    assert saved_step(path) == 1
    refused("give its folder", checkpoint.load, next(path.glob("weights-*")))


class RunsCode:
    """Pickled, it would run code when it is loaded."""

    def __reduce__(self):
        return (os.putenv, ("CRATE_TEST_RAN", "1"))


@pytest.mark.parametrize("kind", ["weights", "resume"])
def test_a_pickle_with_code_and_a_fitting_hash_is_refused(tmp_path, kind):
    save(tmp_path)
    replace_data(tmp_path, kind, {"a": RunsCode()})
    refused("would run code when loaded", checkpoint.load_resume, tmp_path)
    file = next(tmp_path.glob(f"{kind}-*"))
    file.write_bytes(b"not a zip")
    files = json.loads((tmp_path / "config.json").read_bytes())["files"]
    files[kind]["sha256"] = hashlib.sha256(b"not a zip").hexdigest()
    edit(tmp_path, files=files)
    refused("use another checkpoint", checkpoint.load_resume, tmp_path)


@pytest.mark.parametrize("content", [[1], {"a": 1}, {}, torch.ones(2), None])
def test_weights_of_another_kind_are_refused(tmp_path, content):
    save(tmp_path)
    replace_data(tmp_path, "weights", content)
    refused("do not fit", checkpoint.load, tmp_path)


def places(content, path=()):
    """The paths of all entries of nested dicts and lists."""
    if path:
        yield path
    items = enumerate(content) if isinstance(content, list) else []
    for key, value in content.items() if isinstance(content, dict) else items:
        yield from places(value, (*path, key))


def with_entry(content, path, value):
    """A copy with another value in one place."""
    content = json.loads(json.dumps(content))
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return content


@pytest.mark.parametrize("value", [None, True, -1, 1e300, "x", "a\0b", [], [1], {}, {"a": 1}])
def test_a_wrong_type_anywhere_in_config_json_is_a_sentence(tmp_path, value):
    """With a fitting sha256, as someone may have edited it."""
    save(tmp_path)
    meta = json.loads((tmp_path / "config.json").read_bytes())
    for path in places(meta):
        edit(tmp_path, **with_entry(meta, path, value))
        for read in (checkpoint.load, checkpoint.load_resume, checkpoint.open_model):
            try:
                read(tmp_path)
            except UserError as error:
                assert "\n" not in str(error)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    lm = LM(preset("1L", **TINY))
    for value in (math.nan, math.inf):
        with torch.no_grad():
            lm.blocks[0].sparsifier.D[0, 0] = value
        checkpoint.save(tmp_path, lm, tokenizer={"spec": "bytes", "hash": None}, training={})
        refused(r"not finite, in blocks.0.sparsifier.D", checkpoint.load, tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A checkpoint, its content, and a folder for damaged copies."""
    folder = tmp_path_factory.mktemp("kept")
    path = folder / "last"
    save(path)
    return path, [checkpoint.load_resume(path), checkpoint.load(path)[1]], folder


@pytest.mark.fuzz
@given(
    which=st.integers(0, 2), seed=st.integers(0, 2**32), flips=st.integers(0, 3), cut=st.booleans()
)
def test_damage_is_seen_or_harmless(kept, which, seed, flips, cut):
    original, content, folder = kept
    path, draw = folder / "copy", random.Random(seed)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, path)
    file = sorted(path.iterdir())[which]
    data = bytearray(file.read_bytes())
    for _ in range(flips):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data[: draw.randrange(len(data))] if cut else data)
    try:
        loaded = [checkpoint.load_resume(path), checkpoint.load(path)[1]]
    except UserError as error:
        assert "\n" not in str(error)
        assert flips or cut
    else:
        assert equal(loaded, content)


# ---- saves that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, calls", [("fsync", 5), ("replace", 3)])
def test_a_full_disk_at_every_call_keeps_one_whole_checkpoint(tmp_path, monkeypatch, name, calls):
    save(tmp_path, 1)
    genuine, last = getattr(os, name), 1
    for nth in range(10):
        count = 0

        def fails(*args, nth=nth):
            nonlocal count
            count += 1
            if count == nth + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return genuine(*args)

        monkeypatch.setattr(os, name, fails)
        try:
            save(tmp_path, nth + 2)
        except UserError as error:
            assert "No space left on device" in str(error)
        monkeypatch.setattr(os, name, genuine)
        files = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
        assert files == ["config.json", "resume", "weights"]
        step = saved_step(tmp_path)
        assert step in (last, nth + 2) and holds(tmp_path, step)
        last = step
        if count <= nth:  # the save made fewer calls: all of them have been tried
            break
    assert nth == calls and last == nth + 2


@pytest.mark.skipif(os.name != "posix", reason="no fsync of folders")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize("of_folders", [True, False])
def test_only_a_folder_may_lack_fsync(tmp_path, monkeypatch, number, of_folders):
    """As on CIFS, sshfs and some shared folders."""
    fsync = os.fsync

    def fails(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    if of_folders and number != errno.EIO:
        save(tmp_path / "new" / "last")
        assert holds(tmp_path / "new" / "last", 1)
    else:
        refused("Cannot (save|write)", save, tmp_path / "last")


def test_the_order_of_events(tmp_path, monkeypatch):
    """Parents of new folders, data, their names, then config.json, its name, the folder again."""
    events = []
    folder = tmp_path / "run"
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle):
        name = "?"
        if sys.platform == "linux":
            name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        events.append(("fsync", name.split(".")[0]))
        fsync(handle)

    def spy_replace(source, target):
        events.append(("rename", Path(target).stem))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    save(folder / "last")
    if sys.platform == "linux":
        assert events == [
            ("fsync", folder.name),
            ("fsync", tmp_path.name),
            ("fsync", "weights-1"),
            ("rename", "weights-1"),
            ("fsync", "resume-1"),
            ("rename", "resume-1"),
            ("fsync", "last"),
            ("fsync", "config"),
            ("rename", "config"),
            ("fsync", "last"),
        ]
    renamed = [name for event, name in events if event == "rename"]
    assert renamed == ["weights-1", "resume-1", "config"]


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused("Cannot save", save, tmp_path / "file")
    refused("Cannot save", save, tmp_path / "file" / "last")
    assert (tmp_path / "file").read_text() == "mine"


# ---- saves that are interrupted ------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def interrupted_saves(test, folder):
    """The number that this test of interrupted_saves.py prints."""
    done = run_script([Path(__file__).with_name("interrupted_saves.py"), test, folder])
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


@needs_fork
def test_kills_at_20_random_moments_leave_a_whole_checkpoint(tmp_path):
    hits = interrupted_saves("kill_at_random_moments", tmp_path / "last")
    assert hits > 0, "no kill hit a save: nothing was tested"


@needs_fork
def test_a_kill_at_any_event_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """Death right before the nth write, fsync, rename or removal, for every n."""
    assert interrupted_saves("kill_at_every_event", tmp_path / "last") > 20


@needs_fork
def test_a_reader_during_saves_reads_whole_checkpoints(tmp_path):
    assert interrupted_saves("read_during_saves", tmp_path / "last") > 1


@needs_fork
def test_disk_limits_of_every_size_leave_a_whole_checkpoint(tmp_path):
    assert interrupted_saves("limit_the_disk", tmp_path / "last") > 3000
