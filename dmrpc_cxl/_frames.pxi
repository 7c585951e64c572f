# _frames.pxi - headers of RPC frames: checked, read, written. No I/O. What they mean: dmrpc_cxl/rpc/frames.py.
#
# Native since each call has four of them, and in Python they cost more than everything else about a small call.

cdef packed struct frame_header:
    uint32_t size
    uint8_t kind
    uint8_t flags
    uint16_t nr_refs
    uint64_t call_id
    uint64_t time_left_us
    uint32_t method
    uint32_t meta_bytes
    uint32_t body_bytes
    uint32_t inline_at

cdef enum:
    FRAME_HEADER_BYTES = 40
    FRAME_REF_BYTES = 40
    FRAME_FIRST_KIND = 1
    FRAME_LAST_KIND = 8
    FRAME_KNOWN_FLAGS = 15
    FRAME_MAX_REFS = 0xFFFF
    FRAME_MAX_META_BYTES = 64 << 10
    FRAME_MAX_BYTES = 1 << 30
    FRAME_ALIGNMENT = 64
    FRAME_COPIED_BYTES = 1024  # of a body: copying so little is cheaper than a memoryview

FRAME_LIMITS = {
    "header_bytes": FRAME_HEADER_BYTES,
    "ref_bytes": FRAME_REF_BYTES,
    "first_kind": FRAME_FIRST_KIND,
    "last_kind": FRAME_LAST_KIND,
    "known_flags": FRAME_KNOWN_FLAGS,
    "max_refs": FRAME_MAX_REFS,
    "max_meta_bytes": FRAME_MAX_META_BYTES,
    "max_bytes": FRAME_MAX_BYTES,
    "alignment": FRAME_ALIGNMENT,
}


@cython.final
@cython.freelist(64)
cdef class Frame:
    """A checked frame; everything but ``data`` is read off its header. Made by :func:`parse_frame`."""

    cdef readonly int kind
    cdef readonly int flags
    cdef readonly int nr_refs
    cdef readonly uint64_t call_id
    cdef readonly uint64_t time_left_us
    cdef readonly uint32_t method
    cdef readonly uint32_t meta_bytes
    cdef readonly uint32_t body_bytes
    cdef readonly uint32_t inline_at
    cdef readonly object data
    cdef readonly object body
    """The arguments, the result or the error: bytes or a memoryview."""

    def __init__(self):
        raise TypeError("a Frame is made by parse_frame")

    @property
    def refs(self):
        """The Refs, 40 bytes each."""
        return memoryview(self.data)[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + FRAME_REF_BYTES * self.nr_refs]

    @property
    def meta(self):
        """The call's metadata, msgpack; may be empty."""
        cdef Py_ssize_t at = FRAME_HEADER_BYTES + FRAME_REF_BYTES * self.nr_refs
        return memoryview(self.data)[at : at + self.meta_bytes]

    def __repr__(self):
        return f"<Frame kind {self.kind}, call {self.call_id}, {len(self.data)} bytes>"


