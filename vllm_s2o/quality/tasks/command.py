"""The command `python -P -m vllm_s2o.quality.tasks`."""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from .. import picture
from ..capture import CaptureError
from . import infinitebench, longbench, suite
from .backends import FLAGS
from .external import File
from .plot import draw
from .prompt import TaskError
from .run import LENGTHS, measure
from .table import summary

DESCRIPTION = """\
RULER's tasks that need no download, asked of a served model with S2O and without, on the same prompts. Servers are
started here, one after the other, or a running one is asked. Answers are kept beside the table, in FILE.parts.jsonl: a
run that was cut off goes on from there, and one that wants more samples, lengths or tasks adds them. Machine, versions,
commit and settings stand in FILE.made.json."""

EXTERNAL = "Files of samples that you downloaded, asked at the longest of --lengths: texts beyond it are cut."


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -P -m vllm_s2o.quality.tasks", description=DESCRIPTION)
    found.add_argument("model", help="directory or name of the model")
    found.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table, CSV")
    found.add_argument("--plot", type=Path, metavar="PNG", help="also draw the table")
    found.add_argument(
        "--tasks", nargs="*", help=f"{' '.join(suite.TASKS)} (default: all of them, or none beside downloaded samples)"
    )
    found.add_argument(
        "--lengths", nargs="+", type=int, default=LENGTHS,
        help=f"tokens of prompt and answer (default {' '.join(map(str, LENGTHS))}); YaRN extends a shorter context",
    )  # fmt: skip
    found.add_argument(
        "--samples", nargs="+", type=int, default=[2], help="of each task, or one number for each length (default 2)"
    )
    found.add_argument("--backends", nargs="+", default=list(FLAGS), help=f"default: {' '.join(FLAGS)}")
    found.add_argument("--seed", type=int, default=0, help="another one makes other samples (default 0)")
    found.add_argument("--plain", action="store_true", help="do not use the tokenizer's chat template")
    found.add_argument(
        "--concurrency", type=int, default=1,
        help="requests at a time (default 1, so that no prompt is cut elsewhere because of another one)",
    )  # fmt: skip
    servers = found.add_argument_group("servers")
    servers.add_argument("--server", type=shlex.split, default=[], metavar="ARGS", help="for every server started here")
    servers.add_argument("--logs", type=Path, metavar="FOLDER", help="keeps the logs of these servers")
    servers.add_argument("--url", help="a running server's API, such as http://127.0.0.1:8000/v1; --backends names it")
    servers.add_argument("--name", help="what that server calls the model (default: the only one that it has)")
    servers.add_argument("--log", type=Path, metavar="FILE", help="that server's log, which tells the densities")
    downloaded = found.add_argument_group("downloaded samples", EXTERNAL)
    downloaded.add_argument(
        "--infinitebench", nargs="+", type=Path, default=[], metavar="JSONL",
        help=f"named by their tasks: {', '.join(infinitebench.RULES)}",
    )  # fmt: skip
    downloaded.add_argument("--longbench-v2", type=Path, metavar="JSON", help="data.json, or JSON lines")
    return found


def opened(args: argparse.Namespace) -> list[File]:
    """The files that were named."""
    openers: list[tuple[Callable[[Path], File], Path]] = [(infinitebench.open_file, p) for p in args.infinitebench]
    openers += [(longbench.open_file, args.longbench_v2)] if args.longbench_v2 else []
    return [open_file(path) for open_file, path in openers]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    given = parser()
    args = given.parse_args()
    if args.concurrency < 1:
        given.error("--concurrency takes 1 or more")
    if args.plot and (problem := picture.problem(args.plot)):
        given.error(problem)
    # A server would outlive this program, and hold the GPU's memory, if a time limit just ended it.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        files = opened(args)
        tasks = args.tasks if args.tasks is not None else () if files else suite.TASKS
        found, repeated = measure(
            args.model, args.out, tasks=tasks, files=files, lengths=args.lengths, samples=args.samples,
            backends=args.backends, seed=args.seed, chat=not args.plain, concurrency=args.concurrency,
            server=args.server, logs=args.logs, url=args.url, name=args.name, log=args.log,
        )  # fmt: skip
        if args.plot:
            draw(found, Path(args.model).resolve().name, args.plot)
    except (TaskError, CaptureError) as error:
        sys.exit(f"tasks: {error}")
    except OSError as error:
        sys.exit(f"tasks: cannot write {error.filename or args.plot}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("tasks: stopped; the same command goes on from here")
    print(summary(found, repeated))
