# _relay.pxi - frames passed on between connections: Relay. Included by _native.pyx; what C does: csrc/relay.c.
#
# One thread runs a relay and changes it; `run` lets go of the GIL for as long as there is nothing for Python to do. Others may
# kick it and read its counters. A second thread is refused, for C has no locks here.

RELAY_TIMEOUT = DM_RELAY_TIMEOUT
RELAY_KICK = DM_RELAY_KICK
RELAY_FD = DM_RELAY_FD
RELAY_ENDED = DM_RELAY_ENDED
RELAY_BROKE = DM_RELAY_BROKE
RELAY_LEAVING = DM_RELAY_LEAVING
RELAY_CALL = DM_RELAY_CALL


cdef int _error_frame(bytes frame) except -1:
    """Check what C will take its size from."""
    cdef dm_frame h
    if len(frame) < DM_FRAME_HEADER:
        raise ValueError("an ERROR frame has a header")
    memcpy(&h, PyBytes_AS_STRING(frame), DM_FRAME_HEADER)
    if h.size != <uint64_t>len(frame) or h.kind != DM_FRAME_ERROR:
        raise ValueError("not an ERROR frame")
    return 0


cdef class Relay:
    """The connections of a load balancer, and the loop that passes frames on between them."""

    cdef dm_relay *y
    cdef bint running
    cdef uint64_t last_forwarded, last_bytes
    cdef object __weakref__

    def __init__(
        self,
        uint32_t max_waiting,
        uint32_t max_peers,
        uint64_t max_backlog,
        bytes overloaded not None,
        bytes unreachable not None,
        *,
        bint in_turn=False,
        bint asks=False,
    ):
        cdef dm_error err = no_error()
        if self.y != NULL:
            raise TypeError("a Relay is initialised once")
        _error_frame(overloaded)
        _error_frame(unreachable)
        raise_status(
            dm_relay_create(
                max_waiting, max_peers, max_backlog, PyBytes_AS_STRING(overloaded),
                PyBytes_AS_STRING(unreachable), &self.y, &err,
            ),
            &err, "Relay",
        )
        dm_relay_set_policy(self.y, DM_RELAY_IN_TURN if in_turn else DM_RELAY_LEAST_LOADED, asks)

    def __dealloc__(self):
        if self.y != NULL:
            dm_relay_destroy(self.y)

    cdef dm_relay *shared(self) except NULL:
        if self.y == NULL:
            raise _errors.RingClosed("the relay is closed")
        if self.y.owner != getpid():
            raise _errors.ForkedError("a relay belongs to the process that opened it")
        return self.y

    cdef dm_relay *mine(self) except NULL:
        if self.running:
            raise _errors.MisuseError("Relay: another thread is running it")
        return self.shared()

    def add(self, Ring ring, int fd, bint backend, max_frame, bytes rest not None=b"") -> int:
        """Take over a connection, and return its key: a ring and the socket that ends with it, or a socket alone."""
        cdef dm_error err = no_error()
        cdef dm_relay *y = self.mine()
        cdef int64_t key = 0
        raise_status(
            dm_relay_add(
                y, DM_BACKEND if backend else DM_CLIENT, NULL if ring is None else ring.open(), fd,
                _max_frame(max_frame), PyBytes_AS_STRING(rest), len(rest), &key, &err,
            ),
            &err, "Relay.add",
        )
        return key

    def remove(self, int64_t key, bytes lost not None) -> int:
        """Forget a connection and see to its calls; return how many calls this backend was given."""
        cdef dm_error err = no_error()
        cdef uint64_t nr = 0
        _error_frame(lost)
        raise_status(dm_relay_remove(self.mine(), key, PyBytes_AS_STRING(lost), &nr), &err, "Relay.remove")
        return nr

    def leave_out(self, int64_t key) -> None:
        """Give a backend no more calls."""
        cdef dm_error err = no_error()
        raise_status(dm_relay_leave_out(self.mine(), key), &err, "Relay.leave_out")

    def watch(self, int fd) -> None:
        """Have run return when a descriptor is readable."""
        cdef dm_error err = no_error()
        raise_status(dm_relay_watch(self.mine(), fd, &err), &err, "Relay.watch")

    def unwatch(self, int fd) -> None:
        """Watch a descriptor no longer; before it is closed."""
        cdef dm_error err = no_error()
        raise_status(dm_relay_unwatch(self.mine(), fd, &err), &err, "Relay.unwatch")

    def run(self, timeout=None):
        """Pass frames on until there is something for the caller: (what, key or descriptor, text)."""
        cdef dm_error err = no_error()
        cdef dm_relay *y = self.mine()
        cdef uint64_t deadline = _deadline(timeout)
        cdef dm_relay_event event
        cdef int status
        self.running = True
        try:
            while True:
                with nogil:
                    status = dm_relay_run(y, deadline, &event, &err)
                if status != DM_RING_INTERRUPTED:
                    break
                PyErr_CheckSignals()
        finally:
            self.running = False
        raise_status(status, &err, "Relay.run")
        return event.what, event.key, event.text.decode("utf-8", "replace")

    def call(self):
        """Return (method, flags, time_left_us, metadata, body) of the call that RELAY_CALL is about; both are copies."""
        cdef dm_relay *y = self.mine()
        cdef dm_frame *h = &y.asked_header
        cdef const char *meta
        if y.asked == NULL:
            raise _errors.MisuseError("Relay: no call waits for an answer")
        meta = y.asked_frame + DM_FRAME_HEADER + <uint64_t>h.nr_refs * DM_FRAME_REF
        return (
            h.method, h.flags, h.time_left_us, meta[: h.meta_bytes],
            (meta + h.meta_bytes)[: h.body_bytes],
        )

    def pass_on(self, int64_t backend=0) -> None:
        """Give that call to a backend, by its key; 0: to one by policy."""
        if dm_relay_answer(self.mine(), backend, NULL):
            raise _errors.MisuseError("Relay: no call waits for an answer")

    def refuse(self, bytes error not None) -> None:
        """Answer that call with an ERROR frame."""
        _error_frame(error)
        if dm_relay_answer(self.mine(), 0, PyBytes_AS_STRING(error)):
            raise _errors.MisuseError("Relay: no call waits for an answer")

    def kick(self) -> None:
        """Make run return, now or when it is called next."""
        cdef dm_error err = no_error()
        raise_status(dm_relay_kick(self.shared(), &err), &err, "Relay.kick")

    def forwarded(self, int64_t key) -> int:
        """Return how many calls a backend was given; 0 once it is removed."""
        return 0 if self.y == NULL or self.y.owner != getpid() else dm_relay_forwarded(self.y, key)

    @property
    def nr_forwarded(self) -> int:
        """Calls passed on."""
        return self.last_forwarded if self.y == NULL else self.y.nr_forwarded

    @property
    def bytes_forwarded(self) -> int:
        """Bytes of calls and replies passed on."""
        return self.last_bytes if self.y == NULL else self.y.bytes_forwarded

    @property
    def nr_waiting(self) -> int:
        """Calls without reply."""
        return 0 if self.y == NULL else self.y.nr_waiting

    def close(self) -> None:
        """Let go of everything but the connections' own descriptors. Idempotent."""
        cdef dm_relay *y = self.y
        if y == NULL:
            return
        if self.running and y.owner == getpid():
            raise _errors.MisuseError("Relay: another thread is running it")
        self.last_forwarded = y.nr_forwarded
        self.last_bytes = y.bytes_forwarded
        self.y = NULL
        dm_relay_destroy(y)
