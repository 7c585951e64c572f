# _pager.pxi - arrays whose bytes lie at a memory server until somebody looks. Included by _native.pyx.
#
# The rules are in csrc/net_pager.h. Nothing here waits for the pager's thread but for the end of a fetch that is under way,
# and that thread never needs the GIL.


cdef class Arena:
    """Memory for the Buffers of one Memory."""

    cdef net_arena *a
    cdef readonly int owner

    def __init__(self):
        if self.a != NULL:
            raise TypeError("an Arena is initialised once")
        self.owner = getpid()
        self.a = net_arena_new()
        if self.a == NULL:
            raise MemoryError(f"no addresses for buffers: {strerror(errno).decode()}")

    def __dealloc__(self):
        if self.a != NULL and self.owner == getpid():
            net_arena_free(self.a)

    def kept(self):
        """Bytes of freed Buffers that wait for the next."""
        return net_arena_kept(self.a)


cdef class Pager:
    """Serves the page faults of this process's Buffers. One for each Memory; has a thread in C."""

    cdef net_pager *p
    cdef readonly int owner

    def __init__(self, double deadline):
        if self.p != NULL:
            raise TypeError("a Pager is initialised once")
        self.owner = getpid()
        self.p = net_pager_new(<uint64_t>(deadline * 1e9))
        if self.p == NULL:
            raise OSError(errno, "userfaultfd cannot be used")

    def __dealloc__(self):
        # A forked child has neither the thread nor the memory; its copies of descriptors end with it.
        if self.p != NULL and self.owner == getpid():
            with nogil:
                net_pager_free(self.p)

    @property
    def poisons(self):
        """Whether the kernel can have those that touch lost bytes alone get SIGBUS (Linux 6.6)."""
        return net_pager_poisons(self.p)

    def route(self, int server, bytes address, bytes hello):
        """Say how a shard is reached: the bytes of a struct sockaddr and of a struct net_hello."""
        if PyBytes_GET_SIZE(hello) != sizeof(net_hello):
            raise ValueError("not a hello")
        cdef int status = net_pager_route(
            self.p, <const sockaddr *>PyBytes_AS_STRING(address), <socklen_t>PyBytes_GET_SIZE(address),
            <const net_hello *>PyBytes_AS_STRING(hello), <uint16_t>server,
        )
        if status:
            raise OSError(status, "route")

    def stats(self):
        """Count what was done."""
        cdef net_pager_stats_t s
        net_pager_stats(self.p, &s)
        return {
            "faults": s.nr_faults, "stores": s.nr_stores, "requests": s.nr_requests,
            "bytes_fetched": s.bytes_fetched, "failed": s.nr_failed, "regions": s.nr_regions,
        }


