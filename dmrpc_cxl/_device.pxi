# _device.pxi - the device file for Python: what csrc/device.h does, for the coordinator and the tools.
# Included by _native.pyx after _errors.pxi.
#
# A call that may take longer than a few microseconds releases the GIL. `users` counts the calls that are running so:
# close() refuses to unmap the device under them.

from libc.stdlib cimport calloc, free, malloc
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
    "SERVICE_SLOT_BYTES": DM_SERVICE_SLOT_BYTES,
    "SERVICE_SLOT_ROOM": DM_SERVICE_SLOT_ROOM,
    "MAX_SERVICE_NAME": DM_MAX_SERVICE_NAME,
    "MAX_SERVICE_ENDPOINT": DM_MAX_SERVICE_ENDPOINT,
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
    "REF_CLONING": <int>DM_REF_CLONING,
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
    "INTENT_HOME": <int>DM_INTENT_HOME,
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
            ("keep", <size_t>&recall.keep, sizeof(recall.keep), False),
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
        "CHECK": <int>DM_MSG_CHECK,
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
        "TABLE_FULL": <int>DM_WIRE_TABLE_FULL,
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
        "service_table_off": sb.service_table_off,
        "nr_services": sb.nr_services,
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
        "nr_coming_home": entry.homecoming.nr_frames,
        "nr_reserved": entry.nr_reserved,
        "vm_pieces": entry.vm_pieces,
        "frame_limit": entry.frame_limit,
        "registered_ns": entry.registered_ns,
        "activity": entry.activity,
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
            "died_in": entry.intent.died_in,
        },
        "counters": {name: entry.counters[i] for i, name in enumerate(_COUNTER_NAMES)},
    }


