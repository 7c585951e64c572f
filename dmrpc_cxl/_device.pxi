# _device.pxi - the device file for Python: what csrc/device.h does, for the coordinator and the tools.
# Included by _native.pyx after _errors.pxi.
#
# A call that may take longer than a few microseconds releases the GIL. `users` counts the calls that are running so:
# close() refuses to unmap the device under them.

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from dmrpc_cxl._layout cimport *


# ---------------------------------------------------------------- constants

COUNTERS = tuple(
    (dm_device_counters[i].name.decode(), dm_device_counters[i].text.decode())
    for i in range(DM_NR_COUNTERS)
)
cdef tuple _COUNTER_NAMES = tuple(name for name, _ in COUNTERS)

LAYOUT = {
    "MAGIC": DM_MAGIC,
    "LAYOUT_VERSION": DM_LAYOUT_VERSION,
    "SUPERBLOCK_BYTES": DM_SUPERBLOCK_BYTES,
    "SUPERBLOCK_CHECKED_BYTES": <size_t>&(<dm_superblock *>NULL).checksum,
    "DATA_ALIGN": DM_DATA_ALIGN,
    "MAX_HOSTS": DM_MAX_HOSTS,
    "MAX_FRAMES": DM_MAX_FRAMES,
    "MAX_REFS": DM_MAX_REFS,
    "NAME_BYTES": DM_NAME_BYTES,
    "SECRET_BYTES": DM_SECRET_BYTES,
    "UNIX_PATH_BYTES": sizeof((<dm_coordinator *>NULL).unix_path),
    "NO_FRAME": DM_NO_FRAME,
    "OWNER_POOL": DM_OWNER_POOL,
    "REFCOUNT_MAX": DM_REFCOUNT_MAX,
    "HOST_ENTRY_BYTES": sizeof(dm_host_entry),
    "REF_ENTRY_BYTES": sizeof(dm_ref_entry),
    "REF_WIRE_BYTES": sizeof(dm_ref_wire),
    "REF_INLINE_RUNS": DM_REF_INLINE_RUNS,
    "REF_EXCLUSIVE": DM_REF_EXCLUSIVE,
    "PTE_PRESENT": DM_PTE_PRESENT,
    "PTE_HEAD": DM_PTE_HEAD,
    "PTE_HOLE": DM_PTE_HOLE,
    "PTE_PFN": DM_PTE_PFN,
    "HOST_FREE": <int>DM_HOST_FREE,
    "HOST_ACTIVE": <int>DM_HOST_ACTIVE,
    "HOST_DEAD": <int>DM_HOST_DEAD,
    "HOST_DRAINING": <int>DM_HOST_DRAINING,
    "REF_FREE": <int>DM_REF_FREE,
    "REF_BUILDING": <int>DM_REF_BUILDING,
    "REF_LIVE": <int>DM_REF_LIVE,
    "REF_MAPPING": <int>DM_REF_MAPPING,
    "REF_DROPPING": <int>DM_REF_DROPPING,
    "INTENT_NONE": <int>DM_INTENT_NONE,
    "INTENT_ALLOC": <int>DM_INTENT_ALLOC,
    "INTENT_FREE_X": <int>DM_INTENT_FREE_X,
    "INTENT_SHARE": <int>DM_INTENT_SHARE,
    "INTENT_MOVE": <int>DM_INTENT_MOVE,
    "INTENT_MAP": <int>DM_INTENT_MAP,
    "INTENT_CLONE": <int>DM_INTENT_CLONE,
    "INTENT_DROP": <int>DM_INTENT_DROP,
    "INTENT_COW": <int>DM_INTENT_COW,
    "INTENT_FILL": <int>DM_INTENT_FILL,
    "INTENT_RETURN": <int>DM_INTENT_RETURN,
}


cdef tuple _packing(size_t total, list fields):
    """Return the `struct` format of a C struct of only integers and byte arrays, and its field names.

    fields: (name, offset, size, is_bytes) in order. A struct with padding would need it here: refused.
    """
    cdef size_t at = 0
    codes = {1: "B", 2: "H", 4: "I", 8: "Q"}
    text = "<"
    for name, offset, size, is_bytes in fields:
        assert offset == at, f"padding before {name}"
        text += f"{size}s" if is_bytes else codes[size]
        at += size
    assert at == total, "padding at the end"
    return text, tuple(name for name, _, _, _ in fields)


