"""human-monitor-command: a line of the human monitor through QMP (QEMU qapi/misc.json).

Runs on the event loop; the line takes its turn among the commands.
"""

from __future__ import annotations

from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class HumanMonitorCommand(QapiModel):
    """``cpu_index`` is accepted; there is no CPU that a block command could mean."""

    command_line: str
    cpu_index: int | None = None


@command("human-monitor-command", args=HumanMonitorCommand, returns=str, nested=True)
async def human_monitor_command(context: Context, arguments: HumanMonitorCommand) -> str:
    """What the line prints; its errors are part of that text, not errors of this command."""
    from liveblockd.qmp.hmp import run_line  # not before somebody wants it

    return await run_line(context, arguments.command_line)