@cython.no_gc_clear  # __dealloc__ needs host, arena and pager
cdef class Buffer:
    """Private memory of this process, as long as a range of a memory server: what its Memory makes. Writable.

    It may show a Ref: then its bytes come from the server when they are first looked at. Freed by :meth:`free`, at the end of a
    ``with`` block, or when neither it nor a view on it is left.
    """

    cdef readonly object host   # the Memory it belongs to
    cdef Arena arena
    cdef Pager pager            # None: nobody watches this memory
    cdef readonly object ref    # a Ref that has the bytes, or had them before stores; may be None
    cdef net_region region
    cdef bint watched, live
    cdef int exports
    cdef object __weakref__

    def __cinit__(self):
        memset(&self.region, 0, sizeof(self.region))

    def __init__(self, host, Arena arena not None, uint64_t nbytes, *, bint zero=True):
        cdef bint there
        if self.region.run.front != NULL:
            raise TypeError("a Buffer is initialised once")
        if nbytes == 0 or nbytes >> 48:
            raise _cxl.BadSize(f"a buffer of {nbytes} bytes")
        with nogil:
            there = net_arena_take(arena.a, (nbytes + NET_PAGE - 1) // NET_PAGE, zero, &self.region.run)
        if not there:
            raise MemoryError(f"a buffer of {nbytes} bytes")
        self.host = host
        self.arena = arena
        self.region.length = nbytes
        self.live = True

    def __dealloc__(self):
        self.unmap()

    cdef void unmap(self) noexcept:
        if self.region.run.front == NULL or self.arena.owner != getpid():  # host may have been cleared already
            return  # a forked child has no such memory
        cdef bint plain = True
        if self.watched:
            plain = net_pager_remove(self.pager.p, &self.region)  # which may wait for a fetch into it
            self.watched = False
        net_arena_give(self.arena.a, &self.region.run, not plain or net_region_failed(&self.region))
        self.region.run.front = NULL

    def show(self, Pager pager not None, Ref ref not None, *, bint whole, bint all_present=False):
        """Have the bytes be those of a Ref that is kept for them. all_present: they are here, and must not be stored to now."""
        cdef int status
        if self.watched:
            raise _cxl.MisuseError("show: this buffer is watched")
        if ref.w.length != self.region.length:
            raise _cxl.BadSize(f"show: a Ref of {ref.w.length} bytes in {self.region.length}")
        self.pager = pager
        self.ref = ref
        self.region.key = ref.w.key
        self.region.server = ref.w.server
        self.region.shard = ref.w.shard
        self.region.whole = whole
        status = net_pager_add(pager.p, &self.region, all_present)
        if status:
            self.ref = None
            raise OSError(status, "a buffer cannot be watched")
        self.watched = True

    def watch(self, Pager pager not None):
        """Notice stores from now on; False: it cannot be done. The bytes are here, and no Ref has them yet."""
        self.pager = pager
        if not self.watched:
            if net_pager_add(pager.p, &self.region, True):
                return False
            self.watched = True
        return net_pager_protect(self.pager.p, &self.region) == 0

    def remember(self, ref):
        """Note that a Ref has the bytes as they are; or, if there were stores meanwhile, as they were."""
        self.ref = ref

    def supply(self, data):
        """Fill in what was not fetched yet, from all of the Ref's bytes."""
        cdef const unsigned char[::1] view = data
        cdef int status
        if view.shape[0] != <Py_ssize_t>self.region.length or not self.watched:
            raise _cxl.BadSize("supply: other bytes than the Ref's")
        with nogil:
            status = net_pager_supply(self.pager.p, &self.region, <const char *>&view[0])
        if status:
            raise OSError(status, "supply")

    def settle(self):
        """Wait for the end of a fetch that is under way."""
        if self.watched:
            with nogil:
                net_pager_settle(self.pager.p, &self.region)

    def retire(self):
        """Let go of the memory as soon as the last view has; for who moves it."""
        self.live = False
        if self.exports == 0:
            self.unmap()  # first: a fetch that is under way needs the Ref
        self.ref = None

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.host is not None and self.host.owner != getpid():
            raise _cxl.ForkedError("a forked child has no memory of its parent's buffers; attach again")
        if not self.live:
            raise _cxl.BadAddress("this buffer was freed or moved")
        PyBuffer_FillInfo(view, self, self.region.run.front, <Py_ssize_t>self.region.length, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1
        if self.exports == 0 and not self.live:
            self.unmap()

    @property
    def address(self):
        """Address of the first byte in this process."""
        return <uint64_t>self.region.run.front

    @property
    def nbytes(self):
        """Length in bytes."""
        return self.region.length

    def __len__(self):
        return self.region.length

    @property
    def views(self):
        """How many views (memoryviews, arrays) on this buffer are alive."""
        return self.exports

    @property
    def freed(self):
        """Whether the buffer was freed or moved."""
        return not self.live

    @property
    def changed(self):
        """Whether its bytes may be others than those of its Ref."""
        return self.ref is None or not self.watched or net_region_dirty(&self.region)

    @property
    def complete(self):
        """Whether all of its bytes are here."""
        return not self.watched or net_region_present(&self.region) >= self.region.run.nr_pages

    @property
    def failed(self):
        """Whether bytes of it could not be had."""
        return net_region_failed(&self.region)

    @property
    def pages_present(self):
        """How many pages of it are here."""
        return net_region_present(&self.region) if self.watched else self.region.run.nr_pages

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
        length = <Py_ssize_t>self.region.length
        if not 0 <= offset <= length:
            raise _cxl.BadSize(f"offset {offset}: the buffer has {length} bytes")
        if shape is None:
            if dtype.itemsize == 0 or (length - offset) % dtype.itemsize:
                raise _cxl.BadSize(f"{length - offset} bytes are no whole number of {dtype} elements; give a shape")
            shape = ((length - offset) // dtype.itemsize,)
        # numpy.ndarray would keep the Buffer alive but let go of its export at once; frombuffer keeps the memoryview.
        return numpy.ndarray(shape, dtype, buffer=numpy.frombuffer(view, "u1"), offset=offset)

    def free(self):
        """Release the memory now.

        Raises:
            BufferInUse: views on it are alive.
            BadAddress: it was freed before.
        """
        if not self.live:
            raise _cxl.BadAddress("free: this buffer was freed or moved")
        if self.exports:
            raise _cxl.BufferInUse(f"free: {self.exports} views on this buffer are alive")
        self.retire()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.live:
            self.free()

    def __repr__(self):
        if not self.live:
            return f"<Buffer of {self.region.length} bytes, freed>"
        return f"<Buffer of {self.region.length} bytes at {<uint64_t>self.region.run.front:#x}>"