cdef dict _structs():
    cdef dm_msg_header *header = NULL
    cdef dm_msg_hello *hello = NULL
    cdef dm_msg_hello_reply *hello_reply = NULL
    cdef dm_msg_register *reg = NULL
    cdef dm_msg_registered *done = NULL
    cdef dm_msg_rejoin *rejoin = NULL
    cdef dm_msg_grant *grant = NULL
    cdef dm_msg_recall *recall = NULL
    cdef dm_run *run = NULL
    return {
        "header": _packing(sizeof(dm_msg_header), [
            ("magic", <size_t>&header.magic, sizeof(header.magic), False),
            ("version", <size_t>&header.version, sizeof(header.version), False),
            ("type", <size_t>&header.type, sizeof(header.type), False),
            ("status", <size_t>&header.status, sizeof(header.status), False),
            ("length", <size_t>&header.length, sizeof(header.length), False),
            ("request", <size_t>&header.request, sizeof(header.request), False),
        ]),
        "hello": _packing(sizeof(dm_msg_hello), [
            ("fabric_id", <size_t>&hello.fabric_id, sizeof(hello.fabric_id), False),
            ("secret", <size_t>&hello.secret, sizeof(hello.secret), True),
        ]),
        "hello_reply": _packing(sizeof(dm_msg_hello_reply), [
            ("epoch", <size_t>&hello_reply.epoch, sizeof(hello_reply.epoch), False),
        ]),
        "register": _packing(sizeof(dm_msg_register), [
            ("token", <size_t>&reg.token, sizeof(reg.token), False),
            ("start_time", <size_t>&reg.start_time, sizeof(reg.start_time), False),
            ("pid", <size_t>&reg.pid, sizeof(reg.pid), False),
            ("low", <size_t>&reg.low, sizeof(reg.low), False),
            ("high", <size_t>&reg.high, sizeof(reg.high), False),
            ("batch", <size_t>&reg.batch, sizeof(reg.batch), False),
            ("name", <size_t>&reg.name, sizeof(reg.name), True),
        ]),
        "registered": _packing(sizeof(dm_msg_registered), [
            ("incarnation", <size_t>&done.incarnation, sizeof(done.incarnation), False),
            ("epoch", <size_t>&done.epoch, sizeof(done.epoch), False),
            ("host", <size_t>&done.host, sizeof(done.host), False),
            ("low", <size_t>&done.low, sizeof(done.low), False),
            ("high", <size_t>&done.high, sizeof(done.high), False),
            ("batch", <size_t>&done.batch, sizeof(done.batch), False),
            ("batch_max", <size_t>&done.batch_max, sizeof(done.batch_max), False),
            ("frame_limit", <size_t>&done.frame_limit, sizeof(done.frame_limit), False),
        ]),
        "rejoin": _packing(sizeof(dm_msg_rejoin), [
            ("incarnation", <size_t>&rejoin.incarnation, sizeof(rejoin.incarnation), False),
            ("host", <size_t>&rejoin.host, sizeof(rejoin.host), False),
            ("reserved", <size_t>&rejoin.reserved, sizeof(rejoin.reserved), False),
        ]),
        "grant": _packing(sizeof(dm_msg_grant), [
            ("want", <size_t>&grant.want, sizeof(grant.want), False),
            ("min_run", <size_t>&grant.min_run, sizeof(grant.min_run), False),
        ]),
        "recall": _packing(sizeof(dm_msg_recall), [
            ("want", <size_t>&recall.want, sizeof(recall.want), False),
            ("reserved", <size_t>&recall.reserved, sizeof(recall.reserved), False),
        ]),
        "run": _packing(sizeof(dm_run), [
            ("pfn", <size_t>&run.pfn, sizeof(run.pfn), False),
            ("count", <size_t>&run.count, sizeof(run.count), False),
        ]),
    }


