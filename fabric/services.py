"""The service table, as somebody sees it who looks into the device: nobody is asked.

The coordinator writes while others read. An entry that is being freed or written may look damaged for a moment; one that
looks damaged twice, with the same serial number, is.
"""

from __future__ import annotations

import json
from typing import Any

from dmrpc_cxl._native import LAYOUT, Device

PUBLISHED = "published"
SUPERSEDED = (
    "superseded"  # published anew by its host; the coordinator died before it freed this entry
)
LEFT_BEHIND = (
    "left behind"  # by a host that is gone; a coordinator removes it when it comes upon it
)
DAMAGED = "damaged"


def services(device: Device) -> list[dict[str, Any]]:
    """List the entries of the service table by serial number; plain values, fit for JSON.

    Returns:
        For each its slot, serial, name, endpoint, host, and state: one of the constants above.
    """
    incarnations = {
        host["host"]: host["incarnation"]
        for host in device.hosts()
        if host["state"] == LAYOUT["HOST_ACTIVE"]
    }
    found = device.services()
    if any(entry["damaged"] for entry in found):
        suspects = {(entry["slot"], entry["serial"]) for entry in found if entry["damaged"]}
        found = device.services()
        for entry in found:
            entry["damaged"] = entry["damaged"] and (entry["slot"], entry["serial"]) in suspects
    newest = {entry["name"]: entry["serial"] for entry in found if not entry["damaged"]}
    rows = []
    for entry in found:
        state, endpoint = PUBLISHED, None
        try:
            endpoint = None if entry["damaged"] else json.loads(entry["endpoint"])
        except ValueError:
            entry["damaged"] = True
        if entry["damaged"]:
            state = DAMAGED
        elif incarnations.get(entry["host"]) != entry["incarnation"]:
            state = LEFT_BEHIND
        elif newest[entry["name"]] != entry["serial"]:
            state = SUPERSEDED
        rows.append(
            {
                "slot": entry["slot"],
                "serial": entry["serial"],
                "name": entry["name"].decode(errors="replace"),
                "endpoint": endpoint,
                "host": entry["host"],
                "state": state,
            }
        )
    return rows


def account(device: Device) -> dict[str, Any]:
    """Account for every frame and every name.

    Returns:
        As `Device.audit`, and "services": how many names are published. A damaged entry is a violation as well.
    """
    audit, rows = device.audit(), services(device)
    damaged = [row for row in rows if row["state"] == DAMAGED]
    return {
        **audit,
        "services": sum(row["state"] == PUBLISHED for row in rows),
        "nr_violations": audit["nr_violations"] + len(damaged),
        "violations": [
            *audit["violations"],
            *(
                (None, f"entry {row['slot']} of the service table makes no sense")
                for row in damaged
            ),
        ],
    }
