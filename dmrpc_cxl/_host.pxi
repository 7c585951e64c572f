# _host.pxi - the DM layer of this process for Python: Host, Buffer and Ref. Included by _native.pyx.
#
# How a call runs. First try: with the GIL, if the host's lock is free, and only work that neither blocks nor takes long.
# When native code says DM_AGAIN_BLOCKING (it would ask the coordinator, copy much, or the lock was taken), the GIL is
# released and the call repeated in full. The lock is never held while waiting for the GIL: whatever runs without the GIL
# gives the lock back before it takes the GIL again. `users` counts those, so that detach cannot pull the
# host away under them.

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.number cimport PyNumber_Index
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy, memset

from dmrpc_cxl._dm cimport *

import weakref as _weakref

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef size_t _ZERO_WITH_GIL = 65536  # bytes; zeroing more than this is worth releasing the GIL

# Attached hosts of this process, newest last: unpickled Refs belong to the newest on their fabric.
cdef list _hosts = []


cdef Host _host_on(uint64_t fabric_id):
    cdef Host host
    for link in reversed(_hosts):
        host = link()
        if host is not None and host.h != NULL and host.h.fabric_id == fabric_id and not dm_forked(host.h):
            return host
    return None


cdef int _not_dm(object operation) except -1:
    raise _errors.BadAddress(
        f"{operation}: this object's memory is not in DM of this host; place it there with host.array()"
    )


@cython.no_gc_clear
@cython.freelist(256)
cdef class Ref:
    """A transferable, single-holder claim on a run of frames: the bytes a buffer had when it was made.

    Made by :meth:`Host.create_ref`, sent as 40 bytes (:meth:`to_bytes`, pickle), used once by
    :meth:`Host.map_ref`. A Ref that is garbage-collected is dropped, unless its bytes were handed out: then it
    belongs to whoever accepts it, and to this host until somebody does.

    Paper: IV (Ref), V-B.2.
    """

    cdef readonly Host host
    cdef dm_ref_wire w
    cdef bint ours       # this host was the holder when last looked at
    cdef bint exported   # bytes were handed out
    cdef bint spent      # mapped or dropped through this object
    cdef object __weakref__

    def __init__(self):
        raise TypeError("a Ref is made by Host.create_ref, Ref.clone or Ref.from_bytes")

    def __dealloc__(self):
        cdef dm_error err
        cdef dm_host *h
        if not self.ours or self.exported or self.spent or self.host is None:
            return
        h = self.host.h
        if h == NULL or dm_forked(h):
            return
        dm_lock(h)
        dm_ref_drop(h, &self.w, &err)
        dm_balance(h)
        dm_unlock(h)

    @property
    def nbytes(self):
        """Length of the bytes the Ref denotes."""
        return self.w.length

    def __len__(self):
        return self.w.length

    def __repr__(self):
        state = "spent" if self.spent else "held" if self.ours else "not accepted"
        return f"<Ref {self.w.length} bytes, entry {self.w.entry} generation {self.w.generation}, {state}>"

    def to_bytes(self):
        """Return the 40 bytes that stand for this Ref on the wire.

        The Ref stays this host's until a receiver accepts or maps it; it is no longer dropped by garbage
        collection. Call :meth:`drop` when the message could not be delivered.

        Raises:
            RefConsumed: it was mapped or dropped through this object.
        """
        self.host.enter("to_bytes")
        if self.spent:
            raise _errors.RefConsumed("to_bytes: this Ref was mapped or dropped before")
        self.exported = True
        return PyBytes_FromStringAndSize(<char *>&self.w, sizeof(self.w))

    @staticmethod
    def from_bytes(data, host=None):
        """Read a Ref from the bytes another host sent. It is not accepted yet: see :meth:`accept`.

        Args:
            data: 40 bytes from :meth:`to_bytes`.
            host: the host to use it with; by default the one of this process on the Ref's fabric.

        Raises:
            BadRef: not a Ref, damaged, or of another fabric.
        """
        cdef dm_ref_wire w
        cdef bytes raw = bytes(data)
        if PyBytes_GET_SIZE(raw) != sizeof(w):
            raise _errors.BadRef(f"a Ref has {sizeof(w)} bytes, not {len(raw)}")
        memcpy(&w, PyBytes_AS_STRING(raw), sizeof(w))
        if host is None:
            host = _host_on(w.fabric_id)
            if host is None:
                raise _errors.BadRef(
                    f"a Ref of fabric {w.fabric_id:016x}, to which no host of this process is attached"
                )
        return _ref_of(host, &w)

    def __reduce__(self):
        return (Ref.from_bytes, (self.to_bytes(),))

    def accept(self, *, bint anew=False):
        """Become the holder: from now on the Ref survives its creator, and the bytes it came in are stale.

        Idempotent. Mapping and cloning accept by themselves.

        Args:
            anew: even if this host holds the Ref already. Otherwise bytes of a Ref that come back to its holder stay
                good, and whoever sent them, in this very process, may still drop it.

        Raises:
            RefConsumed: another holder was faster, or the holder is gone.
        """
        cdef dm_error err = no_error()
        cdef int s
        cdef dm_host *h = self.host.enter("accept")
        if self.spent:
            raise _errors.RefConsumed("accept: this Ref was mapped or dropped before")
        if self.ours and not self.exported and not anew:
            return self
        self.host.users += 1
        with nogil:
            s = _retry_accept(h, &self.w, anew, &err)
        self.host.users -= 1
        raise_status(s, &err, "accept")
        self.ours = True
        self.exported = False
        return self

    def clone(self):
        """Make another Ref to the same bytes, held by this host; every frame has one more count.

        Returns:
            Ref: independent of this one.

        Raises:
            RefConsumed: this one was used or passed on.
            TooManyRefs: a frame's refcount would overflow.
            RefTableFull: no free entry.
        """
        cdef dm_error err = no_error()
        cdef int s
        cdef dm_ref_wire out
        cdef dm_host *h = self.host.enter("clone")
        if self.spent:
            raise _errors.RefConsumed("clone: this Ref was mapped or dropped before")
        cdef uint32_t before = self.w.generation
        self.host.users += 1
        try:
            with nogil:
                s = _retry_clone(h, &self.w, &out, &err)
        finally:
            self.host.users -= 1
        if self.w.generation != before:  # accepted, whatever came of the clone
            self.exported = False
            self.ours = True
        raise_status(s, &err, "clone")
        self.ours = True
        return _ref_held(self.host, &out)

    def drop(self):
        """Give the Ref back without mapping it. Idempotent; does nothing once somebody else accepted it.

        Returns:
            bool: whether this call released the frames' counts.
        """
        cdef dm_error err = no_error()
        cdef int s
        if self.spent:
            return False
        cdef dm_host *h = self.host.enter("drop")
        self.host.users += 1
        with nogil:
            s = _retry_drop(h, &self.w, &err)
        self.host.users -= 1
        if s == DM_ERR_REF_CONSUMED:
            self.spent = True
            return False
        raise_status(s, &err, "drop")
        self.spent = True
        return True