WIRE = {
    "magic": DM_WIRE_MAGIC,
    "version": DM_WIRE_VERSION,
    "max_payload": DM_WIRE_MAX_PAYLOAD,
    "max_runs": DM_WIRE_MAX_RUNS,
    "types": {
        "HELLO": <int>DM_MSG_HELLO,
        "REGISTER": <int>DM_MSG_REGISTER,
        "REJOIN": <int>DM_MSG_REJOIN,
        "GUARD": <int>DM_MSG_GUARD,
        "GRANT": <int>DM_MSG_GRANT,
        "RETURN": <int>DM_MSG_RETURN,
        "LEAVE": <int>DM_MSG_LEAVE,
        "PUBLISH": <int>DM_MSG_PUBLISH,
        "WITHDRAW": <int>DM_MSG_WITHDRAW,
        "LOOKUP": <int>DM_MSG_LOOKUP,
        "LIST": <int>DM_MSG_LIST,
        "STATS": <int>DM_MSG_STATS,
        "HOSTS": <int>DM_MSG_HOSTS,
        "SHUTDOWN": <int>DM_MSG_SHUTDOWN,
        "WAIT": <int>DM_MSG_WAIT,
        "NOTIFY_RECALL": <int>DM_MSG_NOTIFY_RECALL,
        "NOTIFY_FENCED": <int>DM_MSG_NOTIFY_FENCED,
    },
    "status": {
        "OK": <int>DM_WIRE_OK,
        "BAD_REQUEST": <int>DM_WIRE_BAD_REQUEST,
        "DENIED": <int>DM_WIRE_DENIED,
        "VERSION_MISMATCH": <int>DM_WIRE_VERSION_MISMATCH,
        "NO_FRAMES": <int>DM_WIRE_NO_FRAMES,
        "NO_HOST_SLOT": <int>DM_WIRE_NO_HOST_SLOT,
        "NOT_REGISTERED": <int>DM_WIRE_NOT_REGISTERED,
        "FENCED": <int>DM_WIRE_FENCED,
        "NOT_FOUND": <int>DM_WIRE_NOT_FOUND,
        "EXISTS": <int>DM_WIRE_EXISTS,
        "QUOTA": <int>DM_WIRE_QUOTA,
        "INTERNAL": <int>DM_WIRE_INTERNAL,
        "SHUTTING_DOWN": <int>DM_WIRE_SHUTTING_DOWN,
    },
    "structs": _structs(),
}


# ---------------------------------------------------------------- making

cdef dict _geometry_fields(const dm_superblock *sb):
    return {
        "page_size": sb.page_size,
        "nr_frames": sb.nr_frames,
        "max_hosts": sb.max_hosts,
        "max_refs": sb.max_refs,
        "host_table_off": sb.host_table_off,
        "ref_table_off": sb.ref_table_off,
        "frame_table_off": sb.frame_table_off,
        "page_table_off": sb.page_table_off,
        "ptes_per_host": sb.ptes_per_host,
        "vma_pages": sb.vma_pages,
        "data_off": sb.data_off,
        "device_bytes": sb.device_bytes,
    }


cdef bytes _text(object value, Py_ssize_t room, str what):
    """Encode value, which must leave room for a final NUL."""
    encoded = value.encode()
    if len(encoded) >= room:
        raise _errors.BadSize(f"{what} has {len(encoded)} bytes, at most {room - 1} fit: {value!r}")
    return encoded


def geometry(uint64_t data_bytes, uint32_t page_size, uint32_t max_hosts, uint32_t max_refs):
    """Compute where everything is in a device with data_bytes of frames; raises BadSize."""
    cdef dm_error err = no_error()
    cdef dm_superblock sb
    raise_status(
        dm_device_geometry(&sb, data_bytes, page_size, max_hosts, max_refs, &err), &err, "geometry"
    )
    return _geometry_fields(&sb)


def format_device(
    int fd, str name, uint64_t data_bytes, uint32_t page_size, uint32_t max_hosts, uint32_t max_refs
):
    """Make a device of an open file, which is empty or has the size that geometry() says.

    Allocates every table but the page tables, erases what they held, and writes the superblock, magic last. The data
    area is not touched. Raises BadSize, NotADevice (not a regular file), DeviceFull, SystemCallFailed.
    """
    cdef dm_error err = no_error()
    cdef dm_superblock sb
    cdef int status
    cdef bytes encoded = _text(name, DM_NAME_BYTES, "the fabric's name")
    cdef const char *c_name = encoded
    with nogil:
        status = dm_device_geometry(&sb, data_bytes, page_size, max_hosts, max_refs, &err)
        if status == DM_OK:
            status = dm_device_format(fd, c_name, &sb, &err)
    raise_status(status, &err, "format_device")