cdef uint32_t _shift(uint32_t page_size) noexcept:
    """Return the binary logarithm of a page size."""
    cdef uint32_t shift = 0
    while page_size >> shift > 1:
        shift += 1
    return shift


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

    def changing(self):
        """Return what the coordinator before the one of fence_epoch was in the midst of when that one began.

        (host entry that it may still bring to life, or 0; whether it may still change the service table). Both count only
        as long as its process exists.
        """
        cdef uint32_t host = 0
        cdef dm_bool services = False
        self.check_open("changing")
        dm_device_changing(&self.dev, &host, &services)
        return host, bool(services)

    @property
    def fence_epoch(self):
        """The coordinators' epoch that every change through this object depends on; 0: none."""
        return self.dev.fence_epoch

    @fence_epoch.setter
    def fence_epoch(self, uint64_t epoch):
        self.check_open("fence_epoch")
        self.dev.fence_epoch = epoch

    @property
    def epoch(self):
        """The coordinators' epoch now."""
        cdef dm_coordinator coordinator
        self.check_open("epoch")
        dm_device_coordinator(&self.dev, &coordinator)
        return coordinator.epoch

    # ------------------------------------------------------------ services

    def services(self):
        """List the entries of the service table by serial number, damaged ones included.

        slot, serial, host, incarnation, damaged, name, endpoint; the last two are bytes, empty when damaged.
        """
        cdef dm_service *found = <dm_service *>malloc(sizeof(dm_service))
        cdef uint32_t slot
        cdef int status
        cdef list entries = []
        self.check_open("services")
        if found == NULL:
            raise MemoryError("services")
        try:
            for slot in range(self.dev.geo.nr_services):
                status = dm_device_service(&self.dev, slot, found)
                if status == 0:
                    continue
                text = <char *>found.text
                good = status > 0
                entries.append({
                    "slot": slot,
                    "serial": found.serial,
                    "host": found.host,
                    "incarnation": found.incarnation,
                    "damaged": not good,
                    "name": text[: found.name_bytes] if good else b"",
                    "endpoint": text[found.name_bytes : found.name_bytes + found.endpoint_bytes]
                    if good else b"",
                })
        finally:
            free(found)
        return sorted(entries, key=lambda entry: entry["serial"])

    def publish(self, uint32_t host_id, uint64_t incarnation, bytes name, bytes endpoint):
        """Add a service to the table and return (slot, serial). Raises BadSize, ServiceTableFull."""
        cdef dm_error err = no_error()
        cdef dm_service *what
        cdef int status
        self.check_open("publish")
        if len(name) > DM_MAX_SERVICE_NAME or len(endpoint) > DM_MAX_SERVICE_ENDPOINT:
            raise _errors.BadSize(
                f"a name of {len(name)} bytes, an endpoint of {len(endpoint)}: at most "
                f"{DM_MAX_SERVICE_NAME} and {DM_MAX_SERVICE_ENDPOINT} fit"
            )
        what = <dm_service *>malloc(sizeof(dm_service))
        if what == NULL:
            raise MemoryError("publish")
        try:
            memset(what, 0, sizeof(dm_service))
            what.host = host_id
            what.incarnation = incarnation
            what.name_bytes = len(name)
            what.endpoint_bytes = len(endpoint)
            memcpy(what.text, <const char *>name, len(name))
            memcpy(<char *>what.text + len(name), <const char *>endpoint, len(endpoint))
            status = dm_device_publish(&self.dev, what, &err)
            raise_status(status, &err, "publish")
            dm_device_service(&self.dev, status, what)
            return status, what.serial
        finally:
            free(what)

    def withdraw(self, uint32_t slot, uint64_t serial):
        """Free the entry of the service table with that serial number."""
        cdef dm_error err = no_error()
        self.check_open("withdraw")
        raise_status(dm_device_withdraw(&self.dev, slot, serial, &err), &err, "withdraw")

    # ------------------------------------------------------------ hosts

    def owned(self):
        """Count the frames whose words name each owner, in use or free: {owner: frames}, the pool's left out."""
        cdef uint64_t *counts = <uint64_t *>calloc(DM_MAX_HOSTS + 1, sizeof(uint64_t))
        cdef dm_error err = no_error()
        cdef uint32_t host
        if counts == NULL:
            raise MemoryError("owned")
        try:
            self.enter("owned")
            with nogil:
                dm_device_owned(&self.dev, counts)
            self.leave(DM_OK, &err, "owned")
            return {host: counts[host] for host in range(1, DM_MAX_HOSTS + 1) if counts[host]}
        finally:
            free(counts)

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

    def forget_refs(self):
        """Free every Ref entry, counts untouched, and return how many: for a fabric in which nobody lives."""
        self.check_open("forget_refs")
        if not self.dev.writable:
            raise _errors.SystemCallFailed(30, "forget_refs: the device was opened read-only")
        return dm_scrub_forget_refs(&self.dev)

    def holdings(self):
        """List what holds frames: [(host, page, frame, count)] of page tables, [(entry, holder, frame, count)] of Refs.

        Runs of consecutive pages and frames. A moment's view: on a fabric at work it may be out of date at once.
        """
        cdef uint32_t host, entry, pte, k
        cdef uint64_t page, first_page = 0
        cdef uint32_t first = 0, count = 0
        cdef uint32_t *ptes
        cdef dm_runs runs
        cdef dm_ref_entry ref
        cdef list mapped = [], held = []
        self.check_open("holdings")
        for host in range(1, self.dev.geo.max_hosts + 1):
            if self.dev.hosts[host - 1].state == DM_HOST_FREE:
                continue
            ptes = self.dev.ptes + <uint64_t>(host - 1) * self.dev.geo.ptes_per_host
            count = 0
            for page in range(self.dev.geo.ptes_per_host):
                pte = ptes[page]
                if count and (not pte & DM_PTE_PRESENT or (pte & DM_PTE_PFN) != first + count):
                    mapped.append((host, first_page, first, count))
                    count = 0
                if pte & DM_PTE_PRESENT:
                    if count == 0:
                        first = pte & DM_PTE_PFN
                        first_page = page
                    count += 1
            if count:
                mapped.append((host, first_page, first, count))
        for entry in range(self.dev.geo.max_refs):
            if self.dev.refs[entry].state & 0xff == DM_REF_FREE:
                continue
            if not dm_device_ref(&self.dev, entry, &ref) or dm_ref_state(ref.state) < DM_REF_LIVE:
                continue
            dm_runs_init(&runs)
            if dm_runs_of_entry(&ref, <const char *>self.dev.data,
                                _shift(self.dev.geo.page_size),
                                <uint32_t>self.dev.geo.nr_frames, &runs) == DM_OK:
                for k in range(runs.nr):
                    if runs.list[k].pfn != DM_NO_FRAME:
                        held.append(
                            (entry, dm_ref_holder(ref.state), runs.list[k].pfn, runs.list[k].count)
                        )
            dm_runs_free(&runs)
        return mapped, held

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
                "coming_home": {
                    host: found.coming_to[host]
                    for host in range(1, self.dev.geo.max_hosts + 1)
                    if found.coming_to[host]
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


cdef dict _SUSPICIONS = {
    DM_SCRUB_LEAKED: "leaked",
    DM_SCRUB_MISSING: "missing",
    DM_SCRUB_ORPHAN: "orphan",
    DM_SCRUB_BAD_OWNER: "bad owner",
}


cdef class Scrub:
    """Accounting for every frame of a device in use, in slices; csrc/scrub.h says what is certain when."""

    cdef dm_scrub *s
    cdef Device device
    cdef bint busy

    def __cinit__(self, Device device not None):
        cdef dm_error err = no_error()
        cdef int status
        self.device = device
        device.check_open("scrub")
        status = dm_scrub_new(&device.dev, &self.s, &err)
        raise_status(status, &err, "scrub")

    def __dealloc__(self):
        dm_scrub_free(self.s)

    cdef int begin(self, str operation) except -1:
        if self.busy:
            raise _errors.BufferInUse(f"{operation}: another thread is using this Scrub")
        self.device.enter(operation)
        self.busy = True
        return 0

    cdef int end(self, int status, dm_error *err, str operation) except -1:
        self.busy = False
        self.device.leave(status, err, operation)
        return 0

    def step(self, double seconds):
        """Go on with the look for about so long; True when it is complete."""
        cdef dm_error err = no_error()
        cdef dm_bool done = False
        cdef int status
        cdef uint64_t budget = <uint64_t>(seconds * 1e9)
        self.begin("scrub")
        with nogil:
            status = dm_scrub_step(self.s, budget, &done, &err)
        self.end(status, &err, "scrub")
        return bool(done)

    def settle(self, uint32_t min_looks, bint repair=False):
        """Make certain of what min_looks looks in a row found, and take back what nothing holds.

        Between two looks only. False: hosts were at work, and nothing is known.
        """
        cdef dm_error err = no_error()
        cdef dm_bool quiet = False
        cdef int status
        self.begin("settle")
        with nogil:
            status = dm_scrub_settle(self.s, &self.device.dev, min_looks, repair, &quiet, &err)
        self.end(status, &err, "settle")
        return bool(quiet)

    @property
    def looks(self):
        """Number of looks completed."""
        return self.s.nr_looks

    @property
    def accounting(self):
        """What the last complete look counted, by name; "bad_entry" says which entry makes no sense, or is empty."""
        cdef dm_scrub_look look = self.s.last
        return {
            "pool": look.pool,
            "free": look.free,
            "in_use": look.in_use,
            "mapped_pages": look.mapped_pages,
            "hole_pages": look.hole_pages,
            "live_refs": look.refs,
            "ref_pages": look.ref_pages,
            "in_flight": look.in_flight,
            "bad_entries": look.bad_entries,
            "bad_entry": self.s.bad_entry.decode("utf-8", "replace"),
        }

    @property
    def suspects(self):
        """Frames and Refs that the last look found wrong: a dict for each, Refs first.

        kind ("leaked", "missing", "orphan", "bad owner"), pfn, refcount, expected, owner, looks (in a row), certain,
        repaired, host and op: whose intent record names the frame, 0 for nobody's. expected counts once settled.
        Of a Ref whose holder is not attached: kind "orphan Ref", ref (its entry), owner (its holder), looks, certain,
        repaired.
        """
        cdef dm_suspect *f
        cdef dm_orphan *o
        cdef uint32_t i
        found = []
        for i in range(self.s.nr_orphans):
            o = <dm_orphan *>self.s.orphans + i
            found.append({
                "kind": "orphan Ref",
                "ref": o.entry,
                "owner": dm_ref_holder(o.word),
                "looks": o.looks,
                "certain": o.settled > 0,
                "repaired": o.settled > 1,
            })
        for i in range(self.s.nr_suspects):
            f = <dm_suspect *>self.s.suspects + i
            found.append({
                "pfn": f.pfn,
                "kind": _SUSPICIONS.get(f.kind, "none"),
                "refcount": dm_frame_refcount(f.word),
                "expected": f.expected,
                "owner": dm_frame_owner(f.word),
                "looks": f.looks,
                "certain": f.settled > 0,
                "repaired": f.settled > 1,
                "host": f.host,
                "op": f.op,
            })
        return found

    @property
    def nr_overlooked(self):
        """Number of suspects that were too many to keep, in the last look."""
        return self.s.nr_overflowed
