# _wire.pxi - csrc/net_wire.h for Python, and the one place where a status becomes an exception. Included by _native.pyx.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy, memset

from dmrpc_net._netc cimport *

from dmrpc_cxl import errors as _cxl
from dmrpc_net import errors as _errors


cdef extern from *:
    """
    #define NET_ROW(name, meaning) #name "\\0" meaning "\\0"
    static const char net_counter_text[] = NET_COUNTERS(NET_ROW);
    #undef NET_ROW
    """
    const char net_counter_text[]


def _counter_rows():
    cdef const char *at = net_counter_text
    rows = []
    for _ in range(NET_NR_COUNTERS):
        name = (<bytes>at)
        at += len(name) + 1
        meaning = (<bytes>at)
        at += len(meaning) + 1
        rows.append((name.decode(), meaning.decode()))
    return tuple(rows)


COUNTERS = _counter_rows()

WIRE = {
    "magic": NET_MAGIC,
    "version": NET_VERSION,
    "secret_bytes": NET_SECRET_BYTES,
    "max_transfer": NET_MAX_TRANSFER,
    "send_buffer": NET_SEND_BUFFER,
    "max_servers": NET_MAX_SERVERS,
    "max_shards": NET_MAX_SHARDS,
    "nr_sessions": NET_NR_SESSIONS,
    "ref_tag": NET_REF_TAG,
    "control": NET_CONTROL,
    "data": NET_DATA,
    "ops": {
        "RALLOC": NET_RALLOC, "RFREE": NET_RFREE, "CREATE_REF": NET_CREATE_REF,
        "MAP_REF": NET_MAP_REF, "RREAD": NET_RREAD, "RWRITE": NET_RWRITE,
        "ACCEPT_REF": NET_ACCEPT_REF, "CLONE_REF": NET_CLONE_REF, "DROP_REF": NET_DROP_REF,
        "PUT": NET_PUT, "GET": NET_GET, "HELD": NET_HELD, "UNDO": NET_UNDO, "STATS": NET_STATS,
        "AUDIT": NET_AUDIT, "PING": NET_PING,
    },
    "flags": {
        "COPY": NET_COPY, "MOVE": NET_MOVE, "READ_ONLY": NET_READ_ONLY, "KEEP": NET_KEEP,
        "ANEW": NET_ANEW, "ANYBODYS": NET_ANYBODYS,
    },
    "status": {
        "OK": NET_OK, "BAD_ADDRESS": NET_BAD_ADDRESS, "BAD_SIZE": NET_BAD_SIZE,
        "BAD_REF": NET_BAD_REF, "REF_CONSUMED": NET_REF_CONSUMED,
        "TOO_MANY_REFS": NET_TOO_MANY_REFS, "IS_READ_ONLY": NET_IS_READ_ONLY,
        "OUT_OF_PAGES": NET_OUT_OF_PAGES, "OVER_QUOTA": NET_OVER_QUOTA,
        "NO_REF_SLOT": NET_NO_REF_SLOT, "NO_ADDRESS_SPACE": NET_NO_ADDRESS_SPACE,
        "ANSWER_LOST": NET_ANSWER_LOST, "BAD_REQUEST": NET_BAD_REQUEST,
        "NO_MEMORY": NET_NO_MEMORY, "DENIED": NET_DENIED, "OTHER_VERSION": NET_OTHER_VERSION,
        "NO_PROCESS": NET_NO_PROCESS, "PID_TAKEN": NET_PID_TAKEN,
        "WRONG_SERVER": NET_WRONG_SERVER, "FULL": NET_FULL,
    },
    # Formats for struct.Struct, and the names of their fields.
    "structs": {
        "hello": (f"<IHH{NET_SECRET_BYTES}sQIHBB", (
            "magic", "version", "kind", "secret", "token", "pid", "shard", "session", "reserved",
        )),
        "welcome": ("<IHHQQQIHHII", (
            "magic", "version", "status", "epoch", "slice_bytes", "last", "pid", "server",
            "nr_shards", "page_size", "max_outstanding",
        )),
        "request": ("<IBBHQQQQQQ", (
            "payload", "op", "flags", "reserved", "id", "oldest", "a", "b", "c", "d",
        )),
        "answer": ("<IHHQQQ", ("payload", "status", "op", "id", "a", "b")),
        "ref": ("<HHIQQ", ("server", "shard", "flags", "key", "length")),
        "audit": ("<13Q", (
            "nr_pages", "nr_free", "in_use", "mapped_pages", "hole_pages", "ref_pages",
            "delivered_pages", "pages_under_way", "nr_processes", "nr_ranges", "nr_refs",
            "nr_violations", "first_violation",
        )),
    },
}