def allocate(int fd, uint64_t offset, uint64_t size):
    """Allocate bytes of a device file that nobody uses yet, in huge pages where the kernel gives them.

    offset is a multiple of 2 MiB. Returns how many bytes are in huge pages. Raises DeviceFull, SystemCallFailed.
    """
    cdef dm_error err = no_error()
    cdef uint64_t huge = 0
    cdef int status
    with nogil:
        status = dm_allocate(fd, offset, size, &huge, &err)
    raise_status(status, &err, "allocate")
    return huge


# ---------------------------------------------------------------- using

cdef dict _host_fields(uint32_t host, dm_host_entry *entry):
    return {
        "host": host,
        "state": entry.state,
        "pid": entry.pid,
        "start_time": entry.start_time,
        "incarnation": entry.incarnation,
        "heartbeat_ns": entry.heartbeat_ns,
        "nr_free": entry.nr_free,
        "nr_reserved": entry.nr_reserved,
        "vm_pieces": entry.vm_pieces,
        "frame_limit": entry.frame_limit,
        "registered_ns": entry.registered_ns,
        "name": entry.name.decode("utf-8", "replace"),
        "intent": {
            "op": entry.intent.op,
            "ref": entry.intent.ref,
            "ref_state": entry.intent.ref_state,
            "page": entry.intent.page,
            "nr": entry.intent.nr,
            "progress": entry.intent.progress,
            "pfn": entry.intent.pfn,
            "ref2": entry.intent.ref2,
            "old": entry.intent.old,
        },
        "counters": {name: entry.counters[i] for i, name in enumerate(_COUNTER_NAMES)},
    }


