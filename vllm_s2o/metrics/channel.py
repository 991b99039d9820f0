"""From the processes that compute to the one that is asked: prometheus_client's own files.

Each process writes files of fixed size, mapped into its memory, in the format of prometheus_client's multiprocess mode.
With several API servers they lie where vLLM's own do, and /metrics adds them up by itself. With one API server vLLM has
no such directory: there `Collector` reads ours, when it is asked.
"""

import contextlib
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

SIZE = 1 << 16
"""Bytes of a file, reserved when it is made: a full disk must not stop a process that writes to memory."""

OURS = "s2o-"
"""What the files' names say before the writer; without an underscore, at which prometheus_client parts a name."""

UNFINISHED = ".new"
"""How the name of a file ends until it is whole: no reader looks at it."""


@dataclass(frozen=True)
class Series:
    """A metric of ours."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    """A counter's is without the `_total` that Prometheus sees."""
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram: upper bounds, without infinity."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The names that a query may use."""
        if self.kind == "histogram":
            return tuple(self.name + end for end in ("_bucket", "_sum", "_count"))
        return (self.name + "_total" if self.kind == "counter" else self.name,)

    @property
    def prefix(self) -> str:
        # Gauges need a rule for several processes: ours differ in their labels, or are the same.
        return "gauge_max" if self.kind == "gauge" else self.kind

    def key(self, sample: str, labels: dict[str, str]) -> str:
        return mmap_key(self.name, sample, list(labels), list(labels.values()), self.help)


def file_name(series: Series, writer: str) -> str:
    return f"{series.prefix}_{OURS}{writer}.db"


@contextlib.contextmanager
def _new(path: Path) -> Iterator[MmapedDict]:
    """A new file, whole before it has its name: a reader would stumble over an empty one.

    Until then its name is nobody else's, whatever threads and processes write, and whatever one that was killed has
    left: to cut a file that is mapped ends the process that writes to it.
    """
    unfinished = path.with_suffix(f".{os.getpid()}-{secrets.token_hex(8)}{UNFINISHED}")
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try:
            os.posix_fallocate(descriptor, 0, SIZE)
        finally:
            os.close(descriptor)
        yield MmapedDict(str(unfinished))
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_alone(directory: Path, writer: str, series: Series, values: Iterable[tuple[dict[str, str], float]]) -> None:
    """Replace all values of a gauge by others, in a file of its own. Raises OSError."""
    with _new(directory / file_name(series, writer)) as made, contextlib.closing(made):
        for labels, value in values:
            made.write_value(series.key(series.name, labels), value, 0.0)


class Writer:
    """What one process has counted. For any number of threads; raises OSError where files cannot be made."""

    def __init__(self, directory: Path, writer: str):
        self.directory, self.name = directory, writer
        self._files: dict[str, MmapedDict] = {}
        self._lock = threading.Lock()

    def add(self, series: Series, amount: float, **labels: str) -> None:
        """Count. An amount of 0 shows the series."""
        with self._lock:
            sample = series.name + "_total" if series.kind == "counter" else series.name
            self._add(series, sample, amount, labels)

    def observe(self, series: Series, value: float | None) -> None:
        """Put a value into a histogram; None shows it, empty."""
        with self._lock:
            bounds = (*series.buckets, float("inf"))
            for bound in bounds:
                self._add(series, series.name + "_bucket", 0.0, {"le": floatToGoString(bound)})
            if value is None:
                self._add(series, series.name + "_sum", 0.0, {})
                return
            bucket = next(bound for bound in bounds if value <= bound)
            self._add(series, series.name + "_bucket", 1.0, {"le": floatToGoString(bucket)})
            self._add(series, series.name + "_sum", value, {})

    def set(self, series: Series, value: float, **labels: str) -> None:
        with self._lock:
            self._file(series).write_value(series.key(series.name, labels), value, 0.0)

    def _file(self, series: Series) -> MmapedDict:
        if series.prefix not in self._files:
            with _new(self.directory / file_name(series, self.name)) as made:
                pass
            self._files[series.prefix] = made
        return self._files[series.prefix]

    def _add(self, series: Series, sample: str, amount: float, labels: dict[str, str]) -> None:
        file, key = self._file(series), series.key(sample, labels)
        value, _ = file.read_value(key)
        file.write_value(key, value + amount, 0.0)


def remove(directory: Path, ended: Callable[[str], bool]) -> None:
    """Files of servers that have ended, by their names (`place.Server.name`); of a file that tells none it is ''."""
    for end in (".db", UNFINISHED):
        for path in directory.glob(f"*_{OURS}*{end}"):
            found = re.search(rf"_{OURS}(\d+-[0-9a-f]+)-", path.name)
            if ended(found.group(1) if found else ""):
                path.unlink(missing_ok=True)


_unreadable: set[Path] = set()


def read(directory: Path, logger: logging.Logger, server: str = "") -> list[Metric]:
    """What the files add up to, of one server or of all. One that cannot be read is left out, and told of once."""
    files = []
    for path in sorted(directory.glob(f"*_{OURS}{server}*.db")):
        try:
            if path.is_file():  # opening anything else may wait
                MultiProcessCollector.merge([str(path)])
                files.append(str(path))
        except Exception as error:  # whatever stands in it
            if path.exists() and path not in _unreadable:
                _unreadable.add(path)
                logger.warning("s2o: the figures in %s cannot be read (%s).", path, error)
    return list(MultiProcessCollector.merge(files))


class Collector:
    """For prometheus_client's registry: a scrape neither waits nor fails for our sake."""

    def __init__(self, directory: Path, logger: logging.Logger):
        self._directory, self._logger = directory, logger
        self._told = False

    def describe(self) -> list[Metric]:
        """Nothing: registering reads no files."""
        return []

    def collect(self) -> list[Metric]:
        try:
            return read(self._directory, self._logger)
        except Exception as error:  # a file that went between two looks at it
            if not self._told:
                self._told = True
                self._logger.warning("s2o: figures are missing from /metrics (%r).", error)
            return []
