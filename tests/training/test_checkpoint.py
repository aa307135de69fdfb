"""Checkpoints: bitwise round trips, damage that is always seen, and saves cut off at every point."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.model import LM, preset
from crate_mini.training import checkpoint

TINY = dict(n_embd=8, n_head=2, vocab_size=23, block_size=6)
VARIANTS = [
    dict(kind="crate"),
    dict(kind="gpt2"),
    dict(kind="crate+"),
    dict(kind="gpt2", activation="gelu"),
    dict(kind="crate", learned_lam=True, unit_norm=True, bias=False, expansion=2),
]
IDS = torch.arange(12).view(2, 6)


@cache
def trained(**change):
    """A model and its optimizer after one step."""
    lm = LM(preset("1L", **{**TINY, **change}))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.01)
    lm(IDS, IDS).backward()
    optimizer.step()
    return lm, optimizer


def save(path, step=1, resume=True, **change):
    """Save a model of which one weight is filled with `step`, to tell checkpoints apart."""
    lm, optimizer = trained(**change)
    with torch.no_grad():
        lm.positions.weight.fill_(step)
    state = {"step": step, "optimizer": optimizer.state_dict()} if resume else None
    checkpoint.save(
        path,
        lm,
        tokenizer={"spec": "bytes", "hash": "abc"},
        resume=state,
        training={"step": step, "val_loss": 0.1 + 0.2, "best": float("inf")},
    )
    return lm, state


def same(a, b):
    """Nested containers equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def holds(path, step):
    """Whether `path` is whole, and all its files are of the save `step`."""
    lm, meta = checkpoint.load(path)
    also, state, weights = checkpoint.load_resume(path)
    return same(meta, also) and {
        meta["training"]["step"],
        state["step"],
        int(lm.positions.weight[0, 0]),
        int(weights["positions.weight"][-1, -1]),
    } == {step}


