# _link.pxi - the client's side: Link, Call, Ref, Operations. Included by _native.pyx; what C does: csrc/net_link.c.
#
# An operation is prepared once, as a Call, whoever makes it. Three classes below Operations differ only in what they do with
# it: a Client waits, a Pipeline goes on, Aio gives a future. A Call holds the caller's buffer until it is done, so that the buffer is
# neither freed nor resized while C works on it.
#
# A Call that is collected while it is under way is abandoned first: C keeps no pointer to it then.

cimport cython
from cpython.buffer cimport (
    PyBuffer_FillInfo,
    PyBUF_ANY_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytearray cimport PyByteArray_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.number cimport PyNumber_Index

from libc.errno cimport errno

import struct as _struct
import time as _time
import weakref as _weakref


cdef extern from "<unistd.h>" nogil:
    pid_t getpid()

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum:
        EFD_NONBLOCK
        EFD_CLOEXEC

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    enum:
        CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *t)


cdef inline uint64_t _now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000u + <uint64_t>t.tv_nsec


cdef uint64_t _deadline_of(timeout, double default) except? 0:
    """Turn seconds from now into a time; None means the default."""
    cdef double seconds = default if timeout is None else timeout
    if not seconds > 0:
        seconds = 0
    if seconds > 1e9:
        seconds = 1e9
    return _now_ns() + <uint64_t>(seconds * 1e9) + 1


cdef uint64_t _u64(value, str operation, object kind) except? 0xffffffffffffffff:
    """Read an address or a size; what does not fit is no address and no size."""
    try:
        return PyNumber_Index(value)
    except OverflowError:
        raise kind(f"{operation}: {value} is none") from None


# ---------------------------------------------------------------- Link

cdef class Link:
    """A data connection to one shard, and the calls that wait for it. Survives its sockets."""

    cdef net_link *l
    cdef readonly uint32_t server, shard
    cdef readonly uint64_t slice_bytes  # of the shard: no Ref is longer
    cdef readonly object reopen  # called with (link, deadline_ns) when the connection is broken
    cdef object __weakref__

    def __init__(self, uint32_t server, uint32_t shard, uint64_t slice_bytes, uint32_t max_calls, reopen):
        if self.l != NULL:
            raise TypeError("a Link is initialised once")
        self.server = server
        self.shard = shard
        self.slice_bytes = slice_bytes
        self.reopen = reopen
        self.l = net_link_new(max_calls)
        if self.l == NULL:
            raise MemoryError()

    def __dealloc__(self):
        if self.l != NULL:
            net_link_free(self.l)

    cdef inline int enter(self, str operation) except -1:
        if self.l.owner != getpid():
            raise _cxl.ForkedError(
                f"{operation}: a forked child cannot use its parent's client; attach again there"
            )
        return 0

    def resume(self, int fd):
        """Take over a socket that was greeted, and send again what has no answer."""
        cdef int status
        self.enter("resume")
        with nogil:
            status = net_link_resume(self.l, fd)
        if status:
            raise error_of(status, "resume")

    def fail(self, int outcome):
        """End for good; every call has this outcome."""
        if self.l.owner == getpid():
            net_link_fail(self.l, outcome)

    @property
    def healthy(self):
        """Whether there is a connection, as far as is known."""
        return net_link_healthy(self.l)

    @property
    def failed(self):
        """Whether it has failed for good."""
        cdef int state = net_link_state(self.l)
        return state < 0 and state != NET_BROKEN

    @property
    def generation(self):
        """How many sockets it has had."""
        return self.l.generation

    def duplicate(self):
        """Return (a duplicate of the socket, generation); the descriptor is -1 if there is none."""
        cdef uint32_t generation = 0
        cdef int fd = net_link_dup(self.l, &generation)
        return fd, generation

    def open_bell(self):
        """Return an eventfd that tells of answers to calls made with a bell."""
        if self.l.bell < 0:
            self.l.bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
            if self.l.bell < 0:
                raise OSError("eventfd")
        return self.l.bell

    def pump(self):
        """Send and receive without waiting: 1 there is more to send, 0, or a negative outcome."""
        self.enter("pump")
        cdef int status
        with nogil:
            status = net_link_pump(self.l)
        return status

    def stats(self):
        """Count what went over the connection."""
        return {
            "calls": self.l.nr_calls_done,
            "outstanding": self.l.nr_calls,
            "system_calls": self.l.nr_system_calls,
            "bytes_in": self.l.bytes_in,
            "bytes_out": self.l.bytes_out,
        }

    cdef bint post(self, net_op op, uint64_t a, uint64_t b, int flags=0) noexcept:
        cdef net_request q
        if self.l == NULL or self.l.owner != getpid():
            return False
        memset(&q, 0, sizeof(q))
        q.op = op
        q.flags = <uint8_t>flags
        q.a = a
        q.b = b
        return net_link_post(self.l, &q)