cdef Ref _ref_of(Host host, dm_ref_wire *w):
    cdef dm_error err = no_error()
    raise_status(dm_ref_wire_check(w, host.enter("Ref.from_bytes").fabric_id, &err), &err, "Ref.from_bytes")
    cdef Ref ref = Ref.__new__(Ref)
    ref.host = host
    ref.w = w[0]
    return ref


cdef inline Ref _ref_held(Host host, dm_ref_wire *w):
    cdef Ref ref = Ref.__new__(Ref)
    ref.host = host
    ref.w = w[0]
    ref.ours = True
    return ref


# A Ref that its holder is just cloning is busy for a moment: wait for it without the lock, but not for ever (the
# cloner may have been stopped).
cdef bint _still_busy(int s, dm_host *h, uint64_t *give_up) noexcept nogil:
    if s != DM_REF_BUSY:
        return False
    if give_up[0] == 0:
        give_up[0] = dm_now_ns() + h.deadline_ns
    sched_yield()
    return dm_now_ns() < give_up[0]


cdef int _retry_accept(dm_host *h, dm_ref_wire *w, bint anew, dm_error *err) noexcept nogil:
    cdef uint64_t give_up = 0
    cdef int s
    while True:
        dm_lock(h)
        s = dm_ref_accept(h, w, anew, err)
        dm_unlock(h)
        if not _still_busy(s, h, &give_up):
            return DM_ERR_DEADLINE if s == DM_REF_BUSY else s


cdef int _retry_clone(dm_host *h, dm_ref_wire *w, dm_ref_wire *out, dm_error *err) noexcept nogil:
    cdef uint64_t give_up = 0
    cdef int s
    while True:
        dm_lock(h)
        s = dm_ref_clone(h, w, True, out, err)
        dm_unlock(h)
        if not _still_busy(s, h, &give_up):
            return DM_ERR_DEADLINE if s == DM_REF_BUSY else s


cdef int _retry_drop(dm_host *h, dm_ref_wire *w, dm_error *err) noexcept nogil:
    cdef uint64_t give_up = 0
    cdef int s
    while True:
        dm_lock(h)
        s = dm_ref_drop(h, w, err)
        dm_balance(h)
        dm_unlock(h)
        if not _still_busy(s, h, &give_up):
            return DM_ERR_DEADLINE if s == DM_REF_BUSY else s


