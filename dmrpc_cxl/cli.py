"""The console script ``dmrpc``.

Each subcommand lives in the package that it is about, and is imported when it is called for:
``dmrpc --help`` needs neither NumPy nor the native module.
"""

from __future__ import annotations

import importlib

import click

# Name -> (module, click command in it, help for the list of subcommands).
COMMANDS = {
    "fabric": ("dmrpc_cxl.fabric.commands", "fabric", "Make, look at and remove G-FAM devices."),
    "coordinator": ("dmrpc_cxl.coordinator.__main__", "main", "Run the coordinator of a fabric."),
    "net-server": (
        "dmrpc_net.server",
        "main",
        "Run a memory server, for hosts without the device.",
    ),
    "fsck": ("dmrpc_cxl.fabric.check", "main", "Account for every frame of a fabric, and repair."),
    "doctor": ("dmrpc_cxl.doctor", "main", "Check whether DmRPC can work on this machine."),
}


class Lazy(click.Group):
    """A group that imports a subcommand only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the subcommands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=Lazy)
@click.version_option(package_name="dmrpc")
def main() -> None:
    """Remote procedure call over disaggregated memory."""


if __name__ == "__main__":
    main()
