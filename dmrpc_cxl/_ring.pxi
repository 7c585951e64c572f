# _ring.pxi - frames through shared memory: Ring, WaitSet. Included by _native.pyx; what C does: csrc/ring.c, waitset.c.
#
# - Small frames are copied with the GIL held: letting go of it costs more. From BLOCKING bytes on, and for whatever may
#   sleep, it is released, and a reference is held: close() in another thread then leaves memory and descriptors until the
#   last call has come back.
# - One thread sends and one receives at a time; the caller's locks see to it. A second one is refused.
# - A frame's buffer is allocated in full when all of it is in the ring or it is not above DM_FRAME_BELIEVED bytes; otherwise
#   it starts with so many and doubles when they are full. They are not touched before there is something to put there: a
#   claimed size that is not sent costs addresses, and memory only once half of it arrived.

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport (
    PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_GET_SIZE, PyByteArray_Resize
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from dmrpc_cxl._ringc cimport *
from dmrpc_cxl._relayc cimport DM_FRAME_BELIEVED

DEF_CAPACITY = 2 << 20
DEF_MAX_FRAME = 1 << 30

cdef enum:
    BLOCKING = 64 << 10
    INLINE_PARTS = 8


cdef uint64_t _deadline(object timeout) except? 0:
    """Return when a timeout of seconds is over; None: never; 0 or less: at once."""
    if timeout is None:
        return DM_RING_NO_DEADLINE
    cdef double seconds = timeout
    if seconds != seconds:
        raise ValueError("timeout is not a number")
    if seconds <= 0:
        return 1  # long over; 0 would be taken for an exception
    if seconds > 1e9:
        return DM_RING_NO_DEADLINE
    return dm_now_ns() + <uint64_t>(seconds * 1e9)


cdef uint32_t _max_frame(object value) except 0:
    if not DM_RING_MIN_FRAME <= value <= 0xffffffff:
        raise _errors.BadSize(f"max_frame must be from {DM_RING_MIN_FRAME} to 4294967295 bytes")
    return value


def begin_frame(Py_ssize_t size) -> bytearray:
    """Return a buffer for a frame of so many bytes, or for what of it is believed. Its bytes are whatever the memory held."""
    return PyByteArray_FromStringAndSize(NULL, min(size, <Py_ssize_t>DM_FRAME_BELIEVED))


def grow_frame(bytearray frame not None, Py_ssize_t size):
    """Have a buffer that is full grow towards so many bytes: it doubles."""
    PyByteArray_Resize(frame, min(size, 2 * PyByteArray_GET_SIZE(frame)))


cdef class _Parts:
    """The buffers of one send, held while it lasts."""

    cdef iovec inline_iov[INLINE_PARTS]
    cdef Py_buffer inline_views[INLINE_PARTS]
    cdef iovec *iov
    cdef Py_buffer *views
    cdef Py_ssize_t nr, nr_views
    cdef uint64_t total

    def __cinit__(self):
        self.iov = self.inline_iov
        self.views = self.inline_views

    def __dealloc__(self):
        self.release()
        if self.iov != self.inline_iov:
            free(self.iov)
        if self.views != self.inline_views:
            free(self.views)

    cdef void release(self) noexcept:
        while self.nr_views:
            self.nr_views -= 1
            PyBuffer_Release(&self.views[self.nr_views])

    cdef int hold(self, object parts) except -1:
        cdef Py_ssize_t nr = len(parts)
        if nr > INLINE_PARTS:
            self.iov = <iovec *>malloc(nr * sizeof(iovec))
            self.views = <Py_buffer *>malloc(nr * sizeof(Py_buffer))
            if self.iov == NULL or self.views == NULL:
                raise MemoryError()
        for part in parts:
            if self.nr_views == nr:
                raise ValueError("the parts changed while they were looked at")
            PyObject_GetBuffer(part, &self.views[self.nr_views], PyBUF_SIMPLE)
            self.nr_views += 1
            if self.views[self.nr_views - 1].len:  # the C side wants no empty ones
                self.iov[self.nr].iov_base = self.views[self.nr_views - 1].buf
                self.iov[self.nr].iov_len = self.views[self.nr_views - 1].len
                self.total += self.views[self.nr_views - 1].len
                self.nr += 1
        return 0


cdef class Ring:
    """One end of a connection to another process through shared memory; see csrc/ring.h."""

    cdef dm_ring *r
    cdef bytearray frame  # under way: longer than what is in the ring
    cdef bint sending, receiving
    cdef object __weakref__

    def __cinit__(self):
        self.r = NULL

    def __init__(self):
        raise TypeError("use Ring.create or Ring.attach")

    def __dealloc__(self):
        if self.r != NULL:
            dm_ring_close(self.r)
            dm_ring_put(self.r)

    @staticmethod
    def create(capacity=DEF_CAPACITY, max_frame=DEF_MAX_FRAME) -> Ring:
        """Make a pair of rings, and be its server."""
        cdef dm_error err = no_error()
        cdef Ring self = Ring.__new__(Ring)
        raise_status(dm_ring_create(capacity, _max_frame(max_frame), &self.r, &err), &err, "Ring.create")
        return self

    @staticmethod
    def attach(int memfd, int my_bell, int peer_bell, max_frame=DEF_MAX_FRAME) -> Ring:
        """Be the client of a pair that another process made. Duplicates the descriptors."""
        cdef dm_error err = no_error()
        cdef Ring self = Ring.__new__(Ring)
        raise_status(
            dm_ring_attach(memfd, my_bell, peer_bell, _max_frame(max_frame), &self.r, &err),
            &err, "Ring.attach",
        )
        return self

    cdef inline dm_ring *open(self) except NULL:
        if self.r == NULL:
            raise _errors.RingClosed("the ring is closed")
        if dm_ring_forked(self.r):
            raise _errors.ForkedError("a ring belongs to the process that opened it")
        return self.r

    # ------------------------------------------------------------ sending

    def send(self, parts, timeout=None) -> None:
        """Send what the parts hold together, and wait for room if need be.

        What fails before a byte went out changes nothing. After that the stream has a torn frame, the
        ring is closed for sending, the exception says so, and so does every later send.
        """
        cdef dm_ring *r = self.open()
        cdef dm_error err
        cdef iovec one
        cdef uint64_t done = 0
        cdef _Parts held
        if PyBytes_CheckExact(parts) and PyBytes_GET_SIZE(parts):
            one.iov_base = PyBytes_AS_STRING(parts)
            one.iov_len = PyBytes_GET_SIZE(parts)
            self.send_iov(r, &one, one.iov_len, timeout)
            return
        held = _Parts()
        held.hold(parts if isinstance(parts, (list, tuple)) else (parts,))
        try:
            # Looking at the parts may have run anything.
            self.send_iov(self.open(), held.iov, held.total, timeout)
        finally:
            held.release()

    cdef int send_iov(self, dm_ring *r, const iovec *iov, uint64_t total, object timeout) except -1:
        cdef dm_error err
        cdef uint64_t done = 0, deadline
        cdef int status
        if self.sending:
            raise _errors.MisuseError("Ring.send: another thread is sending")
        if total < BLOCKING and dm_ring_fits(r, total):
            err = no_error()
            status = dm_ring_send(r, iov, total, &done, 1, &err)
            return raise_status(status, &err, "Ring.send") if status else 0
        err = no_error()
        deadline = _deadline(timeout)
        self.sending = True
        dm_ring_get(r)
        try:
            while True:
                with nogil:
                    status = dm_ring_send(r, iov, total, &done, deadline, &err)
                if status != DM_RING_INTERRUPTED:
                    return raise_status(status, &err, "Ring.send")
                try:
                    PyErr_CheckSignals()
                except BaseException:
                    dm_ring_break_sending(r, done, total, &err)
                    raise
        finally:
            self.sending = False
            dm_ring_put(r)

    def try_send(self, parts, Py_ssize_t skip=0) -> int:
        """Write what fits of the parts, from byte `skip` on, and return how many bytes that was.

        If that was not all, our bell rings once there is room for more.
        """
        cdef dm_error err = no_error()
        cdef dm_ring *r
        cdef _Parts held
        cdef iovec one
        cdef int64_t n
        if PyBytes_CheckExact(parts) and 0 < PyBytes_GET_SIZE(parts) < BLOCKING and skip == 0:
            r = self.open()
            if self.sending:
                raise _errors.MisuseError("Ring.try_send: another thread is sending")
            one.iov_base = PyBytes_AS_STRING(parts)
            one.iov_len = PyBytes_GET_SIZE(parts)
            n = dm_ring_try_send(r, &one, one.iov_len, 0, &err)
            if n < 0:
                raise_status(<int>n, &err, "Ring.try_send")
            return n
        if skip < 0:
            raise ValueError("skip is negative")
        held = _Parts()
        held.hold(parts if isinstance(parts, (list, tuple)) else (parts,))
        r = self.open()
        if self.sending:
            raise _errors.MisuseError("Ring.try_send: another thread is sending")
        if held.total < BLOCKING:
            n = dm_ring_try_send(r, held.iov, held.total, skip, &err)
        else:
            self.sending = True
            dm_ring_get(r)
            with nogil:
                n = dm_ring_try_send(r, held.iov, held.total, skip, &err)
            dm_ring_put(r)
            self.sending = False
        held.release()
        if n < 0:
            raise_status(<int>n, &err, "Ring.try_send")
        return n

    # ------------------------------------------------------------ receiving

    def recv(self):
        """Return the next frame as a bytearray, or None if it is not complete yet."""
        cdef dm_error err
        cdef dm_ring *r = self.open()
        cdef uint64_t there = 0
        cdef int64_t size, n
        cdef bytearray frame
        if self.receiving:
            raise _errors.MisuseError("Ring.recv: another thread is receiving")
        err.text[0] = 0
        size = dm_ring_begin(r, &there, &err)
        if size <= 0:
            if size:
                self.frame = None
                err.sys_errno = 0
                self.refuse(<int>size, &err)
            return None
        if self.frame is None and there >= <uint64_t>size - 4 and size <= BLOCKING:
            frame = PyByteArray_FromStringAndSize(NULL, size)
            memcpy(PyByteArray_AS_STRING(frame), r.in_.size_bytes, 4)
            n = dm_ring_fill(r, PyByteArray_AS_STRING(frame) + 4, size - 4, &err)
            if n == size - 4:
                r.in_.size = r.in_.got = 0
                return frame
            if n < 0:
                self.refuse(<int>n, &err)
            self.frame = frame
            return None
        return self.recv_large(r, size, there)

    cdef int refuse(self, int status, dm_error *seen) except -1:
        cdef dm_error err = no_error()
        memcpy(err.text, seen.text, sizeof(err.text))
        return raise_status(status, &err, "Ring.recv")

    cdef object recv_large(self, dm_ring *r, int64_t size, uint64_t there):
        cdef dm_error err = no_error()
        cdef int64_t n, want, length
        cdef char *to
        cdef bytearray frame = self.frame
        if frame is None:
            frame = PyByteArray_FromStringAndSize(NULL, size) if <uint64_t>size - 4 <= there else begin_frame(size)
            memcpy(PyByteArray_AS_STRING(frame), r.in_.size_bytes, 4)
            self.frame = frame
        while True:
            length = PyByteArray_GET_SIZE(frame)
            if r.in_.got == length and length < size:
                grow_frame(frame, size)
                length = PyByteArray_GET_SIZE(frame)
            to = PyByteArray_AS_STRING(frame) + r.in_.got
            want = length - r.in_.got
            if there <= BLOCKING:
                n = dm_ring_fill(r, to, want, &err)
            else:
                self.receiving = True
                dm_ring_get(r)
                with nogil:
                    n = dm_ring_fill(r, to, want, &err)
                self.receiving = False
                if self.r == NULL:
                    self.frame = None
                    dm_ring_put(r)
                    raise _errors.RingClosed("the ring is closed")
                dm_ring_put(r)
            if n < 0:
                self.frame = None
                raise_status(<int>n, &err, "Ring.recv")
            if r.in_.got == size:
                r.in_.size = r.in_.got = 0
                self.frame = None
                return frame
            if n < want:
                return None
            there = BLOCKING + 1

    # ------------------------------------------------------------ waiting

    def has_data(self) -> bool:
        """Say whether there are bytes that recv has not taken yet."""
        return dm_ring_has_data(self.open())

    def arm(self) -> bool:
        """Have our bell rung when data comes. True: there is some already, so it will not be."""
        return dm_ring_arm(self.open())

    def wait(self, timeout=None) -> bool:
        """Wait for data: True when there is some.

        False when the time is up, or peer_gone or peer_spoke say that peer_fd has ended or has
        something to read. What the peer had sent before comes first.
        """
        cdef dm_error err
        cdef dm_ring *r = self.open()
        cdef int status
        cdef uint64_t deadline
        if dm_ring_has_data(r):
            return True
        err = no_error()
        deadline = _deadline(timeout)
        raise_status(dm_ring_wait_open(r, &err), &err, "Ring.wait")
        dm_ring_get(r)
        try:
            while True:
                with nogil:
                    status = dm_ring_wait(r, deadline, &err)
                if status != DM_RING_INTERRUPTED:
                    break
                PyErr_CheckSignals()
        finally:
            dm_ring_put(r)
        raise_status(status, &err, "Ring.wait")
        return status == 1

    def set_peer_fd(self, int fd) -> None:
        """Let waiting look at a socket connected to the peer, or at its pidfd; -1: at nothing.

        The descriptor stays the caller's. Take it back with -1, or close the ring, before closing it.
        """
        cdef dm_error err = no_error()
        raise_status(dm_ring_set_peer_fd(self.open(), fd, &err), &err, "Ring.set_peer_fd")

    def drain_bell(self) -> None:
        """Make bell_fd unreadable until the bell rings again: before recv, for whoever polls it."""
        dm_ring_drain_bell(self.open())

    @property
    def fds(self):
        """(memory, my bell, peer's bell): the other side attaches with the last two exchanged."""
        cdef dm_ring *r = self.open()
        return r.memfd, r.my_bell, r.peer_bell

    @property
    def bell_fd(self) -> int:
        """My bell."""
        return self.open().my_bell

    @property
    def capacity(self) -> int:
        """Bytes that fit into one direction."""
        return self.open().capacity

    @property
    def max_frame(self) -> int:
        """Bytes of the largest frame that recv accepts."""
        return self.open().max_frame

    @property
    def peer_gone(self) -> bool:
        """Whether peer_fd has ended."""
        return self.open().peer_gone

    @property
    def peer_spoke(self) -> bool:
        """Whether the last wait came back since peer_fd has something to read."""
        return self.open().peer_spoke

    @property
    def spin_us(self) -> int:
        """How long to look for data or room before sleeping; 0: not at all."""
        return self.open().in_.spin.budget_ns // 1000

    @spin_us.setter
    def spin_us(self, value):
        cdef dm_ring *r = self.open()
        cdef uint32_t ns = min(max(int(value), 0), 1000000) * 1000
        r.in_.spin.budget_ns = ns
        r.out.spin.budget_ns = ns

    @property
    def closed(self) -> bool:
        """Whether close was called."""
        return self.r == NULL

    def stats(self):
        """Return what was done, as a dict of counters."""
        cdef dm_ring *r = self.open()
        return {
            "bytes_sent": r.out.bytes,
            "bytes_received": r.in_.bytes,
            "bells_rung": r.out.bells + r.in_.bells,
            "sleeps": r.in_.sleeps,
            "spins_won": r.in_.spin.won + r.out.spin.won,
            "spins_lost": r.in_.spin.lost + r.out.spin.lost,
            "space_waits": r.out.waits,
        }

    def close(self) -> None:
        """Let go of memory and descriptors. Calls under way in other threads come back with RingClosed."""
        cdef dm_ring *r = self.r
        self.r = NULL
        if r != NULL:
            dm_ring_close(r)
            dm_ring_put(r)
            if not self.receiving:
                self.frame = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


cdef class WaitSet:
    """Rings and descriptors, waited for by several threads at once. The contract: csrc/waitset.c."""

    cdef dm_waitset *w
    cdef dict rings
    cdef object __weakref__

    def __cinit__(self):
        cdef dm_error err = no_error()
        self.rings = {}
        raise_status(dm_waitset_create(&self.w, &err), &err, "WaitSet")

    def __dealloc__(self):
        if self.w != NULL:
            dm_waitset_close(self.w)
            dm_waitset_put(self.w)

    cdef inline dm_waitset *open(self) except NULL:
        if self.w == NULL:
            raise _errors.RingClosed("the wait set is closed")
        return self.w

    def add_ring(self, Ring ring not None, int64_t key) -> None:
        """Watch a ring, and arm it: it is reported at once if it has data."""
        cdef dm_error err = no_error()
        raise_status(dm_waitset_add_ring(self.open(), ring.open(), key, &err), &err, "WaitSet.add_ring")
        self.rings[id(ring)] = (ring, <size_t>ring.r)

    def add_fd(self, int fd, int64_t key, bint edge=True) -> None:
        """Watch a descriptor: each event once, or (edge=False) as long as it is readable."""
        cdef dm_error err = no_error()
        raise_status(dm_waitset_add_fd(self.open(), fd, key, edge, &err), &err, "WaitSet.add_fd")

    def remove(self, what) -> None:
        """Watch a ring or a descriptor no longer. A ring may be closed before."""
        cdef dm_error err = no_error()
        cdef dm_waitset *w = self.open()
        cdef size_t r
        if isinstance(what, Ring):
            _, r = self.rings.pop(id(what), (None, 0))
            if r == 0:
                raise _errors.BadAddress("WaitSet.remove: the ring is not in this wait set")
            raise_status(dm_waitset_remove(w, <dm_ring *>r, -1, &err), &err, "WaitSet.remove")
        else:
            raise_status(dm_waitset_remove(w, NULL, what, &err), &err, "WaitSet.remove")

    def wait(self, timeout=None):
        """Wait, and return the key of what is ready; -1 for a kick, None when the time is up."""
        cdef dm_error err = no_error()
        cdef dm_waitset *w = self.open()
        cdef uint64_t deadline = _deadline(timeout)
        cdef int64_t key = 0
        cdef int status
        dm_waitset_get(w)
        try:
            while True:
                with nogil:
                    status = dm_waitset_wait(w, deadline, &key, &err)
                if status != DM_RING_INTERRUPTED:
                    break
                PyErr_CheckSignals()
        finally:
            dm_waitset_put(w)
        raise_status(status, &err, "WaitSet.wait")
        return key if status else None

    def kick(self, uint32_t n=1) -> None:
        """Make n calls of wait return -1."""
        cdef dm_error err = no_error()
        raise_status(dm_waitset_kick(self.open(), n, &err), &err, "WaitSet.kick")

    def set_spin_us(self, value) -> None:
        """Say how long one thread may look at the rings before it sleeps; 0: not at all."""
        dm_waitset_spin(self.open(), min(max(int(value), 0), 1000000) * 1000)

    def stats(self):
        """Return what was done, as a dict of counters."""
        cdef uint64_t sleeps, won, lost
        dm_waitset_stats(self.open(), &sleeps, &won, &lost)
        return {"sleeps": sleeps, "spins_won": won, "spins_lost": lost}

    def close(self) -> None:
        """Let go of everything. Waiting threads come back with RingClosed."""
        cdef dm_waitset *w = self.w
        self.w = NULL
        if w != NULL:
            dm_waitset_close(w)
            dm_waitset_put(w)
            self.rings.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
