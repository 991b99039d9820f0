"""All prompts to all backends, as far as they are not answered yet, and the table of what they answered."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from vllm_s2o.cli.environment import commit_name, describe, write_made
from vllm_s2o.cli.vllm_flags import flags
from vllm_s2o.config import ConfigError, load_config
from vllm_s2o.settings import part_of

from ..capture import Source, open_model
from . import suite, table
from .answers import Answers
from .backends import FLAGS, Backend, extension, running, started
from .external import File
from .prompt import Framing, Prompt, TaskError

LENGTHS = (1024, 2048, 4096, 8192)
BATCH = 8
"""Prompts, for each request at a time, that are asked before their answers are kept."""
SPARE_CORES, MOST = 4, 12
"""Cores for the server and for asking, of those that this process may use, and the most that make prompts."""


def processes() -> int:
    """How many make prompts ahead. A long one is tokenised some times over until it fits, which takes longer than a GPU
    takes to answer it; where cores are few, they compute the model, and prompts are made between requests."""
    return min(max(len(os.sched_getaffinity(0)) - SPARE_CORES, 0), MOST)


class Sources:
    """Where prompts come from, by task and length, made once for all backends.

    Args:
        files: external samples; all other tasks are generated.
        processes: how many generate prompts that `ahead` names; without any they are made when they are asked for.
    """

    def __init__(self, framing: Framing, seed: int, files: Iterable[File] = (), processes: int = 0):
        self.framing, self.seed = framing, seed
        self.files = {file.task: file for file in files}
        self._made: dict[tuple[str, int, int], Prompt] = {}
        self._coming: dict[tuple[str, int, int], Future[Prompt]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if processes:
            # What this process's threads hold must not be copied into others.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, _use, (framing, seed))

    def ahead(self, task: str, length: int, indices: Iterable[int]) -> None:
        """These will be asked for, in this order."""
        if self._pool is None or task in self.files:
            return
        try:
            for key in ((task, length, index) for index in indices):
                if key not in self._made and key not in self._coming:
                    self._coming[key] = self._pool.submit(_make, *key)
        except Exception as error:  # whatever a tokenizer says that no other process can be given
            self._do_without(error)

    def prompts(self, task: str, length: int, indices: Sequence[int]) -> list[Prompt]:
        new = [index for index in indices if (task, length, index) not in self._made]
        self._take([future for index in new if (future := self._coming.pop((task, length, index), None))])
        new = [index for index in new if (task, length, index) not in self._made]
        if task in self.files:
            made = self.files[task].prompts(length, new, self.framing)
        else:
            made = suite.prompts(task, length, new, self.framing, self.seed)
        self._made |= {prompt.key: prompt for prompt in made}
        return [self._made[task, length, index] for index in indices]

    def _take(self, coming: list[Future[Prompt]]) -> None:
        try:
            for future in coming:
                made = future.result()
                self._made[made.key] = made
        except TaskError:
            raise
        except Exception as error:  # a process that was killed, or could not begin
            self._do_without(error)

    def _do_without(self, error: Exception) -> None:
        """What is missing is made in this process."""
        print(f"Prompts are made one after the other: {type(error).__name__}, {error}", file=sys.stderr)
        self.close()
        self._pool = None
        self._coming.clear()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_given: list[tuple[Framing, int]] = []
"""In a process that makes prompts: how, and by which seed."""


def _use(framing: Framing, seed: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends these
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes enough
    _given[:] = [(framing, seed)]


def _make(task: str, length: int, index: int) -> Prompt:
    return suite.prompt(task, length, index, *_given[0])


def ask(backend: str, asked: Backend, sources: Sources, left: dict[table.Group, list[int]], answers: Answers) -> None:
    """Ask what is left, and keep the answers.

    Args:
        left: indices by task and length.
    """
    from tqdm import tqdm

    batch = BATCH * asked.client.concurrency
    longest = max(length for _, length in left)
    if asked.client.longest is not None and longest > asked.client.longest:
        raise TaskError(f"{asked.client.url} takes {asked.client.longest} tokens at most, not {longest}.")
    for group, indices in left.items():
        sources.ahead(*group, indices)
    # Tokens, not prompts: the longer the later. Attention to long ones makes them take still longer.
    tokens = sum(length * len(indices) for (_, length), indices in left.items())
    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
    with tqdm(total=tokens, bar_format=shown, smoothing=0) as bar:
        for (task, length), indices in left.items():
            bar.set_description(f"{backend}, {task} at {length}")
            for first in range(0, len(indices), batch):
                prompts = sources.prompts(task, length, indices[first : first + batch])
                given, pairs = asked.ask(prompts)
                answers.add(backend, [(p.key, a) for p, a in zip(prompts, given, strict=True)], pairs)
                bar.update(length * len(prompts))


def numbers(lengths: Sequence[int], samples: Sequence[int]) -> dict[int, int]:
    """Samples by length: one number for all of them, or one each.

    Raises:
        TaskError: there are more or fewer, or one is no number of samples.
    """
    if len(samples) not in (1, len(lengths)):
        raise TaskError(f"Give one number of samples, or one for each of the {len(lengths)} lengths.")
    if not lengths or min((*lengths, *samples)) < 1:
        raise TaskError("At least one length must be given, and lengths and numbers of samples are 1 or more.")
    return dict(zip(lengths, samples if len(samples) > 1 else [*samples] * len(lengths), strict=True))


def measure(
    model: str,
    out: Path,
    *,
    tasks: Sequence[str] = suite.TASKS,
    files: Sequence[File] = (),
    lengths: Sequence[int] = LENGTHS,
    samples: Sequence[int] = (2,),
    backends: Sequence[str] = tuple(FLAGS),
    seed: int = 0,
    chat: bool = True,
    concurrency: int = 1,
    server: Sequence[str] = (),
    logs: Path | None = None,
    url: str | None = None,
    name: str | None = None,
    log: Path | None = None,
) -> tuple[list[table.Row], int]:
    """Ask what is not answered yet, write the table, and return its rows and the number of repeated requests.

    Args:
        model: a directory, or a name that transformers knows; its tokenizer makes the prompts.
        tasks: of `suite.TASKS`.
        files: external samples, asked at the longest of `lengths`, each file's first `samples` or all that it has.
        lengths: tokens of prompt and answer together. Beyond the model's context, servers extend it by YaRN.
        samples: of each task: one number, or one for each length.
        backends: of FLAGS; with `url`, one name of your own for what is asked there.
        concurrency: requests at a time. More than one at a time share steps, in which prompts are cut elsewhere.
        server: further arguments of `vllm serve`.
        logs: folder that keeps the servers' logs.
        url, name, log: a server that runs already, as `backends.running` takes it.

    Raises:
        TaskError, CaptureError: in one sentence, whatever went wrong.
    """
    if unknown := [task for task in tasks if task not in suite.TASKS]:
        raise TaskError(f"There is no task {unknown[0]}: known are {', '.join(suite.TASKS)}.")
    if url and len(backends) != 1:
        raise TaskError("A server that runs already is one backend: name it, with --backends.")
    if not url and (unknown := [backend for backend in backends if backend not in FLAGS]):
        raise TaskError(f"There is no backend {unknown[0]} to start: known are {', '.join(FLAGS)}.")
    counts = numbers(lengths, samples)
    longest = max(lengths)
    groups = {(task, length): counts[length] for length in sorted(counts) for task in dict.fromkeys(tasks)}
    groups |= {(file.task, longest): min(counts[longest], len(file.records)) for file in files}
    if not groups or not backends:
        raise TaskError("At least one task and one backend must be named.")
    source = open_model(model, longest)
    framing = Framing(source.tokenizer, chat)
    settings = {
        "model": model, "seed": seed, "chat template": framing.chat, "context extension": source.rope_factor,
        "server arguments": list(server), "concurrency": concurrency,
        "commit": commit_name(describe()), "config": None if url else _digest(source, server),
        "Python": ".".join(map(str, sys.version_info[:2])),  # whose documentation the text is
    }  # fmt: skip
    answers = Answers(out.with_name(out.name + ".parts.jsonl"), settings)
    sources = Sources(framing, seed, files, processes())

    def open_backend(backend: str) -> AbstractContextManager[Backend]:
        if url:
            return running(url, name, log, concurrency)
        return started(backend, model, [*extension(source, longest), *server], logs, concurrency)

    try:
        _ask_all(backends, open_backend, sources, groups, answers)
    finally:
        sources.close()
    shown = Path(model).resolve().name + (f" (YaRN x{source.rope_factor:g})" if source.rope_factor > 1 else "")
    compared = [*backends, *({table.REFERENCE} if url and _complete(answers, groups) else ())]
    found = table.rows(answers, list(dict.fromkeys(compared)), groups)
    try:
        table.write(out, shown, found)
        write_made(out, {"samples": {f"{task} at {length}": n for (task, length), n in groups.items()}, **settings})
    except OSError as error:
        raise TaskError(f"Cannot write {out}: {error.strerror}.") from error
    asked = [answers.found[b, *group, i] for b in backends for group, count in groups.items() for i in range(count)]
    return found, sum(answer.tries - 1 for answer in asked)


def _digest(source: Source, server: Sequence[str]) -> str:
    """Of the config that servers with these arguments have."""
    given = None
    try:
        for flag in flags(server):
            if (flag.name, flag.field) == ("--additional-config", "s2o"):
                given = flag.value
            elif (flag.name, flag.field) == ("--additional-config", ""):
                given = part_of(json.loads(flag.value))
        return load_config(source.traits, given).digest()
    except json.JSONDecodeError as error:
        raise TaskError(f"--additional-config '{flag.value}' is no JSON: {error}.") from error
    except ConfigError as error:
        raise TaskError(str(error)) from error


def _ask_all(
    backends: Iterable[str],
    open_backend: Callable[[str], AbstractContextManager[Backend]],
    sources: Sources,
    groups: dict[table.Group, int],
    answers: Answers,
) -> None:
    """One backend after the other; a server starts only where something is left to ask."""
    for backend in backends:
        left = {
            group: missing
            for group, count in groups.items()
            if (missing := [index for index in range(count) if (backend, *group, index) not in answers.found])
        }
        if left:
            with open_backend(backend) as asked:
                ask(backend, asked, sources, left, answers)


def _complete(answers: Answers, groups: dict[table.Group, int]) -> bool:
    """Whether the reference, asked in an earlier run, has answered everything too."""
    return all((table.REFERENCE, *group, i) in answers.found for group, count in groups.items() for i in range(count))
