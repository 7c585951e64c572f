# _relayc.pxd - csrc/frame.h and csrc/relay.h as _frames.pxi and _relay.pxi use them.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from dmrpc_cxl._layout cimport dm_error
from dmrpc_cxl._ringc cimport dm_ring


cdef extern from "frame.h" nogil:
    enum:
        DM_FRAME_HEADER
        DM_FRAME_REF
        DM_FRAME_FIRST_KIND
        DM_FRAME_LAST_KIND
        DM_FRAME_ERROR
        DM_FRAME_KNOWN_FLAGS
        DM_FRAME_MAX_REFS
        DM_FRAME_MAX_META
        DM_FRAME_BELIEVED
        DM_FRAME_MAX_BYTES
        DM_FRAME_ALIGNMENT

    struct dm_frame:
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

    int dm_frame_check(const dm_frame *h, uint64_t bytes, dm_error *e)


cdef extern from "relay.h" nogil:
    enum dm_side:
        DM_CLIENT
        DM_BACKEND

    enum dm_relay_what:
        DM_RELAY_TIMEOUT
        DM_RELAY_KICK
        DM_RELAY_FD
        DM_RELAY_ENDED
        DM_RELAY_BROKE
        DM_RELAY_LEAVING
        DM_RELAY_CALL

    enum dm_relay_policy:
        DM_RELAY_LEAST_LOADED
        DM_RELAY_IN_TURN

    struct dm_relay_event:
        dm_relay_what what
        int64_t key
        char text[192]

    struct dm_relay:
        uint64_t nr_forwarded
        uint64_t bytes_forwarded
        uint32_t nr_waiting
        int owner
        void *asked
        char *asked_frame
        dm_frame asked_header

    int dm_relay_create(uint32_t max_waiting, uint32_t max_peers, uint64_t max_backlog,
                        const char *overloaded, const char *unreachable, dm_relay **out, dm_error *e)
    void dm_relay_destroy(dm_relay *y)
    int dm_relay_add(dm_relay *y, dm_side side, dm_ring *ring, int fd, uint32_t max_frame,
                     const char *rest, uint64_t nr_rest, int64_t *key, dm_error *e)
    int dm_relay_remove(dm_relay *y, int64_t key, const char *lost, uint64_t *nr_forwarded)
    int dm_relay_leave_out(dm_relay *y, int64_t key)
    int dm_relay_watch(dm_relay *y, int fd, dm_error *e)
    int dm_relay_unwatch(dm_relay *y, int fd, dm_error *e)
    int dm_relay_run(dm_relay *y, uint64_t deadline_ns, dm_relay_event *out, dm_error *e)
    void dm_relay_set_policy(dm_relay *y, dm_relay_policy policy, bint asks)
    int dm_relay_answer(dm_relay *y, int64_t backend, const char *refusal)
    int dm_relay_kick(dm_relay *y, dm_error *e)
    uint64_t dm_relay_forwarded(dm_relay *y, int64_t key)


cdef extern from "<unistd.h>" nogil:
    int getpid()
