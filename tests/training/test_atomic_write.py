"""Files that replace others whole: links, devices, what a kill leaves, what is planted."""

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest
from forked import ROOT
from refusals import refused

from crate_mini.console.results import atomic_write

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
WAIT_WITHIN = """
import sys, time
from crate_mini.console.results import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def write(path, content=b"new"):
    with atomic_write(path) as file:
        file.write(content)


def start_writer(path):
    """A process that is in the middle of writing this file."""
    words = [sys.executable, "-c", WAIT_WITHIN, str(path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


@posix
def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "a [1].json"
    other = tmp_path / "b.json.12345.tmp"
    other.write_bytes(b"of another file")
    killed, living = start_writer(path), start_writer(path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = {tmp_path / f"{path.name}.{process.pid}.tmp" for process in (killed, living)}
    assert left < set(tmp_path.iterdir())
    write(path)
    assert set(tmp_path.iterdir()) == {
        path,
        other,
        tmp_path / f"{path.name}.{living.pid}.tmp",
    }
    living.kill()
    living.wait()
    write(path)
    assert set(tmp_path.iterdir()) == {path, other}


@posix
def test_a_number_of_a_killed_process_can_come_again(tmp_path):
    """As it does for the first process of each container."""
    (tmp_path / f"a.{os.getpid()}.tmp").write_bytes(b"left by a kill")
    write(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@posix
def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, chain = tmp_path / "there" / "file", tmp_path / "link", tmp_path / "chain"
    link.symlink_to(target)
    chain.symlink_to(link)
    for path in (link, chain):
        write(path, path.name.encode())
        assert path.is_symlink() and target.read_bytes() == path.name.encode()


@posix
def test_a_link_that_leads_back_to_itself_is_refused_and_stays(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    refused("Cannot write .*loop", write, loop)
    assert loop.is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@posix
def test_devices_and_pipes_are_written_to_and_stay(tmp_path):
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    write(tmp_path / "null")
    assert (tmp_path / "null").is_symlink()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    contents = []
    reader = threading.Thread(target=lambda: contents.append(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join(10)
    assert contents == [b"new"] and stat.S_ISFIFO(os.stat(pipe).st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["null", "pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_a_sentence():
    refused("Cannot write /dev/full: No space left", write, "/dev/full")


@posix
def test_a_planted_temporary_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / f"a.{os.getpid()}.tmp").symlink_to(victim)
    write(tmp_path / "a")
    assert victim.read_bytes() == b"mine" and (tmp_path / "a").read_bytes() == b"new"
    fcntl = pytest.importorskip("fcntl")
    planted = tmp_path / f"b.{os.getpid()}.tmp"
    planted.symlink_to(victim)
    with open(victim, "rb") as file:  # locked, it looks like a file that is being written
        fcntl.flock(file, fcntl.LOCK_EX)
        refused("Cannot write .*File exists", write, tmp_path / "b")
    assert victim.read_bytes() == b"mine" and planted.is_symlink()


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    write(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    refused("Cannot write", write, tmp_path / "folder")
    refused("Cannot write", write, tmp_path / "nowhere" / "a")
    assert len(list(tmp_path.iterdir())) == 2