cdef dict _STATUS_ERRORS = {
    NET_BAD_ADDRESS: (_cxl.BadAddress, "not an address of this process, or not the start of a range"),
    NET_BAD_SIZE: (_cxl.BadSize, "zero, or beyond the range, the Ref or the pool"),
    NET_BAD_REF: (
        _cxl.BadRef, "no Ref, a forged one, or one of a server that has been started again since"
    ),
    NET_REF_CONSUMED: (
        _cxl.RefConsumed, "the Ref was mapped or dropped before, or its holder is gone"
    ),
    NET_TOO_MANY_REFS: (_cxl.TooManyRefs, "a page would have more holders than can be counted"),
    NET_IS_READ_ONLY: (_errors.ReadOnly, "the range was mapped read-only"),
    NET_OUT_OF_PAGES: (_cxl.OutOfFrames, "the shard has too few free pages"),
    NET_OVER_QUOTA: (_cxl.OverQuota, "this process holds as much in the shard as it may"),
    NET_NO_REF_SLOT: (_cxl.RefTableFull, "the shard has as many Refs as it may"),
    NET_NO_ADDRESS_SPACE: (_cxl.AddressSpaceFull, "no free address for a range of that size"),
    NET_ANSWER_LOST: (
        _errors.AnswerLost,
        "the connection broke, and the answer of what was carried out is not kept any more",
    ),
    NET_BAD_REQUEST: (_cxl.LocalProtocolError, "the server found this request malformed"),
    NET_NO_MEMORY: (_cxl.OutOfFrames, "the server has no memory for its tables"),
    NET_DENIED: (_cxl.AccessDenied, "the server has another secret"),
    NET_OTHER_VERSION: (_cxl.RemoteProtocolError, "the server speaks another version"),
    NET_NO_PROCESS: (_errors.ServerLost, "the server has forgotten this process"),
    NET_PID_TAKEN: (_errors.PidTaken, "another process has this process id there"),
    NET_WRONG_SERVER: (
        _cxl.RemoteProtocolError, "servers are to be given in their order, number 0 first"
    ),
    NET_FULL: (_cxl.NoHostSlot, "the server has as many clients as it takes"),
    NET_BROKEN: (_errors.ServerLost, "the connection broke"),
    NET_DEADLINE: (_cxl.DeadlineExceeded, "no answer before the deadline"),
    NET_CROWDED: (_cxl.Overloaded, "as many requests are outstanding as the server allows"),
    NET_LOST: (_errors.ServerLost, "the server is gone, and what it held of this process"),
    NET_CLOSED: (_cxl.HostClosed, "this client is closed"),
    NET_GARBLED: (_cxl.RemoteProtocolError, "the server sent what answers no request"),
    NET_STARVED: (MemoryError, "no memory"),
}


def error_of(int status, str operation):
    """Make the exception that a status stands for."""
    if status not in _STATUS_ERRORS:
        return _cxl.RemoteProtocolError(f"{operation}: the server answered with status {status}, which is none")
    kind, text = _STATUS_ERRORS[status]
    return kind(f"{operation}: {text}")
