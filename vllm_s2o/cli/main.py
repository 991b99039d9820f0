"""The command `vllm-s2o`: its subcommands, and how all of them end.

What is wrong is said in one line on stderr, by `config validate` in one for each field: status 1 where the work shows
it, 2 where the command is not understood.
"""

import os
import signal
import sys

import click

# PyTorch's threads wait for each other without keeping their cores busy. Where the cores are shared, as those of most
# virtual machines are, calibrating takes seven times as long otherwise. Read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vllm_s2o.cli.bench import bench
from vllm_s2o.cli.calibrate import calibrate
from vllm_s2o.cli.config_commands import config
from vllm_s2o.cli.doctor import doctor
from vllm_s2o.cli.evaluate import evaluate
from vllm_s2o.cli.report import report
from vllm_s2o.cli.switch import switch
from vllm_s2o.config import ConfigError
from vllm_s2o.version import __version__

PROGRAM = "vllm-s2o"


@click.group(PROGRAM, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """S2O, sparse prefill for long prompts in vLLM: is it set up, and with which values?

    \b
    Example:
      vllm-s2o doctor
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(bench)
cli.add_command(calibrate)
cli.add_command(config)
cli.add_command(doctor)
cli.add_command(evaluate)
cli.add_command(report)
cli.add_command(switch)


def main() -> None:
    try:
        status = cli.main(prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        status = _refuse(error)
    except ConfigError as error:
        click.echo(f"{PROGRAM}: {error}", err=True)
        status = 1
    except (click.Abort, KeyboardInterrupt):
        status = 128 + signal.SIGINT
    except OSError as error:  # a full disk, say; click ends quietly where the reader of a pipe has gone
        where = f" ({error.filename})" if error.filename else ""
        click.echo(f"{PROGRAM}: reading or writing failed: {error.strerror or error}{where}.", err=True)
        _drop_output()
        status = 1
    sys.exit(status if isinstance(status, int) else 0)


def _drop_output() -> None:
    """What stdout does not take: Python would try again at its end, show an exception and end with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(error: click.ClickException) -> int:
    """click's sentence with the command that it is about, and what that allows."""
    context = getattr(error, "ctx", None)
    place = context.command_path if context else PROGRAM
    sentence = " ".join(error.format_message().split()).rstrip(".") + "."
    command = context.command if context else cli
    if isinstance(error, click.UsageError):
        allowed = sorted(command.commands) if isinstance(command, click.Group) else []
        more = f" Commands are {', '.join(allowed)}." if allowed else ""
        sentence += f"{more} See '{place} --help'."
    click.echo(f"{place}: {sentence}", err=True)
    return error.exit_code
