# _frames.pxi - headers of RPC frames: checked, read, written. No I/O. What they mean: dmrpc_cxl/rpc/frames.py.
#
# Native since each call has four of them, and in Python they cost more than everything else about a small call.

# The header and its limits are csrc/frame.h, which relay.c goes by as well.

from dmrpc_cxl._relayc cimport *

cdef enum:
    FRAME_COPIED_BYTES = 1024  # of a body: copying so little is cheaper than a memoryview

FRAME_LIMITS = {
    "header_bytes": DM_FRAME_HEADER,
    "ref_bytes": DM_FRAME_REF,
    "first_kind": DM_FRAME_FIRST_KIND,
    "last_kind": DM_FRAME_LAST_KIND,
    "known_flags": DM_FRAME_KNOWN_FLAGS,
    "max_refs": DM_FRAME_MAX_REFS,
    "max_meta_bytes": DM_FRAME_MAX_META,
    "max_bytes": DM_FRAME_MAX_BYTES,
    "alignment": DM_FRAME_ALIGNMENT,
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
        return memoryview(self.data)[DM_FRAME_HEADER : DM_FRAME_HEADER + DM_FRAME_REF * self.nr_refs]

    @property
    def meta(self):
        """The call's metadata, msgpack; may be empty."""
        cdef Py_ssize_t at = DM_FRAME_HEADER + DM_FRAME_REF * self.nr_refs
        return memoryview(self.data)[at : at + self.meta_bytes]

    def __repr__(self):
        return f"<Frame kind {self.kind}, call {self.call_id}, {len(self.data)} bytes>"


def parse_frame(data):
    """Read and check the header of a whole frame.

    Raises:
        RemoteProtocolError: it says something that cannot be.
    """
    cdef Py_buffer view
    cdef dm_frame h
    cdef dm_error err
    cdef Frame frame
    cdef uint64_t at, end
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len < DM_FRAME_HEADER:
            raise _errors.RemoteProtocolError(f"a frame of {view.len} bytes has no header")
        memcpy(&h, view.buf, DM_FRAME_HEADER)
        if dm_frame_check(&h, view.len, &err):
            raise _errors.RemoteProtocolError(err.text.decode("utf-8", "replace"))
        at = DM_FRAME_HEADER + DM_FRAME_REF * <uint64_t>h.nr_refs + h.meta_bytes
        end = at + h.body_bytes
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
    cdef Py_ssize_t end = DM_FRAME_HEADER + ref_bytes + meta_bytes + body_bytes
    cdef Py_ssize_t inline_at = 0, length = end, size = end
    cdef Py_ssize_t nr_refs = ref_bytes // DM_FRAME_REF
    cdef dm_frame h
    cdef bytes out
    cdef char *to
    if inline_bytes:
        inline_at = length = (end + DM_FRAME_ALIGNMENT - 1) // DM_FRAME_ALIGNMENT * DM_FRAME_ALIGNMENT
        size = inline_at + inline_bytes
    if size > DM_FRAME_MAX_BYTES or nr_refs > DM_FRAME_MAX_REFS or meta_bytes > DM_FRAME_MAX_META:
        raise _errors.LocalProtocolError(
            f"a message of {size} bytes with {nr_refs} Refs and {meta_bytes} bytes of metadata; allowed are "
            f"{DM_FRAME_MAX_BYTES}, {DM_FRAME_MAX_REFS} and {DM_FRAME_MAX_META}: send large arguments by Ref, and fewer of them"
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
    memcpy(to, &h, DM_FRAME_HEADER)
    to += DM_FRAME_HEADER
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