def parse_frame(data):
    """Read and check the header of a whole frame.

    Raises:
        RemoteProtocolError: it says something that cannot be.
    """
    cdef Py_buffer view
    cdef frame_header h
    cdef Frame frame
    cdef uint64_t at, end
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len < FRAME_HEADER_BYTES:
            raise _errors.RemoteProtocolError(f"a frame of {view.len} bytes has no header")
        memcpy(&h, view.buf, FRAME_HEADER_BYTES)
        at = FRAME_HEADER_BYTES + FRAME_REF_BYTES * <uint64_t>h.nr_refs + h.meta_bytes
        end = at + h.body_bytes
        if h.size != view.len:
            raise _errors.RemoteProtocolError(f"a frame of {view.len} bytes says that it has {h.size}")
        if not FRAME_FIRST_KIND <= h.kind <= FRAME_LAST_KIND:
            raise _errors.RemoteProtocolError(f"a frame of unknown kind {h.kind}")
        if h.flags & ~FRAME_KNOWN_FLAGS:
            raise _errors.RemoteProtocolError(f"a frame with unknown flags {h.flags:#x}")
        if h.meta_bytes > FRAME_MAX_META_BYTES:
            raise _errors.RemoteProtocolError(
                f"{h.meta_bytes} bytes of metadata; {FRAME_MAX_META_BYTES} are allowed"
            )
        if h.inline_at:
            if h.inline_at % FRAME_ALIGNMENT or not end <= h.inline_at <= h.size:
                raise _errors.RemoteProtocolError(f"inline data cannot begin at byte {h.inline_at} of {h.size}")
        elif end != h.size:
            raise _errors.RemoteProtocolError(f"the parts of a frame of {h.size} bytes have {end}")
        frame = Frame.__new__(Frame)
        frame.kind = h.kind
        frame.flags = h.flags
        frame.nr_refs = h.nr_refs
        frame.call_id = h.call_id
        frame.time_left_us = h.time_left_us
        frame.method = h.method
        frame.meta_bytes = h.meta_bytes
        frame.body_bytes = h.body_bytes
        frame.inline_at = h.inline_at
        frame.data = data
        if h.body_bytes <= FRAME_COPIED_BYTES:
            frame.body = PyBytes_FromStringAndSize(<char *>view.buf + at, h.body_bytes)
        else:
            frame.body = memoryview(data)[at:end]
        return frame
    finally:
        PyBuffer_Release(&view)


def frame_head(
    int kind,
    uint64_t call_id,
    int flags=0,
    refs=b"",
    bytes meta=b"",
    bytes body=b"",
    uint32_t method=0,
    uint64_t time_left_us=0,
    Py_ssize_t inline_bytes=0,
):
    """Return a frame up to its inline part, which has inline_bytes.

    Raises:
        LocalProtocolError: it would be larger than a frame can be.
    """
    cdef Py_ssize_t ref_bytes = len(refs), meta_bytes = len(meta), body_bytes = len(body)
    cdef Py_ssize_t end = FRAME_HEADER_BYTES + ref_bytes + meta_bytes + body_bytes
    cdef Py_ssize_t inline_at = 0, length = end, size = end
    cdef Py_ssize_t nr_refs = ref_bytes // FRAME_REF_BYTES
    cdef frame_header h
    cdef bytes out
    cdef char *to
    if inline_bytes:
        inline_at = length = (end + FRAME_ALIGNMENT - 1) // FRAME_ALIGNMENT * FRAME_ALIGNMENT
        size = inline_at + inline_bytes
    if size > FRAME_MAX_BYTES or nr_refs > FRAME_MAX_REFS or meta_bytes > FRAME_MAX_META_BYTES:
        raise _errors.LocalProtocolError(
            f"a message of {size} bytes with {nr_refs} Refs and {meta_bytes} bytes of metadata; allowed are "
            f"{FRAME_MAX_BYTES}, {FRAME_MAX_REFS} and {FRAME_MAX_META_BYTES}: send large arguments by Ref, and fewer of them"
        )
    h.size = <uint32_t>size
    h.kind = <uint8_t>kind
    h.flags = <uint8_t>flags
    h.nr_refs = <uint16_t>nr_refs
    h.call_id = call_id
    h.time_left_us = time_left_us
    h.method = method
    h.meta_bytes = <uint32_t>meta_bytes
    h.body_bytes = <uint32_t>body_bytes
    h.inline_at = <uint32_t>inline_at
    out = PyBytes_FromStringAndSize(NULL, length)
    to = PyBytes_AS_STRING(out)
    memcpy(to, &h, FRAME_HEADER_BYTES)
    to += FRAME_HEADER_BYTES
    if ref_bytes:
        refs = bytes(refs)
        memcpy(to, PyBytes_AS_STRING(refs), ref_bytes)
        to += ref_bytes
    memcpy(to, PyBytes_AS_STRING(meta), meta_bytes)
    to += meta_bytes
    memcpy(to, PyBytes_AS_STRING(body), body_bytes)
    to += body_bytes
    if length > end:
        memset(to, 0, length - end)
    return out