OUTCOME_BROKEN = NET_BROKEN
OUTCOME_LOST = NET_LOST
OUTCOME_CLOSED = NET_CLOSED


# ---------------------------------------------------------------- Call

@cython.no_gc_clear
@cython.freelist(64)
cdef class Call:
    """An operation under way, or done."""

    cdef net_call c
    cdef Link link
    cdef Client client
    cdef str operation
    cdef Py_buffer view
    cdef bint viewing, started, taken
    cdef uint64_t deadline
    cdef object value, error
    cdef Ref ref  # that is used up if all goes well; with ACCEPT_REF, that is held
    cdef object __weakref__

    def __init__(self):
        raise TypeError("a call is made by an operation of a client, a pipeline or aio")

    def __dealloc__(self):
        if self.started and not self.taken and self.link.l.owner == getpid():
            self.discard()
        if self.viewing:
            PyBuffer_Release(&self.view)

    cdef int send_from(self, data) except -1:
        """Have the call carry a buffer's bytes, in the order in which they lie in memory. 1: they are too many."""
        PyObject_GetBuffer(data, &self.view, PyBUF_ANY_CONTIGUOUS)
        self.viewing = True
        if self.view.len == 0:
            raise _cxl.BadSize(f"{self.operation}: there is nothing to write")
        self.c.payload = self.view.buf
        self.c.request.payload = <uint32_t>self.view.len
        return <uint64_t>self.view.len > self.client.max_transfer

    cdef int receive_into(self, buffer, uint64_t nbytes, bint whole) except -1:
        """Have the answer's bytes put into a buffer; whole: as many as it holds. 1: they are too many."""
        PyObject_GetBuffer(buffer, &self.view, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
        self.viewing = True
        if whole:
            nbytes = self.view.len
        if nbytes > <uint64_t>self.view.len:
            raise _cxl.BadSize(f"{self.operation}: {nbytes} bytes do not fit into {self.view.len}")
        self.c.into = self.view.buf
        self.c.into_bytes = nbytes
        return nbytes > self.client.max_transfer

    cdef int start(self, bint cork) except -1:
        cdef int status
        self.link.enter(self.operation)
        with nogil:
            status = net_link_submit(self.link.l, &self.c, cork)
        if status:
            if status == NET_GARBLED:
                self.client.distrust(self.link)
            raise error_of(status, self.operation)
        self.started = True
        return 0

    cdef int wait(self, uint64_t deadline) except -1:
        cdef int status
        while True:
            with nogil:
                status = net_link_wait(self.link.l, &self.c, deadline)
            if status >= 0:
                return 0
            if status == NET_INTERRUPTED:
                try:
                    PyErr_CheckSignals()
                except BaseException:
                    self.abandon()
                    raise
            elif status == NET_BROKEN:
                try:
                    self.link.reopen(self.link, deadline)
                except BaseException:
                    if net_call_done(&self.c):
                        return 0
                    self.abandon()
                    raise
            elif status == NET_DEADLINE:
                self.abandon()
                return 0
            else:
                return 0

    cdef void abandon(self) noexcept:
        if self.started and not net_call_done(&self.c):
            with nogil:
                net_link_abandon(self.link.l, &self.c)

    cdef void discard(self) noexcept:
        """Let go of a call whose result nobody will take: if it was answered already, what the answer gave is given back."""
        cdef net_op op = <net_op>self.c.request.op
        self.abandon()
        if self.taken or not self.started or self.c.outcome:
            return
        self.taken = True
        if op == NET_ACCEPT_REF and not self.c.request.flags & NET_ANEW:
            self.ref.link = self.link
            self.ref.ours = True
            return
        if self.ref is not None:
            self.ref.spent = True
        if op == NET_RALLOC or op == NET_MAP_REF:
            self.link.post(NET_RFREE, self.c.a, 0)
        elif op == NET_PUT:
            self.link.post(NET_DROP_REF, self.c.a, self.c.request.payload)
            if self.c.request.flags & NET_KEEP:
                self.link.post(NET_RFREE, self.c.b, 0)
        elif op == NET_CREATE_REF or op == NET_CLONE_REF or op == NET_ACCEPT_REF:
            self.link.post(NET_DROP_REF, self.c.a, self.c.request.b)

    cdef int take(self) except -1:
        """Make a value or an error of what came."""
        if self.taken:
            return 0
        self.taken = True
        if self.viewing:
            PyBuffer_Release(&self.view)
            self.viewing = False
        if self.c.outcome:
            if self.c.outcome == NET_GARBLED:
                self.client.distrust(self.link)
            self.error = error_of(self.c.outcome, self.operation)
            self.value = None
        else:
            self.finish()
        return 0

    cdef int finish(self) except -1:
        cdef net_op op = <net_op>self.c.request.op
        if self.ref is not None and op == NET_ACCEPT_REF and not self.c.request.flags & NET_ANEW:
            self.ref.link = self.link
            self.ref.ours = True
        elif self.ref is not None:
            self.ref.spent = True
        if op == NET_ACCEPT_REF and self.c.request.flags & NET_ANEW:
            self.value = _ref_held(self.client, self.link, self.c.a, self.c.request.b)
        if op == NET_RALLOC or op == NET_MAP_REF:
            self.value = self.c.a
        elif op == NET_CREATE_REF or op == NET_CLONE_REF:
            self.value = _ref_held(self.client, self.link, self.c.a, self.c.request.b)
        elif op == NET_PUT:
            ref = _ref_held(self.client, self.link, self.c.a, self.c.request.payload)
            self.value = (ref, self.c.b) if self.c.request.flags & NET_KEEP else ref
        elif op == NET_DROP_REF or op == NET_HELD:
            self.value = self.c.a != 0
        elif op == NET_STATS:
            numbers = _struct.unpack(f"<{NET_NR_COUNTERS}Q", self.value)
            self.value = {name: number for (name, _), number in zip(COUNTERS, numbers)}
        elif op == NET_AUDIT:
            layout, names = WIRE["structs"]["audit"]
            self.value = dict(zip(names, _struct.unpack(layout, self.value)))
        return 0

    def done(self):
        """Tell whether there is an answer, without waiting."""
        return self.taken or (self.started and net_call_done(&self.c))

    def result(self, timeout=None):
        """Wait for the answer, and return or raise what it is."""
        if not self.taken:
            self.link.enter(self.operation)
            self.wait(self.deadline if timeout is None else _deadline_of(timeout, 0))
            self.take()
        if self.error is not None:
            raise self.error
        return self.value

    # For aio.

    def begin(self):
        """Send it, with a bell. Return 0, or what pump would: there is more to send, or something is wrong."""
        self.c.bell = True
        self.start(False)
        return net_link_state(self.link.l)

    def give_up(self):
        """Let it go: its answer is thrown away, and what that gave is given back."""
        self.discard()

    @property
    def lane(self):
        """The link it goes through."""
        return self.link

    @property
    def deadline_ns(self):
        """When its time is over, by the monotonic clock."""
        return self.deadline


# ---------------------------------------------------------------- Ref

@cython.no_gc_clear
@cython.freelist(64)
cdef class Ref:
    """A transferable, single-holder claim on pages of a memory server: the bytes a range had when it was made.

    Sent as 24 bytes (:meth:`to_bytes`, pickle), used once by :meth:`Client.map_ref` or :meth:`Client.get`. A Ref that is
    garbage-collected is dropped, unless its bytes were handed out: then it belongs to whoever accepts it, and to this process
    until somebody does.
    """

    cdef readonly Client client
    cdef Link link
    cdef net_ref_wire w
    cdef bint ours, exported, spent
    cdef object __weakref__

    def __init__(self):
        raise TypeError("a Ref is made by a client, or by Ref.from_bytes")

    def __dealloc__(self):
        if self.ours and not self.exported and not self.spent and self.link is not None:
            self.link.post(NET_DROP_REF, self.w.key, self.w.length)

    @property
    def nbytes(self):
        """Length of the bytes the Ref denotes."""
        return self.w.length

    @property
    def server(self):
        """Number of the server that has the pages."""
        return self.w.server

    @property
    def shard(self):
        """Number of the shard that has the pages."""
        return self.w.shard

    def __len__(self):
        return self.w.length

    def __repr__(self):
        state = "spent" if self.spent else "held" if self.ours else "not accepted"
        return f"<Ref {self.w.length} bytes, server {self.w.server} shard {self.w.shard}, {state}>"

    def to_bytes(self):
        """Return the 24 bytes that stand for this Ref on the wire.

        The Ref stays this process's until a receiver accepts or maps it; it is no longer dropped by garbage
        collection. Call :meth:`drop` when the message could not be delivered.

        Raises:
            RefConsumed: it was mapped or dropped through this object.
        """
        if self.spent:
            raise _cxl.RefConsumed("to_bytes: this Ref was mapped or dropped before")
        self.exported = True
        return PyBytes_FromStringAndSize(<char *>&self.w, sizeof(self.w))

    @staticmethod
    def from_bytes(data, client=None):
        """Read a Ref from the bytes another process sent. It is not accepted yet: see :meth:`accept`.

        Args:
            data: 24 bytes from :meth:`to_bytes`.
            client: whom to use it with; by default the newest of this process.

        Raises:
            BadRef: these bytes are no Ref of a memory server.
        """
        cdef net_ref_wire w
        cdef bytes raw = bytes(data)
        if PyBytes_GET_SIZE(raw) != sizeof(w):
            raise _cxl.BadRef(f"Ref.from_bytes: {len(raw)} bytes, not {sizeof(w)}")
        memcpy(&w, PyBytes_AS_STRING(raw), sizeof(w))
        if w.flags != NET_REF_TAG or w.length == 0:
            raise _cxl.BadRef("Ref.from_bytes: these bytes are no Ref of a memory server")
        cdef Ref ref = Ref.__new__(Ref)
        ref.client = _newest_client() if client is None else client
        ref.w = w
        return ref

    def __reduce__(self):
        return (Ref.from_bytes, (self.to_bytes(),))

    def accept(self):
        """Become the holder: from now on the Ref survives its creator. Idempotent; return the Ref.

        Raises:
            RefConsumed: another holder was faster, or the holder is gone.
        """
        self.client.accept_ref(self)
        return self

    def clone(self):
        """Make another Ref of the same pages, held by this process."""
        return self.client.clone_ref(self)

    def drop(self):
        """Give it up. Idempotent: return False when it was not this process's any more."""
        return self.client.drop_ref(self)


cdef Ref _ref_held(Client client, Link link, uint64_t key, uint64_t length):
    cdef Ref ref = Ref.__new__(Ref)
    ref.client = client
    ref.link = link
    ref.w.server = <uint16_t>link.server
    ref.w.shard = <uint16_t>link.shard
    ref.w.flags = NET_REF_TAG
    ref.w.key = key
    ref.w.length = length
    ref.ours = True
    return ref


cdef list _clients = []  # weak references, newest last


cdef Client _newest_client():
    cdef Client client
    for link in reversed(_clients):
        client = link()
        if client is not None and not client.is_closed and client.owner == getpid():
            return client
    raise _cxl.HostClosed("Ref.from_bytes: this process has no client; attach first, or say which")


# ---------------------------------------------------------------- the operations

cdef class Operations:
    """The calls of a client, whoever waits for them and how."""

    cdef readonly Client client

    cdef object dispatch(self, Call call):
        raise NotImplementedError

    cdef object in_pieces(self, Call call, buffer):
        """Do what one call is too small for; only who waits can."""
        raise _cxl.BadSize(f"{call.operation}: more than {self.client.max_transfer} bytes at once")

    # Which link

    cdef Link link_to(self, uint64_t server, uint64_t shard, Call call, object kind):
        return self.client.link_of(server, shard, call, kind)

    cdef Link link_anywhere(self, Call call):
        return self.client.next_link(call)

    cdef Call at_address(self, net_op op, str operation, address, timeout):
        cdef uint64_t a = _u64(address, operation, _cxl.BadAddress)
        cdef Client client = self.client
        cdef Call call = client.new_call(op, operation, timeout)
        call.link = self.link_to(
            net_address_server(a), net_address_shard(a), call, _cxl.BadAddress
        )
        call.c.request.a = a
        return call

    cdef Call at_ref(self, net_op op, str operation, ref, timeout):
        cdef Client client = self.client
        cdef Ref r = ref if isinstance(ref, Ref) else Ref.from_bytes(ref, client)
        if r.spent:
            raise _cxl.RefConsumed(f"{operation}: this Ref was mapped or dropped before")
        cdef Call call = client.new_call(op, operation, timeout)
        call.link = self.link_to(r.w.server, r.w.shard, call, _cxl.BadRef)
        if r.w.length > call.link.slice_bytes:
            raise _cxl.BadRef(f"{operation}: a Ref of {r.w.length} bytes, more than its shard has")
        call.c.request.a = r.w.key
        call.c.request.b = r.w.length
        call.ref = r
        return call

    cdef Call anywhere(self, net_op op, str operation, server, shard, timeout):
        cdef Client client = self.client
        cdef Call call = client.new_call(op, operation, timeout)
        if server is None:
            call.link = self.link_anywhere(call)
        else:
            call.link = self.link_to(server, 0 if shard is None else shard, call, _cxl.BadAddress)
        return call

    # Ranges

    def ralloc(self, size, *, server=None, shard=None, timeout=None):
        """Reserve a range of remote addresses, and return the first. No page is taken before it is written to.

        Args:
            size: bytes; the range has as many whole pages as hold them, and reads as zeros.
            server: number of a server to have it on; default: the servers take turns.
            shard: number of one of that server's shards.
            timeout: seconds to wait for the answer; None takes the client's.

        Raises:
            BadSize: zero, or more than a shard has.
            OverQuota: this process has as much there as it may.
            ServerLost, DeadlineExceeded: no answer.

        Paper: Table II.
        """
        cdef Call call = self.anywhere(NET_RALLOC, "ralloc", server, shard, timeout)
        call.c.request.a = _u64(size, "ralloc", _cxl.BadSize)
        return self.dispatch(call)

    def rfree(self, address, *, timeout=None):
        """Free a whole range, by its first address.

        Raises:
            BadAddress: not the start of a range of this process; freed twice.
        """
        return self.dispatch(self.at_address(NET_RFREE, "rfree", address, timeout))

    def rread(self, address, into, size=None, *, timeout=None):
        """Copy bytes of a range into a buffer.

        Args:
            address: where they begin.
            into: a writable buffer, contiguous; filled in as it lies in memory.
            size: how many; None: as many as the buffer holds.
        """
        cdef Call call = self.at_address(NET_RREAD, "rread", address, timeout)
        cdef bint whole = size is None
        if call.receive_into(into, 0 if whole else _u64(size, "rread", _cxl.BadSize), whole):
            return self.in_pieces(call, into)
        call.c.request.b = call.c.into_bytes
        return self.dispatch(call)

    def read(self, address, size, *, timeout=None):
        """Return bytes of a range, as a bytearray."""
        cdef Call call = self.at_address(NET_RREAD, "read", address, timeout)
        cdef uint64_t n = _u64(size, "read", _cxl.BadSize)
        if n > call.link.slice_bytes:
            raise _cxl.BadSize(f"read: {n} bytes, more than the shard has")
        call.value = PyByteArray_FromStringAndSize(NULL, n)
        if call.receive_into(call.value, n, False):
            return self.in_pieces(call, call.value)
        call.c.request.b = n
        return self.dispatch(call)

    def rwrite(self, address, data, *, timeout=None):
        """Copy a buffer's bytes into a range: all of them, or if there is no room for them, none.

        Pages that others hold are copied first, as far as they are not overwritten.

        Args:
            address: where they are to begin.
            data: a buffer, contiguous. It must not change until the call is done.

        Raises:
            BadAddress, BadSize: not in a range of this process, or beyond its end.
            OutOfFrames: the shard has too few free pages; nothing was written.
            ReadOnly: the range was mapped read-only.
        """
        cdef Call call = self.at_address(NET_RWRITE, "rwrite", address, timeout)
        if call.send_from(data):
            return self.in_pieces(call, data)
        return self.dispatch(call)

    # Refs

    def create_ref(self, address, size, *, move=False, copy=False, timeout=None):
        """Make a Ref of what some pages hold now; later writes to them do not change it.

        Args:
            address: page-aligned, in a range of this process.
            size: bytes, up to the end of the range.
            move: give the range up; it has to be a whole one. Nothing is counted or copied then, or later.
            copy: copy the pages now, rather than each when it is first written to.

        Raises:
            BadAddress, BadSize: not in a range, not aligned, beyond its end.
            OutOfFrames: with copy, the shard has too few free pages.
            TooManyRefs: a page would have too many holders.
        """
        cdef Call call = self.at_address(NET_CREATE_REF, "create_ref", address, timeout)
        call.c.request.b = _u64(size, "create_ref", _cxl.BadSize)
        call.c.request.flags = (NET_MOVE if move else 0) | (NET_COPY if copy else 0)
        return self.dispatch(call)

    def map_ref(self, ref, *, read_only=False, timeout=None):
        """Map a Ref's pages into a fresh range, and return its address. The Ref is used up.

        Args:
            ref: a Ref, or the bytes of one.
            read_only: refuse writes to the range.

        Raises:
            RefConsumed: it was used before, or its holder is gone.
            BadRef: it is none.
        """
        cdef Call call = self.at_ref(NET_MAP_REF, "map_ref", ref, timeout)
        call.c.request.flags = NET_READ_ONLY if read_only else 0
        return self.dispatch(call)

    def accept_ref(self, ref, *, anew=False, timeout=None):
        """Become a Ref's holder.

        Args:
            ref: a Ref, or the bytes of one.
            anew: return it as another Ref, and have the bytes that it came in be of no use to anybody any more: its
                sender, which drops what nobody accepted, may be this process as well.
        """
        cdef Call call = self.at_ref(NET_ACCEPT_REF, "accept_ref", ref, timeout)
        call.c.request.flags = NET_ANEW if anew else 0
        if not isinstance(ref, Ref):
            call.ref = None  # whoever has the bytes has to see to it
        return self.dispatch(call)

    def clone_ref(self, ref, *, timeout=None):
        """Make another Ref of the same pages, held by this process."""
        cdef Call call = self.at_ref(NET_CLONE_REF, "clone_ref", ref, timeout)
        call.ref = None
        return self.dispatch(call)

    def drop_ref(self, ref, *, anybodys=False, timeout=None):
        """Give a Ref up; tell whether it was this process's.

        Args:
            ref: a Ref, or the bytes of one.
            anybodys: drop it whoever holds it: of a message that nobody will read. Who accepted it anew keeps it.
        """
        cdef Call call
        if isinstance(ref, Ref) and (<Ref>ref).spent:
            return self.known(False)
        call = self.at_ref(NET_DROP_REF, "drop_ref", ref, timeout)
        call.c.request.flags = NET_ANYBODYS if anybodys else 0
        return self.dispatch(call)

    def forget_refs(self, wires):
        """Drop Refs, given by their bytes, whoever holds them, without waiting; return those that could not be sent at once."""
        cdef net_ref_wire w
        cdef Client client = self.client
        cdef Link link
        left = []
        for raw in wires:
            if len(raw) != sizeof(w):
                continue
            memcpy(&w, PyBytes_AS_STRING(raw), sizeof(w))
            if w.flags != NET_REF_TAG:
                continue
            place = w.server * NET_MAX_SHARDS + w.shard
            if w.shard >= NET_MAX_SHARDS or place >= len(client.links) or client.links[place] is None:
                left.append(raw)
                continue
            link = client.links[place]
            if not link.post(NET_DROP_REF, w.key, w.length, NET_ANYBODYS):
                link.pump()  # many answers that nobody waits for: read them
                if not link.post(NET_DROP_REF, w.key, w.length, NET_ANYBODYS):
                    left.append(raw)
        return left

    def ref_is_held(self, ref, *, timeout=None):
        """Tell whether this process is the holder of a Ref that nobody has used."""
        if isinstance(ref, Ref) and (<Ref>ref).spent:
            return self.known(False)
        cdef Call call = self.at_ref(NET_HELD, "ref_is_held", ref, timeout)
        call.ref = None
        return self.dispatch(call)

    # Several steps at once

    def put(self, data, *, keep=False, server=None, shard=None, timeout=None):
        """Allocate, write and make a Ref, in one round trip.

        Args:
            data: a buffer, contiguous.
            keep: stay mapped as well.

        Returns:
            Ref: of the bytes; with keep (Ref, address).
        """
        cdef Call call = self.anywhere(NET_PUT, "put", server, shard, timeout)
        call.c.request.flags = NET_KEEP if keep else 0
        if call.send_from(data):
            return self.in_pieces(call, data)
        return self.dispatch(call)

    def get(self, ref, into=None, *, offset=0, size=None, keep=False, timeout=None):
        """Map, read and free, in one round trip: return a Ref's bytes. The Ref is used up.

        Args:
            ref: a Ref, or the bytes of one.
            into: a writable buffer for the bytes; None: return a new bytearray.
            offset: leave out so many bytes at the beginning.
            size: how many bytes; None: all that follow, or with `into` as many as it holds.
            keep: read only, and leave the Ref as it is.
        """
        cdef Call call = self.at_ref(NET_GET, "get", ref, timeout)
        cdef uint64_t start = _u64(offset, "get", _cxl.BadSize), n
        if start > call.c.request.b:
            raise _cxl.BadSize(f"get: offset {start} is beyond {call.c.request.b} bytes")
        if size is not None:
            n = _u64(size, "get", _cxl.BadSize)
        else:
            n = call.c.request.b - start
        if n > call.c.request.b - start:
            raise _cxl.BadSize(f"get: {n} bytes from {start} on, of {call.c.request.b}")
        cdef bint whole = size is None and into is not None
        if into is None:
            call.value = into = PyByteArray_FromStringAndSize(NULL, n)
        cdef bint many = call.receive_into(into, n, whole)
        call.c.request.c = start
        call.c.request.d = call.c.into_bytes
        if keep:
            call.c.request.flags = NET_KEEP
            call.ref = None
        return self.in_pieces(call, into) if many else self.dispatch(call)

    # About a shard

    def ping(self, server=0, shard=0, *, timeout=None):
        """Ask for an answer."""
        return self.dispatch(self.anywhere(NET_PING, "ping", server, shard, timeout))

    def shard_stats(self, server=0, shard=0, *, timeout=None):
        """Return the counters of a shard, by the names in COUNTERS."""
        cdef Call call = self.anywhere(NET_STATS, "shard_stats", server, shard, timeout)
        call.value = PyByteArray_FromStringAndSize(NULL, NET_NR_COUNTERS * sizeof(uint64_t))
        call.receive_into(call.value, 0, True)
        return self.dispatch(call)

    def shard_audit(self, server=0, shard=0, *, timeout=None):
        """Have a shard add up all that refers to its pages, and compare with their counts."""
        cdef Call call = self.anywhere(NET_AUDIT, "shard_audit", server, shard, timeout)
        call.value = PyByteArray_FromStringAndSize(NULL, sizeof(net_audit))
        call.receive_into(call.value, 0, True)
        return self.dispatch(call)

    def known(self, value):
        """Return what needs no call, in the way in which results are returned."""
        return value


cdef Ref _wire_of(Call call):
    """A Ref like that of a call; not held, so that nothing happens when it goes."""
    cdef Ref ref = Ref.__new__(Ref)
    ref.client = call.client
    ref.w.server = <uint16_t>call.link.server
    ref.w.shard = <uint16_t>call.link.shard
    ref.w.flags = NET_REF_TAG
    ref.w.key = call.c.request.a
    ref.w.length = call.c.request.b
    return ref


cdef class Client(Operations):
    """What every client has: links, and turns. How they are opened is said in client.py."""

    cdef list links        # by server * NET_MAX_SHARDS + shard; None: not open yet
    cdef list rota         # (server, shard) that take turns
    cdef uint64_t turn
    cdef readonly double patience  # seconds that a call may take
    cdef readonly bint is_closed
    cdef readonly int owner
    cdef public uint64_t max_transfer  # bytes of one request
    cdef object __weakref__

    def __init__(self, double patience):
        self.client = self
        self.max_transfer = NET_MAX_TRANSFER
        self.patience = patience
        self.links = []
        self.rota = []
        self.owner = getpid()
        _clients.append(_weakref.ref(self, _clients.remove))

    cdef object dispatch(self, Call call):
        call.start(False)
        call.wait(call.deadline)
        call.take()
        if call.error is not None:
            raise call.error
        return call.value

    cdef object in_pieces(self, Call call, buffer):
        """Transfer a part at a time. What fails in between leaves the parts before it."""
        cdef uint64_t a = call.c.request.a, start = call.c.request.c, at = 0, total
        cdef uint64_t step = self.max_transfer
        cdef net_op op = <net_op>call.c.request.op
        cdef bint keep = call.c.request.flags & NET_KEEP
        left = lambda: max((<int64_t>(call.deadline - _now_ns())) / 1e9, 0)
        if op == NET_PUT:
            with memoryview(buffer) as whole:
                a = self.ralloc(whole.nbytes, server=call.link.server, shard=call.link.shard, timeout=left())
                try:
                    self.rwrite(a, buffer, timeout=left())
                    ref = self.create_ref(a, whole.nbytes, move=not keep, timeout=left())
                except BaseException:
                    call.link.post(NET_RFREE, a, 0)
                    raise
            return (ref, a) if keep else ref
        if op == NET_GET and not keep:
            self.accept_ref(call.ref, timeout=left())
        total = call.c.into_bytes if op != NET_RWRITE else call.view.len
        # The buffer's bytes as they lie in memory, whatever its shape.
        cdef char[::1] memory = <char[:total]><char *>call.view.buf
        with memoryview(memory) as whole:
            while at < total:
                with whole[at : min(at + step, total)] as part:
                    if op == NET_RREAD:
                        self.rread(a + at, part, timeout=left())
                    elif op == NET_RWRITE:
                        self.rwrite(a + at, part, timeout=left())
                    else:
                        self.get(_wire_of(call), part, offset=start + at, keep=True, timeout=left())
                    at += part.nbytes
        if op == NET_GET and not keep:
            self.drop_ref(call.ref, timeout=left())
        return call.value

    cdef Call new_call(self, net_op op, str operation, timeout):
        cdef Call call = Call.__new__(Call)
        self.enter(operation)
        memset(&call.c, 0, sizeof(call.c))
        call.c.request.op = op
        call.client = self
        call.operation = operation
        call.deadline = _deadline_of(timeout, self.patience)
        return call

    cdef int enter(self, str operation) except -1:
        if self.is_closed:
            raise _cxl.HostClosed(f"{operation}: this client is closed")
        if self.owner != getpid():
            raise _cxl.ForkedError(
                f"{operation}: a forked child cannot use its parent's client; attach again there"
            )
        return 0

    cdef Link link_of(self, uint64_t server, uint64_t shard, Call call, object kind):
        """The link to a shard, opened if need be within the time that the call has."""
        link = self.known_link(server, shard)
        if link is None:
            link = self.open_link(server, shard, call.deadline)
            if link is None:
                raise kind(f"{call.operation}: there is no shard {shard} on a server {server}")
        return <Link>link

    cdef object known_link(self, uint64_t server, uint64_t shard):
        """The link to a shard, None if there is none yet."""
        cdef uint64_t place = server * NET_MAX_SHARDS + shard
        return self.links[place] if shard < NET_MAX_SHARDS and place < <uint64_t>len(self.links) else None

    cdef Link next_link(self, Call call):
        """The next of those that take turns, and that is there."""
        cdef object last = None
        for _ in range(len(self.rota)):
            server, shard = self.rota[self.turn % <uint64_t>len(self.rota)]
            self.turn += 1
            try:
                return self.link_of(server, shard, call, _cxl.BadAddress)
            except _errors.ServerLost as error:
                last = error
        raise last if last is not None else _errors.ServerLost(f"{call.operation}: there is no server")

    def open_link(self, server, shard, deadline_ns):
        """Connect to a shard; None: there is no such shard."""
        raise NotImplementedError

    def distrust(self, link):
        """A link was sent what answers no request: leave its server."""
        raise NotImplementedError

    def set_link(self, server, shard, link):
        """Enter a link, or None for one that is gone."""
        place = server * NET_MAX_SHARDS + shard
        self.links += [None] * (place + 1 - len(self.links))
        self.links[place] = link

    def set_rota(self, rota, turn):
        """Say who takes turns in allocations, and who is first."""
        self.rota = list(rota)
        self.turn = turn

    def set_closed(self):
        """Refuse every call from now on; return the links."""
        self.is_closed = True
        return [link for link in self.links if link is not None]

    def open_links(self):
        """List the links that were opened."""
        return [link for link in self.links if link is not None]


cdef class Pipeline(Operations):
    """Calls that are sent without waiting for answers; each gives a Call, whose result() waits.

    Requests to one shard are carried out in the order in which they were made. They are gathered before they are sent; waiting
    for any of them, or :meth:`flush`, sends what is left.
    """

    cdef list calls
    cdef uint64_t corked_bytes
    cdef uint32_t corked

    def __init__(self, Client client):
        self.client = client
        self.calls = []

    cdef object dispatch(self, Call call):
        cdef bint cork
        self.corked += 1
        self.corked_bytes += call.c.request.payload
        cork = self.corked < 16 and self.corked_bytes < 32768
        if not cork:
            self.corked = 0
            self.corked_bytes = 0
        if call.link.l.nr_calls >= call.link.l.max_calls:
            self.make_room(call.link)
        call.start(cork)
        self.calls.append(call)
        return call

    cdef int make_room(self, Link link) except -1:
        """As many are outstanding as may be: wait for the oldest half."""
        cdef Call call
        cdef uint32_t goal = link.l.max_calls // 2
        for item in self.calls:
            call = item
            if link.l.nr_calls <= goal:
                break
            if call.link is link and not call.taken:
                call.wait(call.deadline)
        return 0

    def flush(self):
        """Send what was gathered."""
        cdef Link link
        for item in {(<Call>call).link for call in self.calls if not call.done()}:
            link = item
            link.pump()
        self.corked = 0
        self.corked_bytes = 0

    def wait(self):
        """Wait for all calls made so far; raise the first error that was not looked at."""
        cdef Call call
        cdef object first = None
        cdef list calls = self.calls
        self.calls = []
        self.corked = 0
        self.corked_bytes = 0
        for item in calls:
            call = item
            if call.taken:
                continue
            try:
                call.result()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def __len__(self):
        return len(self.calls)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.wait()
        else:
            self.calls = []  # whatever is under way is abandoned

    def known(self, value):
        """Return a call that is done."""
        cdef Call call = Call.__new__(Call)
        call.taken = True
        call.value = value
        return call


class NotOpen(Exception):
    """A Deferred would have to wait for a connection first: to (server, shard), until a time in ns."""


cdef class Deferred(Operations):
    """Calls that a Python object sends: `launch(call)` says what becomes of each. Making them does not wait.

    Attributes:
        queued: places to which calls wait already, so that others have to wait behind them.
        failed: while a call is made again: what came of opening connections, by place; None while it is made for the first time.
    """

    cdef object launch
    cdef public object queued
    cdef public dict failed

    def __init__(self, Client client, launch):
        self.client = client
        self.launch = launch
        self.queued = {}

    cdef object dispatch(self, Call call):
        return self.launch(call)

    cdef Link link_to(self, uint64_t server, uint64_t shard, Call call, object kind):
        cdef object link = self.client.known_link(server, shard)
        cdef object place = (server, shard)
        if self.failed is None:
            if link is None or place in self.queued:
                raise NotOpen(place, call.deadline)
        elif link is None:
            if place not in self.failed:
                raise NotOpen(place, call.deadline)
            if self.failed[place] is None:
                raise kind(f"{call.operation}: there is no shard {shard} on a server {server}")
            raise self.failed[place]
        return <Link>link

    cdef Link link_anywhere(self, Call call):
        cdef Client client = self.client
        cdef object last = None
        for _ in range(len(client.rota)):
            place = client.rota[client.turn % <uint64_t>len(client.rota)]
            try:
                link = self.link_to(place[0], place[1], call, _cxl.BadAddress)
            except (_errors.ServerLost, _cxl.BadAddress) as error:
                last = error
                client.turn += 1
                continue
            client.turn += 1
            return link
        raise last if last is not None else _errors.ServerLost(f"{call.operation}: there is no server")
