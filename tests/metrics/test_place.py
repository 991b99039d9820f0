"""A server's directory: made once, found by its processes and by the command, and gone afterwards."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from vllm_s2o.metrics import place

HOLD = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from vllm_s2o.metrics import place
print(place.establish("some/model"), flush=True)
sys.stdin.read()
"""

CHILD = """
import multiprocessing, sys, tempfile
tempfile.tempdir = sys.argv[1]
from vllm_s2o.metrics import place

def child(answers):
    answers.put((str(place.establish("some/model")), place.made_here()))

if __name__ == "__main__":
    mine = place.establish("some/model")
    context = multiprocessing.get_context(sys.argv[2])
    answers = context.Queue()
    process = context.Process(target=child, args=(answers,))
    process.start()
    theirs, made = answers.get(timeout=60)
    process.join()
    print(theirs == str(mine), made, place.made_here(), mine.is_dir())
"""


class Holder:
    """A process that has a server's directory."""

    def __init__(self, machine, **env):
        command = [sys.executable, "-P", "-c", HOLD, str(machine)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.directory = self.process.stdout.readline().strip()

    def end(self, sign: int | None = None) -> None:
        if sign is not None:
            self.process.send_signal(sign)
        self.process.communicate(timeout=60)


@pytest.fixture
def holder(machine):
    started = []

    def start(**env) -> Holder:
        started.append(Holder(machine, **env))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


def test_it_is_made_once_and_handed_down():
    made = place.establish("some/model")
    assert place.establish("another") == made == place.current() == place.figures_directory()
    assert os.environ[place.VARIABLE] == str(made)
    assert place.made_here()
    assert made.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_processes_of_the_server_have_the_same(machine, tmp_path, method):
    program = tmp_path / "program.py"
    program.write_text(CHILD)
    command = [sys.executable, "-P", str(program), str(machine), method]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "True False True True\n", ended.stderr
    assert list(place.base().iterdir()) == [], "its own process removes it, and no other one"


def test_another_program_has_one_of_its_own(holder):
    """Though it inherits the variable: a program may start a server."""
    mine = place.establish("some/model")
    other = holder(**{place.VARIABLE: str(mine)})
    assert other.directory != str(mine)
    assert [server.pid for server in place.running()] == sorted([os.getpid(), other.process.pid])


def test_a_server_is_found_while_it_runs(holder):
    one = holder()
    (server,) = place.running()
    assert (server.pid, server.model, str(server.directory)) == (one.process.pid, "some/model", one.directory)
    assert server.on
    one.end()
    assert place.running() == []
    assert list(place.base().iterdir()) == []


def test_servers_are_listed_by_number(holder):
    """Not by the digits of their names: 10 is after 9."""
    holders = [holder() for _ in range(3)]
    directories = [Path(held.directory) for held in holders]
    for number, directory in zip((9, 101, 10), directories, strict=True):
        about = json.loads((directory / place.ABOUT).read_text())
        (directory / place.ABOUT).write_text(json.dumps(about | {"pid": number}))
    assert [server.pid for server in place.running()] == [9, 10, 101]


def test_what_a_killed_server_leaves_is_removed_by_the_next_one(holder):
    killed = holder()
    killed.end(signal.SIGKILL)
    assert place.running() == []
    assert os.path.isdir(killed.directory), "else the test proves nothing"
    alive = holder()
    assert not os.path.exists(killed.directory) and not os.path.exists(killed.directory + ".lock")
    assert [str(server.directory) for server in place.running()] == [alive.directory]


def test_a_server_whose_lock_was_cleaned_up_goes_on(holder):
    """By a program that removes what is old and asks for no lock."""
    one = holder()
    (Path(one.directory) / place.OFF).touch()
    os.unlink(one.directory + ".lock")
    holder()
    (server,) = (server for server in place.running() if str(server.directory) == one.directory)
    assert not server.on
    one.end(signal.SIGKILL)
    place.sweep()
    assert not os.path.exists(one.directory)


def test_the_switch_stays_as_it_was_when_it_is_cleaned_up(monkeypatch, holder):
    one = holder()
    monkeypatch.setenv(place.VARIABLE, one.directory)
    assert not place.switched_off()
    off = Path(one.directory) / place.OFF
    off.touch()
    files = off, off.with_name(place.ABOUT)
    for file in files:
        os.utime(file, (0, 0))
    assert place.switched_off()
    assert all(file.stat().st_mtime > 0 for file in files), "or they would be old one day"
    shutil.rmtree(one.directory)
    assert place.switched_off()
    Path(one.directory).mkdir()
    assert not place.switched_off(), "switched on by hand"


def test_a_running_server_is_left_alone(holder):
    one, _ = holder(), holder()
    place.sweep()
    assert os.path.isdir(one.directory)
    assert len(place.running()) == 2


def test_a_server_that_has_not_said_who_it_is_yet_is_passed_over(holder):
    one = holder()
    with open(f"{one.directory}/{place.ABOUT}", "w") as about:
        about.write('{"pid": ')
    assert place.running() == []
    assert os.path.isdir(one.directory)


def test_nothing_is_removed_for_its_age_while_any_server_runs(holder):
    """systemd-tmpfiles asks for this lock, on each directory, before it looks for old files in it."""
    one, other = holder(), holder()
    one.end()
    directory = os.open(place.base(), os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.end(signal.SIGKILL)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(directory)


def test_a_directory_is_locked_once(tmp_path):
    place._keep(tmp_path)
    before = os.listdir("/proc/self/fd")
    place._keep(tmp_path)
    place._keep(tmp_path / "gone")
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="needs systemd-tmpfiles")
def test_systemd_leaves_what_a_server_has_alone(machine, tmp_path, holder):
    """Of any age, which is what 0 says."""
    config = tmp_path / "all.conf"
    config.write_text(f"d {machine} - - - 0\n")
    one = holder()
    (Path(one.directory) / place.OFF).touch()
    (machine / "old").touch()
    subprocess.run(["systemd-tmpfiles", "--clean", config], check=True, timeout=60)
    assert not (machine / "old").exists(), "else the test proves nothing"
    (server,) = place.running()
    assert (str(server.directory), server.on) == (one.directory, False)


def test_what_was_started_by_another_process_makes_nothing(monkeypatch, holder):
    """An actor of Ray is no child in the eyes of Python."""
    one = holder()
    monkeypatch.setenv(place.VARIABLE, one.directory)
    assert str(place.establish("some/model", started=True)) == one.directory
    assert not place.made_here()
    monkeypatch.delenv(place.VARIABLE)
    assert str(place.establish("some/model", started=True)) != one.directory
    assert place.made_here(), "a program of its own, for all that is known"


@pytest.mark.parametrize("wrong", ["writable", "file", "link"])
def test_a_directory_that_others_may_change_is_not_used(tmp_path, wrong):
    """A name in /tmp can be taken by anyone."""
    if wrong == "writable":
        place.base().mkdir()
        place.base().chmod(0o777)
    elif wrong == "file":
        place.base().touch()
    else:
        place.base().symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="not a directory that this user alone can write to"):
        place.establish("some/model")
    assert place.VARIABLE not in os.environ
    assert place.here() is None
    if wrong != "file":
        theirs = place.base() / f"{os.getpid()}-theirs"
        theirs.mkdir()
        (theirs / place.ABOUT).write_text(json.dumps({"pid": 1, "model": "theirs", "figures": "/anywhere"}))
        assert place.running() == [], "a server of somebody else's would have the switch written where they say"


