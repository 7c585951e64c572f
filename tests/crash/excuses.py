"""Why a role does not reach a label. Every label is reached by some role; test_labels.py wants a reason for the others.

Patterns as in fnmatch, several in a line; the first that fits counts.
"""

from __future__ import annotations

import fnmatch

_COORDINATOR = (
    "transfer_* epoch_* host_* service_* scrub_* recover_* listener_bound grant_unanswered return_counted "
    "register_unanswered guard_kept published withdrawn restored",
    "a step of the coordinator",
)
_CALLS = (
    "ring_* relay_* welcome_sent value_* call_* method_returned reply_* refs_taken_back",
    "calls nobody, and is not called",
)
_FORWARDING = ("relay_*", "forwards nothing")
_COMING = ("attach_*", "attaches as every host does: see the creator")
_ALLOCATING = ("alloc_* scatter_* pte_hole", "allocates nothing: see the creator")
_MAKING = (
    "slot_taken overflow_linked overflow_counted runs_stored ref_filled ref_published share_* move_* clone_* view_moved "
    "frame_overcounted pte_cleared",
    "makes no Ref: see the creator",
)
_MAPPING = ("map_* view_shown view_claimed ref_accepted", "maps nothing: see the mapper")
_FREEING = (
    "frame_left_use pte_uncounted free_* drop_* overflow_unlinked view_dropping return_* detach_*",
    "gives nothing up: see the freeing host",
)
_HOME = (
    "home_*",
    "frees nothing that others have made, and gets nothing back: see the freeing host and the creator",
)
_STORING = ("cow_* fill_*", "no store of its own faults: see the faulting host")
_PIECES = (
    "scatter_* pte_hole overflow_*",
    "its arguments lie in one piece: see the creator and the freeing host for others",
)
_LEAVING = ("return_* detach_*", "stays, and keeps what is free: see the freeing host")
_TOO_OFTEN = (
    "frame_overcounted share_undoing share_undone clone_*",
    "does not clone, nor share what is shared too often: see the creator",
)
_NO_MEMORY = (
    "frame_* pte_* alloc_* scatter_* free_* slot_taken overflow_* runs_stored ref_* share_* move_* clone_* drop_* map_* "
    "view_* home_* cow_* fill_* grant_wanted grant_received return_worded return_untold return_told attach_* detach_*",
    "the DM layer of a host: maps no frame and makes no Ref",
)

EXCUSES: dict[str, list[tuple[str, str]]] = {
    "creator": [
        ("home_begun home_sent home_found_gone home_taken_back home_hinted home_ended", "frees nothing that others have made"),
        ("map_claimed map_put_back map_placed map_copied map_dropping view_shown", _MAPPING[1]),
        _FREEING,
        _STORING,
        _CALLS,
        _COORDINATOR,
    ],
    "mapper": [
        _HOME,
        ("scatter_*", _ALLOCATING[1]),
        _MAKING,
        ("view_claimed", "a view becomes a mapping when it is shared or stored to: see creator, faulting host"),
        ("drop_claimed", "of a copied Ref it is the mapper already: map_dropping"),
        _FREEING,
        _STORING,
        _COMING,
        _CALLS,
        _COORDINATOR,
    ],
    "freeing host": [
        ("home_taken_in", "nothing comes home to it: see the creator"),
        ("frame_in_use pte_set grant_*", "takes no frame: see the creator"),
        _ALLOCATING,
        _MAKING,
        _MAPPING,
        _STORING,
        _COMING,
        _CALLS,
        _COORDINATOR,
    ],
    "faulting host": [
        _HOME,
        ("map_claimed map_put_back map_placed map_copied map_dropping view_shown ref_accepted", _MAPPING[1]),
        _ALLOCATING,
        _MAKING,
        _FREEING,
        _COMING,
        _CALLS,
        _COORDINATOR,
    ],
    "caller": [
        ("home_found_gone home_taken_back", "whose frames it frees lives: see the freeing host"),
        _PIECES,
        _TOO_OFTEN,
        ("free_*", "its buffers are shared or given away by the time they are freed"),
        ("drop_progress", "of what it drops nobody else has a count"),
        ("map_* view_claimed view_moved", "looks at results through views, and stores to none of them"),
        _STORING,
        _LEAVING,
        _COMING,
        _FORWARDING,
        ("welcome_sent call_admitted method_returned reply_written reply_remembered reply_sent reply_discarded", "a step of the callee"),
        _COORDINATOR,
    ],
    "forwarder": [
        ("value_* call_* method_returned reply_* refs_taken_back", "reads headers only, and holds no Ref"),
        _COORDINATOR,
        _NO_MEMORY,
    ],
    "callee": [
        ("home_found_gone home_taken_back", "whose frames it frees lives: see the freeing host"),
        _PIECES,
        _TOO_OFTEN,
        ("share_*", "what it returns is nobody else's, and moves"),
        ("map_put_back map_placed map_copied map_dropping", "looks at arguments through views"),
        ("fill_*", "allocates nothing lazily"),
        _LEAVING,
        _COMING,
        _FORWARDING,
        ("call_written call_sent reply_read", "a step of the caller"),
        _COORDINATOR,
    ],
    "coordinator": [_CALLS, _NO_MEMORY],
    "repairer": [
        ("transfer_* epoch_* listener_bound grant_unanswered return_counted register_unanswered guard_kept restored", "serves nobody"),
        ("host_cleared host_entered host_active", "admits nobody"),
        ("host_declared_dead host_reclaimed host_forgotten", "has no books: its steps are host_state_set"),
        ("service_written service_live published withdrawn", "publishes nothing"),
        ("recover_pte_undone recover_op_settled recover_told_home", "whoever is dead died at rest: see the coordinator"),
        _CALLS,
        _NO_MEMORY,
    ],
    "coordinator again": [
        ("epoch_left", "does not stop in order"),
        ("host_cleared host_entered host_active register_unanswered guard_kept", "has admitted nobody yet"),
        ("service_written service_live published withdrawn grant_unanswered return_counted", "has been asked for nothing yet"),
        ("scrub_*", "scrubs when it has recovered"),
        ("recover_pte_undone", "the interrupted operations of these hosts set no entry"),
        _CALLS,
        _NO_MEMORY,
    ],
}  # fmt: skip


def excuse(role: str, label: str) -> str:
    """Return why a role does not reach a label; empty: no reason is known."""
    for patterns, reason in EXCUSES.get(role, ()):
        if any(fnmatch.fnmatchcase(label, pattern) for pattern in patterns.split()):
            return reason
    return ""