cdef int _retry_map(dm_host *h, dm_ref_wire *w, unsigned flags, uint32_t *id, dm_error *err) noexcept nogil:
    cdef uint64_t give_up = 0
    cdef int s
    while True:
        dm_lock(h)
        s = dm_map_ref(h, w, flags, True, id, err)
        dm_unlock(h)
        if not _still_busy(s, h, &give_up):
            return DM_ERR_DEADLINE if s == DM_REF_BUSY else s


cdef uint64_t _retry_drops(dm_host *h, const char *wires, size_t nr) noexcept nogil:
    cdef uint64_t give_up = 0, dropped = 0
    cdef dm_bool busy = False
    while True:
        dm_lock(h)
        dropped += dm_refs_drop(h, wires, nr, &busy)
        dm_balance(h)
        dm_unlock(h)
        if not busy or not _still_busy(DM_REF_BUSY, h, &give_up):
            return dropped


cdef int _retry_create(dm_host *h, uint64_t addr, uint64_t size, dm_ref_wire *out, dm_error *err) noexcept nogil:
    cdef uint64_t give_up = 0
    cdef int s
    while True:
        dm_lock(h)
        s = dm_create_ref(h, addr, size, True, out, err)
        dm_unlock(h)
        if not _still_busy(s, h, &give_up):
            return DM_ERR_DEADLINE if s == DM_REF_BUSY else s