cdef class Device:
    """A mapped and verified G-FAM file: what the coordinator and the tools need of it."""

    cdef dm_device dev
    cdef bint is_open
    cdef int users

    def __cinit__(self, int fd, bint writable=True):
        """Verify and map the device that fd, which stays the caller's, is open on."""
        cdef dm_error err = no_error()
        cdef int status
        with nogil:
            status = dm_device_open(&self.dev, fd, writable, &err)
        raise_status(status, &err, "open device")
        self.is_open = True

    def __dealloc__(self):
        if self.is_open:
            dm_device_close(&self.dev)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    cdef int enter(self, str operation) except -1:
        """Begin a call that lets go of the GIL."""
        if not self.is_open:
            raise _errors.HostClosed(f"{operation}: the device is closed")
        self.users += 1
        return 0

    cdef int leave(self, int status, dm_error *err, str operation) except -1:
        """End what enter() began, and raise what status says."""
        self.users -= 1
        return raise_status(status, err, operation)

    cdef int check_open(self, str operation) except -1:
        if not self.is_open:
            raise _errors.HostClosed(f"{operation}: the device is closed")
        return 0

    def close(self):
        """Unmap the device. Closing twice is allowed; raises BufferInUse while another thread is using it."""
        if self.users:
            raise _errors.BufferInUse("close: another thread is using the device")
        if self.is_open:
            self.is_open = False
            dm_device_close(&self.dev)

    def fileno(self):
        """Return this object's own descriptor of the file, good until close()."""
        self.check_open("fileno")
        return self.dev.fd

    @property
    def writable(self):
        """Whether the device may be changed through this object."""
        return bool(self.dev.writable)

    @property
    def superblock(self):
        """Fields of the superblock by name; the coordinator's are read now, and all 0 or '' while none runs."""
        cdef dm_coordinator coordinator
        self.check_open("superblock")
        dm_device_coordinator(&self.dev, &coordinator)
        return {
            "version": self.dev.geo.version,
            "fabric_id": self.dev.geo.fabric_id,
            "name": self.dev.geo.name.decode("utf-8", "replace"),
            "created_ns": self.dev.geo.created_ns,
            "secret": (<char *>self.dev.geo.secret)[:sizeof(self.dev.geo.secret)],
            "checksum": self.dev.geo.checksum,
            **_geometry_fields(&self.dev.geo),
            "coordinator_epoch": coordinator.epoch,
            "coordinator_pid": coordinator.pid,
            "coordinator_start_time": coordinator.start_time,
            "tcp_host": coordinator.tcp_host.decode("utf-8", "replace"),
            "tcp_port": coordinator.tcp_port,
            "unix_path": coordinator.unix_path.decode("utf-8", "surrogateescape"),
        }

    def prefault(self, uint64_t first, uint64_t nr_frames):
        """Allocate and touch frames [first, first + nr_frames) now; contents stay."""
        cdef dm_error err = no_error()
        cdef int status
        self.enter("prefault")
        with nogil:
            status = dm_device_prefault(&self.dev, first, nr_frames, &err)
        self.leave(status, &err, "prefault")

    # ------------------------------------------------------------ frames

    def frame(self, uint64_t pfn):
        """Return (refcount, owner, sequence) of a frame."""
        cdef dm_error err = no_error()
        cdef uint64_t word = 0
        self.check_open("frame")
        raise_status(dm_device_frame(&self.dev, pfn, &word, &err), &err, "frame")
        return dm_frame_refcount(word), dm_frame_owner(word), dm_frame_seq(word)

    def free_runs(self, uint16_t owner):
        """List the (first frame, count) runs with refcount 0 that owner may hand out, ascending."""
        cdef size_t cap = 4096, n = cap
        cdef uint64_t cursor = 0
        cdef dm_error err = no_error()
        cdef dm_run *runs = <dm_run *>malloc(cap * sizeof(dm_run))
        cdef list found = []
        if runs == NULL:
            raise MemoryError("free_runs")
        try:
            while n == cap:
                self.enter("free_runs")
                with nogil:
                    n = dm_device_free_runs(&self.dev, owner, &cursor, runs, cap)
                self.leave(DM_OK, &err, "free_runs")
                found.extend([(runs[i].pfn, runs[i].count) for i in range(n)])
        finally:
            free(runs)
        return found

    def transfer(self, uint64_t pfn, uint64_t count, uint32_t owner_from, uint32_t owner_to):
        """Hand frames from one owner to another; return how many, from pfn on, changed hands.

        Stops at the first frame that is in use or not owned by owner_from.
        """
        cdef dm_error err = no_error()
        cdef uint64_t moved = 0
        cdef int status
        self.enter("transfer")
        with nogil:
            status = dm_device_transfer(&self.dev, pfn, count, owner_from, owner_to, &moved, &err)
        self.leave(status, &err, "transfer")
        return moved

    def reclaim_host(self, uint32_t host_id):
        """Take back what a dead host alone held; Refs that others accepted and pages that others map stay good.

        The host's process must be gone for certain. May be repeated after a crash of the caller. Returns counts:
        intent, pages_unmapped, refs_dropped, frames_reclaimed, refs_damaged, duration_ns.
        """
        cdef dm_error err = no_error()
        cdef dm_recovery done
        cdef int status
        self.enter("reclaim_host")
        with nogil:
            status = dm_recover_host(&self.dev, host_id, &done, &err)
        self.leave(status, &err, "reclaim_host")
        return {
            "intent": done.intent,
            "pages_unmapped": done.pages_unmapped,
            "refs_dropped": done.refs_dropped,
            "frames_reclaimed": done.frames_reclaimed,
            "refs_damaged": done.refs_damaged,
            "duration_ns": done.duration_ns,
        }

    # ------------------------------------------------------------ coordinator

    def start_coordinator(
        self, uint32_t pid, uint64_t start_time, str unix_path, str tcp_host, uint32_t tcp_port
    ):
        """Enter a coordinator in the superblock and return its epoch.

        The caller makes sure that no other coordinator of this fabric runs or starts.
        """
        cdef dm_error err = no_error()
        cdef dm_coordinator who
        cdef bytes path = _text(unix_path, sizeof(who.unix_path), "the socket's path")
        cdef bytes host = _text(tcp_host, sizeof(who.tcp_host), "the TCP host")
        self.check_open("start_coordinator")
        memset(&who, 0, sizeof(who))
        who.pid = pid
        who.start_time = start_time
        who.tcp_port = tcp_port
        memcpy(who.unix_path, <const char *>path, len(path))
        memcpy(who.tcp_host, <const char *>host, len(host))
        raise_status(
            dm_device_start_coordinator(&self.dev, &who, &err), &err, "start_coordinator"
        )
        return who.epoch

    def stop_coordinator(self, uint64_t epoch):
        """Take the coordinator of that epoch out of the superblock; False when a later one took over."""
        self.check_open("stop_coordinator")
        return bool(dm_device_stop_coordinator(&self.dev, epoch))

    # ------------------------------------------------------------ hosts

    def hosts(self):
        """List the host entries that are not free, as host() returns them."""
        cdef uint32_t host
        self.check_open("hosts")
        return [
            self.host(host)
            for host in range(1, self.dev.geo.max_hosts + 1)
            if self.dev.hosts[host - 1].state != DM_HOST_FREE
        ]

    def host(self, uint32_t host_id):
        """Return the fields of a host entry by name, in any state, with its intent and counters as dicts."""
        cdef dm_error err = no_error()
        cdef dm_host_entry entry
        self.check_open("host")
        raise_status(dm_device_host(&self.dev, host_id, &entry, &err), &err, "host")
        return _host_fields(host_id, &entry)

    def activate_host(
        self,
        uint32_t host_id,
        uint32_t pid,
        uint64_t start_time,
        uint64_t incarnation,
        str name,
        uint32_t frame_limit,
    ):
        """Make a free host entry active, with an empty page table, no intent and counters at 0.

        A name that is too long is cut. Raises BadSize, BufferInUse (the entry is not free), DeviceFull.
        """
        cdef dm_error err = no_error()
        cdef dm_host_identity who
        cdef bytes encoded = name.encode()[: DM_NAME_BYTES - 1].decode("utf-8", "ignore").encode()
        cdef int status
        who.pid = pid
        who.start_time = start_time
        who.incarnation = incarnation
        who.frame_limit = frame_limit
        who.name = encoded
        self.enter("activate_host")
        with nogil:
            status = dm_device_activate_host(&self.dev, host_id, &who, &err)
        self.leave(status, &err, "activate_host")

    def set_host_state(self, uint32_t host_id, uint32_t expect, uint32_t state):
        """Change a host entry's state from expect to state; False when it was in another one."""
        cdef dm_error err = no_error()
        cdef dm_bool changed = False
        self.check_open("set_host_state")
        raise_status(
            dm_device_set_host_state(&self.dev, host_id, expect, state, &changed, &err),
            &err,
            "set_host_state",
        )
        return bool(changed)

    # ------------------------------------------------------------ Refs and accounting

    def refs(self):
        """List the Ref entries that are not free. The nonces, which prove a right, are left out."""
        cdef dm_ref_entry ref
        cdef uint32_t entry
        cdef list found = []
        self.check_open("refs")
        for entry in range(self.dev.geo.max_refs):
            if self.dev.refs[entry].state & 0xff == DM_REF_FREE:
                continue
            dm_device_ref(&self.dev, entry, &ref)
            if dm_ref_state(ref.state) == DM_REF_FREE:
                continue
            found.append({
                "entry": entry,
                "state": dm_ref_state(ref.state),
                "exclusive": bool(dm_ref_flags(ref.state) & DM_REF_EXCLUSIVE),
                "holder": dm_ref_holder(ref.state),
                "generation": dm_ref_gen(ref.state),
                "creator": ref.creator,
                "length": ref.length,
                "page_offset": ref.page_offset,
                "nr_pages": ref.nr_pages,
                "nr_runs": ref.nr_runs,
                "nr_overflow": ref.nr_overflow,
            })
        return found

    def audit(self):
        """Account for every frame: compare refcounts with mappings and Refs, and owners with hosts.

        Exact on a quiescent fabric; with operations in flight ("in_flight" above 0) what it reports may be transient.
        "violations" holds the first ones as (frame or None, text), "nr_violations" counts them all.
        """
        cdef dm_error err = no_error()
        cdef dm_audit *found = <dm_audit *>malloc(sizeof(dm_audit))
        cdef int status
        cdef uint32_t i
        if found == NULL:
            raise MemoryError("audit")
        try:
            self.enter("audit")
            with nogil:
                status = dm_device_audit(&self.dev, found, &err)
            self.leave(status, &err, "audit")
            return {
                "nr_frames": self.dev.geo.nr_frames,
                "pool": found.pool,
                "free": {
                    host: found.free_of[host]
                    for host in range(1, self.dev.geo.max_hosts + 1)
                    if found.free_of[host]
                },
                "in_use": found.in_use,
                "mapped_pages": found.mapped_pages,
                "hole_pages": found.hole_pages,
                "live_refs": found.live_refs,
                "ref_pages": found.ref_pages,
                "overflow_frames": found.overflow_frames,
                "in_flight": found.in_flight,
                "nr_violations": found.nr_violations,
                "violations": [
                    (
                        None if found.violations[i].pfn == DM_NO_FRAME else found.violations[i].pfn,
                        found.violations[i].text.decode("utf-8", "replace"),
                    )
                    for i in range(min(found.nr_violations, DM_AUDIT_MAX_VIOLATIONS))
                ],
            }
        finally:
            free(found)
