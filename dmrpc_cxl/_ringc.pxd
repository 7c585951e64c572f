# _ringc.pxd - csrc/ring.h as _ring.pxi uses it.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from dmrpc_cxl._layout cimport dm_error


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "host.h" nogil:
    uint64_t dm_now_ns()


cdef extern from "ring.h" nogil:
    enum:
        DM_RING_MIN_FRAME
        DM_RING_INTERRUPTED
        DM_KICKED
    const uint64_t DM_RING_NO_DEADLINE

    # Fields marked _Atomic in C: to read or store one is one atomic access there.
    struct dm_spin:
        uint32_t budget_ns
        uint64_t won
        uint64_t lost

    struct dm_ring_out:
        dm_spin spin
        uint64_t bytes
        uint64_t bells
        uint64_t waits

    struct dm_ring_in:
        uint8_t size_bytes[4]
        uint32_t size
        uint32_t got
        dm_spin spin
        uint64_t bytes
        uint64_t bells
        uint64_t sleeps

    struct dm_ring:
        dm_ring_out out
        dm_ring_in in_ "in"
        uint64_t capacity
        uint32_t max_frame
        int memfd
        int my_bell
        int peer_bell
        bint peer_gone
        bint peer_spoke

    int dm_ring_create(uint64_t capacity, uint32_t max_frame, dm_ring **out, dm_error *e)
    int dm_ring_attach(int memfd, int my_bell, int peer_bell, uint32_t max_frame, dm_ring **out,
                       dm_error *e)
    void dm_ring_close(dm_ring *r)
    void dm_ring_get(dm_ring *r)
    void dm_ring_put(dm_ring *r)
    bint dm_ring_forked(const dm_ring *r)
    int64_t dm_ring_try_send(dm_ring *r, const iovec *iov, uint64_t total, uint64_t skip, dm_error *e)
    int dm_ring_send(dm_ring *r, const iovec *iov, uint64_t total, uint64_t *done,
                     uint64_t deadline_ns, dm_error *e)
    void dm_ring_break_sending(dm_ring *r, uint64_t done, uint64_t total, dm_error *e)
    bint dm_ring_fits(dm_ring *r, uint64_t total)
    int64_t dm_ring_begin(dm_ring *r, uint64_t *there, dm_error *e)
    int64_t dm_ring_fill(dm_ring *r, char *to, uint64_t want, dm_error *e)
    bint dm_ring_has_data(dm_ring *r)
    bint dm_ring_arm(dm_ring *r)
    int dm_ring_wait_open(dm_ring *r, dm_error *e)
    int dm_ring_wait(dm_ring *r, uint64_t deadline_ns, dm_error *e)
    int dm_ring_set_peer_fd(dm_ring *r, int fd, dm_error *e)
    void dm_ring_drain_bell(dm_ring *r)

    struct dm_waitset:
        pass

    int dm_waitset_create(dm_waitset **out, dm_error *e)
    void dm_waitset_close(dm_waitset *w)
    void dm_waitset_get(dm_waitset *w)
    void dm_waitset_put(dm_waitset *w)
    int dm_waitset_add_ring(dm_waitset *w, dm_ring *r, int64_t key, dm_error *e)
    int dm_waitset_add_fd(dm_waitset *w, int fd, int64_t key, bint edge, dm_error *e)
    int dm_waitset_remove(dm_waitset *w, dm_ring *r, int fd, dm_error *e)
    int dm_waitset_wait(dm_waitset *w, uint64_t deadline_ns, int64_t *key, dm_error *e)
    int dm_waitset_kick(dm_waitset *w, uint32_t n, dm_error *e)
    void dm_waitset_spin(dm_waitset *w, uint32_t budget_ns)
    void dm_waitset_stats(dm_waitset *w, uint64_t *sleeps, uint64_t *won, uint64_t *lost)