@cython.no_gc_clear
@cython.freelist(256)
cdef class Buffer:
    """A mapping in DM: what ralloc and map_ref return. Supports the buffer protocol, writable.

    Freed by :meth:`free`, at the end of a ``with`` block, or when neither it nor a view on it is left.
    """

    cdef readonly Host host
    cdef uint32_t id
    cdef char *data
    cdef Py_ssize_t length
    cdef int exports
    cdef bint live
    cdef object __weakref__

    def __init__(self):
        raise TypeError("a Buffer is made by Host.ralloc or Host.map_ref")

    def __dealloc__(self):
        cdef dm_error err
        cdef dm_host *h
        if not self.live or self.host is None:
            return
        h = self.host.h
        if h == NULL or dm_forked(h):
            return
        # Holders of the lock never need the GIL and never block: waiting with the GIL is short.
        dm_lock(h)
        h.vmas[self.id].buffer = NULL
        dm_rfree(h, self.id, &err)
        dm_balance(h)
        dm_unlock(h)

    def __getbuffer__(self, Py_buffer *view, int flags):
        if not self.live:
            raise _errors.BadAddress("this buffer was freed, moved or left behind by detach")
        if dm_forked(self.host.h):
            raise _errors.ForkedError("a forked child has no mapping of its parent's buffers; attach again")
        PyBuffer_FillInfo(view, self, self.data, self.length, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    @property
    def address(self):
        """Address of the first byte in this process."""
        return <uint64_t>self.data

    @property
    def nbytes(self):
        """Length in bytes."""
        return self.length

    def __len__(self):
        return self.length

    @property
    def views(self):
        """How many views (memoryviews, arrays) on this buffer are alive."""
        return self.exports

    @property
    def freed(self):
        """Whether the buffer was freed, moved, or left behind by detach."""
        return not self.live

    @property
    def exclusive(self):
        """Whether this mapping is known to be the only holder of its frames."""
        self.check("exclusive")
        return bool(self.host.h.vmas[self.id].flags & DM_VMA_EXCLUSIVE)

    cdef int check(self, object operation) except -1:
        if not self.live:
            raise _errors.BadAddress(f"{operation}: this buffer was freed, moved or left behind by detach")
        self.host.enter(operation)
        return 0

    def numpy(self, dtype="uint8", shape=None, *, offset=0):
        """Return a writable ndarray over this buffer; it keeps the buffer alive.

        Args:
            dtype: element type.
            shape: default one dimension that fills the buffer after offset.
            offset: bytes to skip.
        """
        import numpy
        cdef object view = memoryview(self)
        dtype = numpy.dtype(dtype)
        if dtype.hasobject:
            raise TypeError(f"{dtype} holds Python objects, whose pointers mean nothing to other processes")
        if not 0 <= offset <= self.length:
            raise _errors.BadSize(f"offset {offset}: the buffer has {self.length} bytes")
        if shape is None:
            if dtype.itemsize == 0:
                raise _errors.BadSize(f"{dtype} elements have no size; give a shape")
            if (self.length - offset) % dtype.itemsize:
                raise _errors.BadSize(
                    f"{self.length - offset} bytes are no whole number of {dtype} elements; give a shape"
                )
            shape = ((self.length - offset) // dtype.itemsize,)
        # numpy.ndarray would keep the Buffer alive but let go of its export at once; frombuffer keeps the memoryview.
        return numpy.ndarray(shape, dtype, buffer=numpy.frombuffer(view, "u1"), offset=offset)

    def free(self):
        """Release the mapping now. Paper: rfree, Table II.

        Raises:
            BufferInUse: views on it are alive.
            BadAddress: it was freed before.
        """
        self.host.rfree(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.live and self.host.h != NULL:
            self.host.rfree(self)

    def __repr__(self):
        if not self.live:
            return f"<Buffer of {self.length} bytes, freed>"
        return f"<Buffer of {self.length} bytes at {<uint64_t>self.data:#x}>"


cdef class Host:
    """A process attached to a fabric: the six calls of the paper's Table II, without rread and rwrite."""

    cdef dm_host *h
    cdef int users
    cdef readonly str fabric
    cdef readonly str name
    cdef object __weakref__

    def __init__(
        self,
        int device_fd,
        str fabric,
        str name,
        *,
        bint use_tcp=False,
        bint strict=False,
        bint reads_allocate=False,
        bint user_mode_only=False,
        uint32_t low=0,
        uint32_t high=0,
        uint32_t batch=0,
        uint32_t copy_around=512,
        double deadline=5.0,
    ):
        cdef dm_error err = no_error()
        cdef dm_attach_how how
        cdef bytes c_fabric = _text(fabric, DM_NAME_BYTES, "the fabric's name")
        cdef bytes c_name = _text(name, DM_NAME_BYTES, "the host's name")
        cdef dm_host *h = NULL
        cdef int s
        if self.h != NULL:
            raise _errors.MisuseError("this host is attached already")
        if not 0 < deadline < 1e6:
            raise ValueError("deadline: seconds, above 0")
        how.device_fd = device_fd
        how.fabric = c_fabric
        how.name = c_name
        how.use_tcp = use_tcp
        how.strict = strict
        how.reads_allocate = reads_allocate
        how.user_mode_only = user_mode_only
        how.low, how.high, how.batch = low, high, batch
        if copy_around == 0:
            raise ValueError("copy_around: pages, 1 or more")
        how.copy_around = copy_around
        how.deadline_ns = <uint64_t>(deadline * 1e9)
        with nogil:
            s = dm_attach(&how, &h, &err)
        raise_status(s, &err, f"attach to {fabric}")
        self.h = h
        self.fabric = fabric
        self.name = name
        _hosts.append(_weakref.ref(self, _hosts.remove))

    def __dealloc__(self):
        cdef dm_error err
        if self.h != NULL and not dm_forked(self.h):
            with nogil:
                dm_detach(self.h, &err)
        self.h = NULL

    cdef dm_host *enter(self, object operation) except NULL:
        if self.h == NULL:
            raise _errors.HostClosed(f"{operation}: this host is detached")
        if dm_forked(self.h):
            raise _errors.ForkedError(
                f"{operation}: a forked child cannot use its parent's host; attach again in the child, or start "
                "it with spawn or forkserver"
            )
        if self.h.fenced:
            raise _errors.HostFenced(f"{operation}: the coordinator declared this host dead; attach again")
        return self.h

    cdef Buffer buffer_of(self, uint32_t id):
        cdef dm_vma *v = &self.h.vmas[id]
        cdef Buffer b = Buffer.__new__(Buffer)
        b.host = self
        b.id = id
        b.data = <char *>dm_addr_of(self.h, v.page) + v.page_offset
        b.length = v.length
        b.live = True
        v.buffer = <void *>b
        return b

    # ------------------------------------------------------------ Table II

    def ralloc(self, size, *, bint lazy=False, bint zero=True):
        """Allocate size bytes of DM for this host alone.

        Args:
            size: bytes, above 0; rounded up to whole pages inside.
            lazy: take address space only; a page gets its frame, zeroed, when it is first written. A store that
                finds no frame before the host's deadline ends the process.
            zero: clear the memory. False leaves whatever its last user left, and costs nothing.

        Returns:
            Buffer: page-aligned, writable.

        Raises:
            BadSize: size is 0.
            OutOfFrames: the pool cannot give that much; nothing was changed.

        Paper: ralloc, Table II, V-B.1. Differs: without lazy the frames are taken at once.
        """
        cdef dm_error err = no_error()
        cdef dm_host *h = self.enter("ralloc")
        cdef uint32_t id = 0
        cdef unsigned flags = DM_ALLOC_LAZY if lazy else 0
        cdef int s = DM_AGAIN_BLOCKING
        cdef uint64_t bytes_wanted
        try:
            bytes_wanted = PyNumber_Index(size)
        except OverflowError:
            if size < 0:
                raise _errors.BadSize(f"ralloc: {size} bytes") from None
            raise _errors.OutOfFrames(f"ralloc: {size} bytes are more than any device has") from None
        if dm_try_lock(h):
            s = dm_ralloc(h, bytes_wanted, flags, False, &id, &err)
            dm_balance(h)
            dm_unlock(h)
        if s == DM_AGAIN_BLOCKING:
            self.users += 1
            with nogil:
                dm_lock(h)
                s = dm_ralloc(h, bytes_wanted, flags, True, &id, &err)
                dm_unlock(h)
            self.users -= 1
        if s:
            raise_status(s, &err, "ralloc")
        cdef Buffer b = self.buffer_of(id)
        if zero and not lazy:
            if bytes_wanted <= _ZERO_WITH_GIL:
                dm_zero(h, id)
            else:
                self.users += 1
                with nogil:
                    dm_zero(h, id)
                self.users -= 1
        return b

    def rfree(self, target):
        """Release a whole mapping: a Buffer, or the address ralloc or map_ref gave.

        Raises:
            BadAddress: not the start of a mapping of this host; also a double free.
            BufferInUse: views on it are alive.

        Paper: rfree, Table II.
        """
        cdef dm_error err = no_error()
        cdef dm_host *h
        cdef Buffer b
        cdef int s
        if isinstance(target, Buffer):
            b = <Buffer>target
        else:
            b = self.buffer_at(target, "rfree")
        b.check("rfree")
        if b.host is not self:
            raise _errors.BadAddress("rfree: this buffer belongs to another host of this process")
        if b.exports:
            raise _errors.BufferInUse(f"rfree: {b.exports} views on this buffer are alive")
        h = self.h
        dm_lock(h)
        s = dm_rfree(h, b.id, &err)
        dm_balance(h)
        dm_unlock(h)
        if s:
            raise_status(s, &err, "rfree")
        b.live = False

    cdef Buffer buffer_at(self, object address, str operation):
        cdef uint64_t at
        cdef uint32_t id
        try:
            at = address
        except (TypeError, OverflowError) as exc:
            raise _errors.BadAddress(f"{operation}: neither a Buffer nor an address: {address!r}") from exc
        cdef dm_host *h = self.enter(operation)
        id = dm_vma_at(h, at)
        if id == 0 or dm_addr_of(h, h.vmas[id].page) + h.vmas[id].page_offset != at or h.vmas[id].buffer == NULL:
            raise _errors.BadAddress(f"{operation}: {at:#x} is not the start of a mapping of this host")
        return <Buffer>h.vmas[id].buffer

    def create_ref(self, target, size=None, *, bint move=False):
        """Make bytes in DM shareable. The Ref denotes what they are at this moment.

        Args:
            target: a Buffer, an object whose memory is in DM (array, memoryview), an address with size, or
                a tuple (address, size).
            size: bytes; only with an address.
            move: give the mapping up instead of keeping it: nothing is protected or counted, and an exclusive buffer
                makes an exclusive Ref. Takes a whole Buffer without views, or its address.

        Returns:
            Ref: held by this host.

        Raises:
            BadAddress, BadSize: not a range of one mapping of this host.
            BufferInUse: move, and views are alive.
            TooManyRefs, RefTableFull, OutOfFrames: nothing was changed.

        Paper: create_ref, Table II, V-B.2. Differs: any start address, any length.
        """
        cdef Py_buffer view
        cdef uint64_t at, length
        cdef Buffer b
        if isinstance(target, Buffer) and size is None:
            b = <Buffer>target
            b.check("create_ref")
            if b.host is not self:
                raise _errors.BadAddress("create_ref: this buffer belongs to another host of this process")
            if move:
                return self.move_buffer(b)
            b.exports += 1  # pinned while the lock may be free
            try:
                return self.share(<uint64_t>b.data, b.length)
            finally:
                b.exports -= 1
        if isinstance(target, tuple) and size is None:
            target, size = target
        if isinstance(target, int):
            if move:
                b = self.buffer_at(target, "create_ref")
                if size is not None and <Py_ssize_t>size != b.length:
                    raise _errors.BadSize("create_ref: a move takes the whole mapping")
                return self.move_buffer(b)
            if size is None:
                raise _errors.BadSize("create_ref: an address needs a size")
            at, length = _range(target, size)
            return self.share_pinned(at, length)
        if size is not None or not PyObject_CheckBuffer(target):
            raise TypeError("create_ref: give a Buffer, an object with memory in DM, or an address and a size")
        if move:
            raise _errors.BufferInUse("create_ref: an array or memoryview is itself a view; move its Buffer")
        try:
            PyObject_GetBuffer(target, &view, PyBUF_SIMPLE)
        except (BufferError, ValueError) as exc:
            raise _errors.BadAddress("create_ref: the array is not contiguous") from exc
        try:
            return self.share(<uint64_t>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    cdef Ref share_pinned(self, uint64_t at, uint64_t length):
        cdef dm_host *h = self.enter("create_ref")
        cdef uint32_t id = dm_vma_at(h, at)
        cdef Buffer b
        if id == 0 or h.vmas[id].buffer == NULL:
            raise _errors.BadAddress(f"create_ref: {at:#x} is not in a mapping of this host")
        b = <Buffer>h.vmas[id].buffer
        b.exports += 1
        try:
            return self.share(at, length)
        finally:
            b.exports -= 1

    cdef Ref share(self, uint64_t at, uint64_t length):
        cdef dm_error err = no_error()
        cdef dm_ref_wire out
        cdef dm_host *h = self.enter("create_ref")
        cdef int s = DM_AGAIN_BLOCKING
        if dm_vma_at(h, at) == 0:
            _not_dm("create_ref")
        if dm_try_lock(h):
            s = dm_create_ref(h, at, length, False, &out, &err)
            dm_unlock(h)
        if s == DM_AGAIN_BLOCKING or s == DM_REF_BUSY:
            self.users += 1
            with nogil:
                s = _retry_create(h, at, length, &out, &err)
            self.users -= 1
        if s:
            raise_status(s, &err, "create_ref")
        return _ref_held(self, &out)

    def move_viewed(self, Buffer b not None):
        """Move a Buffer that has one view left, which the caller takes away right after: for move() of an array."""
        b.check("create_ref")
        if b.host is not self:
            raise _errors.BadAddress("create_ref: this buffer belongs to another host of this process")
        return self.move_buffer(b, 1)

    cdef Ref move_buffer(self, Buffer b, int nr_views=0):
        cdef dm_error err = no_error()
        cdef dm_ref_wire out
        cdef dm_host *h = self.enter("create_ref")
        cdef int s = DM_AGAIN_BLOCKING
        b.check("create_ref")
        if b.exports > nr_views:
            raise _errors.BufferInUse(f"create_ref: {b.exports} views on this buffer are alive; it cannot move")
        b.live = False
        if dm_try_lock(h):
            s = dm_move_ref(h, b.id, False, &out, &err)
            dm_unlock(h)
        if s == DM_AGAIN_BLOCKING:
            self.users += 1
            with nogil:
                dm_lock(h)
                s = dm_move_ref(h, b.id, True, &out, &err)
                dm_unlock(h)
            self.users -= 1
        if s:
            b.live = True
            raise_status(s, &err, "create_ref")
        return _ref_held(self, &out)

    def map_ref(self, ref, *, bint copy=False, bint reserve=False):
        """Turn a Ref into a mapping of this host; the Ref is used up.

        Args:
            ref: a Ref, or the 40 bytes of one.
            copy: copy everything now into frames of this host alone, for a receiver that will overwrite most of it.
            reserve: set frames aside for every page, so that no later store can fail for want of one.

        Returns:
            Buffer: writable. The first store to a page that others hold copies that page.

        Raises:
            BadRef: not a Ref, forged, or of another fabric.
            RefConsumed: used before.
            OutOfFrames: copy or reserve, and the pool cannot give that much; the Ref stays good, held by this host.

        Paper: map_ref, Table II, V-B.3. Differs: a Ref is used once; clone() makes more.
        """
        cdef unsigned flags = 0
        if copy:
            flags |= DM_MAP_COPY
        if reserve:
            flags |= DM_MAP_RESERVE
        return self.map_with(ref, flags, "map_ref")

    def view_ref(self, ref):
        """Show a Ref in this host; the Ref is used up, as by :meth:`map_ref`, but nothing is done for each page.

        For who reads an argument or passes it on. What the buffer can do is the same: the first store to it makes it
        what map_ref would have returned, and so does sharing it. Moving it on (``create_ref(buffer, move=True)``) costs
        no more than viewing it did. Refs that are not one run of frames, or whose frames this host shows already, are
        mapped at once.

        Args:
            ref: a Ref, or the 40 bytes of one.

        Returns:
            Buffer: writable. The first store to a page that others hold copies that page.

        Raises:
            BadRef: not a Ref, forged, or of another fabric.
            RefConsumed: used before.

        Paper: none; map_ref without its page table.
        """
        return self.map_with(ref, DM_MAP_VIEW, "view_ref")

    cdef Buffer map_with(self, object ref, unsigned flags, str operation):
        cdef dm_error err = no_error()
        cdef dm_ref_wire w
        cdef dm_host *h = self.enter(operation)
        cdef uint32_t id = 0
        cdef int s = DM_AGAIN_BLOCKING
        cdef Ref r = None
        if isinstance(ref, Ref):
            r = <Ref>ref
            if r.spent:
                raise _errors.RefConsumed(f"{operation}: this Ref was mapped or dropped before")
            w = r.w
        elif type(ref) is bytes and PyBytes_GET_SIZE(ref) == sizeof(w):
            memcpy(&w, PyBytes_AS_STRING(ref), sizeof(w))
        else:
            w = (<Ref>Ref.from_bytes(ref, self)).w
        if dm_try_lock(h):
            s = dm_map_ref(h, &w, flags, False, &id, &err)
            dm_unlock(h)
        if s == DM_AGAIN_BLOCKING or s == DM_REF_BUSY:
            self.users += 1
            with nogil:
                s = _retry_map(h, &w, flags, &id, &err)
            self.users -= 1
        if s:
            if s == DM_ERR_REF_CONSUMED and r is not None:
                r.spent = True
            raise_status(s, &err, operation)
        if r is not None:
            r.spent = True
        return self.buffer_of(id)

    def ref_is_held(self, data):
        """Return whether the Ref in these 40 bytes is still live under exactly them: not mapped, dropped or accepted.

        Changes nothing, takes no lock. Bytes that are no Ref of this fabric: False.
        """
        cdef dm_host *h = self.enter("ref_is_held")
        cdef bytes raw = data if type(data) is bytes else bytes(data)
        return PyBytes_GET_SIZE(raw) == sizeof(dm_ref_wire) and dm_ref_held(h, PyBytes_AS_STRING(raw))

    def drop_refs(self, data):
        """Drop every Ref among these that is still live under exactly its bytes, whoever holds it.

        For who sent Refs and learns that the message is answered or lost: those that the receiver accepted, used or
        dropped are left alone, as are bytes that are no Refs.

        Args:
            data: the 40 bytes of each, one after the other.

        Returns:
            int: how many Refs this call released.

        Raises:
            BadRef: not a whole number of Refs; nothing was dropped.
        """
        cdef dm_host *h = self.enter("drop_refs")
        cdef Py_buffer view
        cdef const char *wires
        cdef size_t nr, i
        cdef uint64_t dropped = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len % <Py_ssize_t>sizeof(dm_ref_wire):
                raise _errors.BadRef(f"drop_refs: Refs have {sizeof(dm_ref_wire)} bytes each, not {view.len} together")
            wires = <const char *>view.buf
            nr = <size_t>view.len // sizeof(dm_ref_wire)
            for i in range(nr):  # usually all are used up, and nothing needs a lock
                if dm_ref_held(h, wires + i * sizeof(dm_ref_wire)):
                    self.users += 1
                    with nogil:
                        dropped = _retry_drops(h, wires + i * sizeof(dm_ref_wire), nr - i)
                    self.users -= 1
                    break
        finally:
            PyBuffer_Release(&view)
        return dropped

    # ------------------------------------------------------------ the host itself

    def detach(self):
        """Leave the fabric: free every buffer, drop every Ref this host still holds, give all frames back.

        Idempotent. Refs that others accepted live on.

        Raises:
            BufferInUse: views on a buffer are alive, or another thread is inside a call; nothing was changed.
        """
        cdef dm_error err = no_error()
        cdef dm_host *h
        cdef uint32_t id
        cdef int s
        cdef Buffer b
        if self.h == NULL:
            return
        h = self.enter("detach")
        if self.users:
            raise _errors.BufferInUse(f"detach: {self.users} calls on this host are under way in other threads")
        for id in range(1, h.nr_vmas + 1):
            if h.vmas[id].flags & DM_VMA_USED and h.vmas[id].buffer != NULL:
                b = <Buffer>h.vmas[id].buffer
                if b.exports:
                    raise _errors.BufferInUse(f"detach: {b.exports} views on {b!r} are alive")
        for id in range(1, h.nr_vmas + 1):
            if h.vmas[id].flags & DM_VMA_USED and h.vmas[id].buffer != NULL:
                (<Buffer>h.vmas[id].buffer).live = False
        self.h = NULL
        with nogil:
            s = dm_detach(h, &err)
        raise_status(s, &err, "detach")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.detach()

    @property
    def detached(self):
        """Whether detach() was called."""
        return self.h == NULL

    @property
    def id(self):
        """Host id, 1 and up. Paper: global PID."""
        return self.enter("id").id

    @property
    def fabric_id(self):
        """Random number of the fabric's device."""
        return self.enter("fabric_id").fabric_id

    @property
    def secret(self):
        """What whoever may open the device can prove to others that may; see :mod:`dmrpc_cxl.rpc.endpoint`."""
        cdef dm_host *h = self.enter("secret")
        return PyBytes_FromStringAndSize(<char *>h.sb.secret, DM_SECRET_BYTES)

    @property
    def page_size(self):
        """Bytes of a page."""
        return 1 << self.enter("page_size").page_shift

    @property
    def handler_tid(self):
        """Thread id of the fault handler."""
        return self.enter("handler_tid").handler_tid

    def stats(self):
        """Return this host's counters and gauges, by name; what each means: ``COUNTERS``.

        Gauges: free_frames, reserved_frames, mappings, vm_pieces (kernel mappings in use), vm_piece_limit.
        """
        cdef dm_host *h = self.enter("stats")
        cdef uint32_t id
        cdef int used = 0
        dm_lock(h)  # a fault that has just been served may not be counted yet
        dm_unlock(h)
        out = {name: h.entry.counters[i] for i, (name, _) in enumerate(COUNTERS)}
        for id in range(1, h.nr_vmas + 1):
            used += h.vmas[id].flags & DM_VMA_USED != 0
        out["free_frames"] = h.free.nr_free
        out["reserved_frames"] = h.nr_reserved
        out["mappings"] = used
        out["vm_pieces"] = h.vm_pieces
        out["vm_piece_limit"] = h.vm_piece_limit
        return out

    def _latency_set(self, double extra_ns, uint32_t overlap):
        """Have the DM layer take so much longer for each cache line; 0: be as fast as it is. See latency.py."""
        cdef dm_host *h = self.enter("emulate_latency")
        if not 0 <= extra_ns <= DM_LATENCY_MAX_NS or not 1 <= overlap <= DM_LATENCY_MAX_OVERLAP:
            raise ValueError(f"0 to {DM_LATENCY_MAX_NS} ns more, 1 to {DM_LATENCY_MAX_OVERLAP} lines at once")
        cdef uint64_t extra_ps = <uint64_t>(extra_ns * 1000)
        self.users += 1
        with nogil:
            dm_latency_set(&h.latency, extra_ps, overlap)
        self.users -= 1

    def _latency_counts(self):
        """Return what the model of slower memory has charged and waited."""
        cdef dm_latency *l = &self.enter("latency").latency
        return {
            "overlap": l.overlap,
            "extra_ns": l.line_ps / 1000.0,
            "lines_alone": l.lines_alone,
            "lines_copied": l.lines_copied,
            "waits": l.waits,
            "owed_ns": l.owed_ns,
            "waited_ns": l.waited_ns,
        }

    def _forget_given(self):
        """Forget what this host has given away in Refs, for which it would keep as many frames of others: home.c."""
        cdef dm_host *h = self.enter("forget_given")
        with nogil:
            dm_lock(h)
            h.nr_out = 0
            dm_unlock(h)

    def charge(self, size_t nbytes):
        """Say that loads or stores moved so many bytes to or from DM; costs time when slower memory is emulated.

        The DM layer cannot see plain loads and stores. Code that wants them in the model says so itself.
        """
        cdef dm_host *h = self.enter("charge")
        if dm_latency_on(&h.latency):
            with nogil:
                dm_latency_bytes(&h.latency, nbytes)

    @property
    def emulates_latency(self):
        """Whether slower memory is emulated."""
        return dm_latency_on(&self.enter("emulates_latency").latency)

    def contains(self, target):
        """Return whether an object's memory, or an address, lies in a mapping of this host."""
        cdef Py_buffer view
        cdef dm_host *h = self.enter("contains")
        cdef uint64_t at
        if isinstance(target, int):
            return target >= 0 and target < 1 << 64 and dm_vma_at(h, target) != 0
        PyObject_GetBuffer(target, &view, 0x0100 | 0x0018)  # PyBUF_STRIDED_RO and format: any layout
        at = <uint64_t>view.buf
        PyBuffer_Release(&view)
        return dm_vma_at(h, at) != 0

    def request(self, int kind, bytes payload=b"", double deadline=0.0):
        """Send one request of the coordinator protocol and return the answer's payload."""
        cdef dm_error err = no_error()
        cdef dm_host *h = self.enter("request")
        cdef uint32_t length = 0
        cdef bytearray reply = bytearray(WIRE["max_payload"])
        cdef char *to = reply
        cdef const char *data = payload
        cdef uint32_t size = len(payload), room = len(reply)
        cdef uint64_t wait = <uint64_t>(deadline * 1e9) if deadline > 0 else h.deadline_ns
        cdef int s
        self.users += 1
        with nogil:
            s = dm_request(h, <uint16_t>kind, data, size, to, room, &length, wait, &err)
        self.users -= 1
        raise_status(s, &err, "coordinator")
        return bytes(reply[:length])


def latency_measured():
    """Return (ns of one load that misses every cache, ns that a wait of the model takes too long), measured once."""
    cdef dm_latency_measured found
    with nogil:
        found = dm_latency_measure()
    return found.local_ns, found.overshoot_ns


def latency_error(double extra_ns):
    """Return by which share charges of the model take longer than what they charge, measured now."""
    cdef double found
    cdef uint64_t extra_ps = <uint64_t>(extra_ns * 1000)
    with nogil:
        found = dm_latency_error(extra_ps)
    return found


cdef tuple _range(object at, object size):
    if at < 0 or at >= 1 << 64 or size < 0 or size >= 1 << 63:
        raise _errors.BadSize(f"create_ref: {size} bytes at {at} are no range of memory")
    return at, size