def test_files_of_vllms_own_directory_are_for_several_api_servers(monkeypatch, tmp_path):
    monkeypatch.setenv(place.MERGED, str(tmp_path))
    made = place.establish("some/model")
    assert place.figures_directory() == tmp_path
    assert json.loads((made / place.ABOUT).read_text())["figures"] == str(tmp_path)
    assert place.running()[0].figures == tmp_path


def test_a_directory_for_figures_is_the_same_from_everywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(place.MERGED, "figures")
    place.establish("some/model")
    assert place.running()[0].figures == tmp_path / "figures"


def test_files_without_a_server_have_no_place(monkeypatch, tmp_path):
    """Nobody would know whose they are."""
    monkeypatch.setenv(place.MERGED, str(tmp_path))
    assert place.figures_directory() is None
    assert place.writer("1") == "1"


def test_figures_go_on_where_the_servers_own_directory_is_gone(monkeypatch, tmp_path):
    monkeypatch.setenv(place.MERGED, str(tmp_path))
    name = place.establish("some/model").name
    shutil.rmtree(place.current())
    assert place.current() is None
    assert (place.figures_directory(), place.writer("1")) == (tmp_path, f"{name}-1")


def test_who_lives(machine, monkeypatch):
    """Also where nobody left a lock, as in a container that starts again: processes have the numbers that they had."""
    holder = Holder(machine)
    name = holder.directory.rpartition("/")[2]
    mine = place.establish("some/model").name
    assert place.lives(mine) and place.lives(name)
    holder.end(signal.SIGKILL)
    assert not place.lives(name)
    place.sweep()
    assert not place.lives(name)
    monkeypatch.setattr(place, "_runs", lambda pid: True)
    assert not place.lives(name), "this process has removed it"
    assert place.lives("1-beef"), "that of another user, for one"
    assert not place.lives(f"{os.getpid()}-beef"), "the number is this process's"
    assert place.lives(mine)


def test_a_program_with_an_engine_that_can_be_switched_can_be(machine):
    place.establish("some/model", fixed="why")
    assert place.here().fixed == "why"
    place.establish("another", fixed="why not")
    assert place.here().fixed == "why"
    place.establish("another")
    assert (place.here().fixed, place.here().model) == (None, "some/model")
    place.establish("another", fixed="why not")
    assert place.here().fixed is None


def test_what_a_server_says_of_itself_is_written_anew_where_nobody_can_read_it(machine):
    directory = place.establish("some/model", fixed="why")
    (directory / place.ABOUT).write_text("")
    place.establish("another")
    assert json.loads((directory / place.ABOUT).read_text())["fixed"] is None


def test_a_variable_that_names_nothing_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv(place.VARIABLE, str(tmp_path / "gone"))
    assert place.current() is None
    assert place.figures_directory() is None
    assert place.here() is None