def refused(match, call, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("change", VARIANTS)
def test_round_trip_is_bitwise_and_leaves_randomness_alone(tmp_path, change):
    lm, state = save(tmp_path / "out" / "last", **change)
    before = torch.get_rng_state()
    again, meta = checkpoint.load(tmp_path / "out" / "last")
    also, resume, weights = checkpoint.load_resume(tmp_path / "out" / "last")
    assert torch.equal(before, torch.get_rng_state())
    assert again.config == lm.config and not again.training
    assert same(dict(again.state_dict()), dict(weights)) and same(
        dict(weights), dict(lm.state_dict())
    )
    assert same(resume, state) and same(meta, also)
    assert all(w.requires_grad and w.dtype == torch.float32 for w in again.parameters())
    assert torch.equal(again(IDS), lm.eval()(IDS))
    torch.optim.AdamW(again.parameters()).load_state_dict(resume["optimizer"])
    assert meta["training"] == {"step": 1, "val_loss": 0.1 + 0.2, "best": float("inf")}
    assert (
        meta["tokenizer"] == {"spec": "bytes", "hash": "abc"} and meta["torch"] == torch.__version__
    )


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


def edit(path, seal=True, **changes):
    """Rewrite config.json, with a digest that fits if `seal`: an attacker, or a future version."""
    meta = {**json.loads((path / "config.json").read_bytes()), **changes}
    if seal:
        meta["sha256"] = checkpoint._digest(meta)
    (path / "config.json").write_text(json.dumps(meta))


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
    assert checkpoint.load(path)[1]["training"]["step"] == 1
    refused("give the folder", checkpoint.load, next(path.glob("weights-*")))


def test_tokenizer_must_be_the_one_of_the_training():
    meta = {"config": {"vocab_size": 320}, "tokenizer": {"spec": "bytes", "hash": "abc"}}
    good, other, large = (
        SimpleNamespace(name="t", hash=h, vocab_size=n)
        for h, n in (("abc", 257), ("xyz", 257), ("abc", 321))
    )
    checkpoint.check_tokenizer(meta, good)
    checkpoint.check_tokenizer(
        {**meta, "tokenizer": {"spec": "gpt2"}}, other
    )  # foreign: no hash to compare
    refused("use --tokenizer bytes", checkpoint.check_tokenizer, meta, other)
    refused("321 ids", checkpoint.check_tokenizer, meta, large)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A checkpoint, what is in it, and a folder to damage copies in."""
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
    path, r = folder / "copy", random.Random(seed)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, path)
    file = sorted(path.iterdir())[which]
    data = bytearray(file.read_bytes())
    for _ in range(flips):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    file.write_bytes(data[: r.randrange(len(data))] if cut else data)
    try:
        got = [checkpoint.load_resume(path), checkpoint.load(path)[1]]
    except UserError as error:
        assert "\n" not in str(error)
        assert flips or cut
    else:
        assert same(got, content)


# ---- saves that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_full_disk_at_every_call_keeps_one_whole_checkpoint(tmp_path, monkeypatch, what):
    save(tmp_path, 1)
    genuine, last = getattr(os, what), 1
    for nth in range(10):
        left = [nth]

        def fails(*args, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return genuine(*args)

        monkeypatch.setattr(os, what, fails)
        try:
            save(tmp_path, nth + 2)
        except UserError as error:
            assert "No space left on device" in str(error)
        monkeypatch.setattr(os, what, genuine)
        files = sorted(p.name.split("-")[0] for p in tmp_path.iterdir())
        assert files == ["config.json", "resume", "weights"]
        now = checkpoint.load(tmp_path)[1]["training"]["step"]
        assert now in (last, nth + 2) and holds(tmp_path, now)
        last = now
        if left[0] >= 0:  # the save made fewer calls than nth: all of them have been tried
            break
    assert nth == {"fsync": 5, "replace": 3}[what] and now == nth + 2


def test_order_of_events(tmp_path, monkeypatch):
    """Data on the disk, then their names, then config.json, then its name, then the folder again."""
    events, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(handle):
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name if sys.platform == "linux" else "?"
        events.append(("fsync", name.split(".")[0]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(
        os, "replace", lambda a, b: (events.append(("rename", Path(b).stem)), replace(a, b))
    )
    save(tmp_path / "last")
    if sys.platform == "linux":
        assert events == [
            ("fsync", "weights-1"),
            ("rename", "weights-1"),
            ("fsync", "resume-1"),
            ("rename", "resume-1"),
            ("fsync", "last"),
            ("fsync", "config"),
            ("rename", "config"),
            ("fsync", "last"),
        ]
    assert [name for what, name in events if what == "rename"] == [
        "weights-1",
        "resume-1",
        "config",
    ]


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused("Cannot save", save, tmp_path / "file")
    refused("Cannot save", save, tmp_path / "file" / "last")
    assert (tmp_path / "file").read_text() == "mine"


def script(body, *args):
    """Run `body` in a new Python with this file's names, for tests that fork, kill or limit themselves."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\nfrom test_checkpoint import *\n"
        + textwrap.dedent(body)
    )
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", code, here, here.parents[1], *args],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KILLS = """
    import signal, time
    path = sys.argv[3]
    def child(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            except BaseException as error:
                print(type(error).__name__, error)
                sys.stdout.flush()
                os._exit(1)
            os._exit(0)
        return pid
    parent = os.getpid()
    def keep_saving():
        i = step()
        while os.getppid() == parent:  # not beyond a parent that has failed
            i += 1
            save(path, i)
    def step():
        return checkpoint.load(path)[1]["training"]["step"]
    def debris():
        return len(os.listdir(path)) > 3
    torch.set_num_threads(1)
    trained()[1].state.clear()  # small files: what matters is how many events a save has
    save(path, 0)
"""


@posix
def test_kill_at_20_random_moments(tmp_path):
    out = script(
        KILLS
        + """
    r, hits = random.Random(0), 0
    for _ in range(20):
        before = step()
        pid = child(keep_saving)
        while step() == before:  # a reader beside the writer: the files it has just looked up may vanish
            time.sleep(0.001)
        time.sleep(r.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        hits += debris()
        assert holds(path, step()) and step() > before
    save(path, 10 ** 6)
    assert holds(path, 10 ** 6) and not debris()
    print(hits)
    """,
        tmp_path / "last",
    )
    assert int(out) > 0, "no kill fell into a save: the test has tested nothing"


@posix
def test_kill_at_every_event_of_a_save(tmp_path):
    """Death right before the nth write, fsync, rename or removal, for every n."""
    out = script(
        KILLS
        + """
    def dies_at(n):
        count = [0]
        def watch(call):
            def watched(*args, **kwargs):
                count[0] += 1
                if count[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return watched
        checkpoint._Sink.write = watch(checkpoint._Sink.write)
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, watch(getattr(os, name)))
        save(path, n)
    last, n, status = 0, 0, 1
    while status:  # until a save has fewer than n events and ends well
        n += 1
        status = os.waitpid(child(lambda: dies_at(n)), 0)[1]
        assert status in (0, signal.SIGKILL), status
        now = step()
        assert now in (last, n) and holds(path, now)
        last = now
    assert now == n and not debris()
    print(n)
    """,
        tmp_path / "last",
    )
    assert int(out) > 20


@posix
def test_reading_beside_a_writer(tmp_path):
    script(
        KILLS
        + """
    pid, seen, end = child(keep_saving), [], time.monotonic() + 2
    while time.monotonic() < end:
        meta, state, weights = checkpoint.load_resume(path)
        seen.append(meta["training"]["step"])
        assert state["step"] == seen[-1] == int(weights["positions.weight"][0, 0])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert seen == sorted(seen) and seen[-1] > seen[0], seen
    """,
        tmp_path / "last",
    )


@posix
def test_disk_limits_of_every_size(tmp_path):
    """A limit on file sizes stops the write itself, in the middle of torch's zip writer."""
    script(
        KILLS
        + """
    import resource
    save(path, 0, vocab_size=9000)  # far more than a file's buffer, so that the limit strikes within write
    largest = max(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(path, 5, vocab_size=9000)
        except UserError as error:
            assert "File too large" in str(error), error
            os._exit(7)
    for limit in [0, 1, 100, 700, 3000, largest // 2, largest - 1]:
        assert os.waitpid(child(work), 0)[1] >> 8 == 7, limit
        assert holds(path, 0) and not debris()
    limit = largest + 1000
    assert os.waitpid(child(work), 0)[1] == 0 and holds(path, 5)
    """,
        tmp_path / "last",
    )
