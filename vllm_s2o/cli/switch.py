"""`vllm-s2o switch`: S2O off and on again in a server that runs."""

from typing import Any

import click

from vllm_s2o.cli.options import as_json, print_json
from vllm_s2o.metrics import place


@click.command(short_help="S2O off or on in a running server.")
@click.argument("state", type=click.Choice(["on", "off"]), required=False)
@click.option("--server", "pid", type=int, metavar="PID", help="Which one, where several run.")
@as_json
def switch(state: str | None, pid: int | None, as_json: bool) -> None:
    """Turn S2O off or on in a server that runs on this machine for this user, or show what is on.

    It holds for prompts that come afterwards: one that is being computed, or waits, keeps its path. Without a state,
    the servers are listed.

    \b
    Example:
      vllm-s2o switch
    """
    servers = place.running()
    if pid is not None:
        servers = [server for server in servers if server.pid == pid]
        if not servers:
            raise click.ClickException(f"there is no server {pid} with the S2O backend that this user runs here.")
    if state is not None:
        if not servers:
            raise click.ClickException("there is no server with the S2O backend that this user runs here.")
        if len(servers) > 1:
            named = ", ".join(f"{server.pid} ({server.model})" for server in servers)
            raise click.ClickException(f"several servers run: {named}; name one with --server.")
        from vllm_s2o.metrics.switch import set_switch

        try:
            set_switch(state == "on", servers[0])
        except (OSError, RuntimeError) as error:
            raise click.ClickException(f"the switch is as it was: {error}.") from None
    if as_json:
        print_json([_document(server) for server in servers])
        return
    for server in servers:
        click.echo(f"server {server.pid} ({server.model}): S2O is {'on' if server.on else 'off'} for new prompts")
    if not servers:
        click.echo("no server with the S2O backend runs here for this user")


def _document(server: place.Server) -> dict[str, Any]:
    return {"server": server.pid, "model": server.model, "on": server.on}
