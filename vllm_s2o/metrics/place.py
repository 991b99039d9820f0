"""Where the processes of one server meet: a directory with its figures and its switch.

The process that reads the configuration (the API server, or a program) makes it before it starts others, and hands it
down in its environment. Whoever made it holds a lock on a file beside it: what has no lock belongs to no server, and
is removed by the next one that starts. All of them share a lock on the directory around theirs, which systemd-tmpfiles
asks for before it removes what is old in it.
"""

import atexit
import contextlib
import fcntl
import json
import multiprocessing
import os
import secrets
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

VARIABLE = "S2O_SERVER"
"""Names the directory to the server's processes. Not VLLM_..., which vLLM would warn of: it knows its own variables."""

MERGED = "PROMETHEUS_MULTIPROC_DIR"
"""Set where vLLM has several API servers, or by the user: /metrics is then what the files in this directory add up to,
and nothing else."""

OFF = "off"
ABOUT = "about.json"

_mine: tuple[int, Path] | None = None
"""What this process made, with its id: a forked process made nothing."""


@dataclass(frozen=True)
class Server:
    """One that runs on this machine, for this user."""

    directory: Path
    pid: int
    model: str
    figures: Path
    """Where its processes write."""
    fixed: str | None = None
    """Why it cannot be switched off, or None."""

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def on(self) -> bool:
        return not (self.directory / OFF).exists()


def base() -> Path:
    return Path(tempfile.gettempdir()) / f"vllm-s2o-{os.getuid()}"


def _own_base() -> Path:
    """Made if it is missing. A directory of this name in /tmp may be anyone's."""
    path = base()
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if not _is_own(path):
        raise PermissionError(f"{path} is not a directory that this user alone can write to")
    return path


def _is_own(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def establish(model: str, started: bool = False, fixed: str | None = None) -> Path:
    """The server's directory, made unless this process or the one that started it did. Raises OSError.

    Args:
        started: this process was started by another one of the server, though not by Python's multiprocessing.
        fixed: why it cannot be switched off, or None.
    """
    global _mine
    given = current()
    started = started or multiprocessing.parent_process() is not None
    if given is not None and (started or _mine == (os.getpid(), given)):
        if fixed is None:  # one of a program's engines can be switched
            _describe(given, fixed=None)
        return given
    parent = _own_base()
    _keep(parent)
    sweep()
    name = f"{os.getpid()}-{secrets.token_hex(4)}"
    lock = open(parent / f"{name}.lock", "w")  # noqa: SIM115 - for as long as this process lives
    fcntl.flock(lock, fcntl.LOCK_EX)
    directory = parent / name
    directory.mkdir(mode=0o700)
    merged = os.environ.get(MERGED)
    figures = Path(merged).absolute() if merged else directory  # another program reads it, from where it stands
    _describe(directory, pid=os.getpid(), model=model, figures=str(figures), fixed=fixed)
    os.environ[VARIABLE] = str(directory)
    _mine = os.getpid(), directory
    atexit.register(_leave, os.getpid(), directory, lock)
    return directory


def _describe(directory: Path, **fields: Any) -> None:
    """What a server says of itself: `fields`, beside others that stand there."""
    path = directory / ABOUT
    held: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # what nobody can read is written anew
        held = dict(json.loads(path.read_text()))
    if held | fields != held:
        whole = directory / f"{ABOUT}.{os.getpid()}.new"
        whole.write_text(json.dumps(held | fields))
        whole.replace(path)


def _keep(directory: Path) -> None:
    """From systemd-tmpfiles, which removes files of /tmp that nothing has touched for some days: a server's switch and
    figures, and the lock that says that it lives. It passes over a directory that is locked, with all that is in it."""
    if directory in _kept:
        return
    with contextlib.suppress(OSError):  # a file system without locks has no such protection
        _kept[directory] = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)  # open for as long as this process lives
        fcntl.flock(_kept[directory], fcntl.LOCK_SH)


_kept: dict[Path, int] = {}
"""Descriptors of locked directories."""


def _leave(pid: int, directory: Path, lock: TextIO) -> None:
    if os.getpid() == pid:
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(lock.name)


def current() -> Path | None:
    """The directory of the server that this process belongs to."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given and Path(given).is_dir() else None


_ended: set[str] = set()
"""Servers whose directories this process has removed."""

_off = False
"""What the switch of this process's server was when it was last seen."""


def switched_off() -> bool:
    """Whether the switch of the server that this process belongs to is off. Once its directory is gone, nobody can
    switch any more: then it stays as it was."""
    global _off
    given = os.environ.get(VARIABLE)
    if not given:
        return False
    for name in (ABOUT, OFF):
        with contextlib.suppress(OSError):
            os.utime(f"{given}/{name}")  # young again, for those that clean old files up
    _off = os.path.exists(f"{given}/{OFF}") or (_off and not os.path.isdir(given))
    return _off


def figures_directory() -> Path | None:
    """Where this server's processes write their figures."""
    merged, given = os.environ.get(MERGED), os.environ.get(VARIABLE)
    return Path(merged) if given and merged and Path(merged).is_dir() else current()


def writer(which: str) -> str:
    """What files of this process's server are named by: several servers may write to one directory of the user's."""
    given = os.environ.get(VARIABLE)
    return f"{Path(given).name}-{which}" if given else which


def lives(name: str) -> bool:
    """Whether a server of this name runs on this machine, as far as a container sees it."""
    return name not in _ended and _alive(base() / name)


def made_here() -> bool:
    """Whether this is the process that made the directory."""
    return _mine is not None and _mine == (os.getpid(), current())


def _alive(directory: Path) -> bool:
    try:
        with open(f"{directory}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        # Nobody here removes a lock before its directory: who cleans old files up has. Its process is what is left,
        # but if that is this one: where a container starts again, processes have the numbers that they had.
        pid = directory.name.partition("-")[0]
        return _runs(pid) and (pid != str(os.getpid()) or directory == current())
    except OSError:  # locked, or what cannot be told: then it is not ours to remove
        return True
    return False


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _directories() -> list[Path]:
    try:
        found = list(base().iterdir()) if _is_own(base()) else []
    except OSError:  # there is none
        return []
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def sweep() -> None:
    """Remove what servers left that were killed."""
    for directory in _directories():
        if not _alive(directory):
            _ended.add(directory.name)
            shutil.rmtree(directory, ignore_errors=True)
            Path(f"{directory}.lock").unlink(missing_ok=True)


def running() -> list[Server]:
    """This user's servers on this machine, by their process's number."""
    servers = []
    for directory in _directories():
        if _alive(directory):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # one that starts or ends just now
                about = json.loads((directory / ABOUT).read_text())
                pid, model, figures = int(about["pid"]), str(about["model"]), Path(about["figures"])
                servers.append(Server(directory, pid, model, figures, about.get("fixed")))
    return sorted(servers, key=lambda server: server.pid)


def here() -> Server | None:
    """The server that this process belongs to."""
    directory = current()
    return next((server for server in running() if server.directory == directory), None)
