# _dm.pxd - csrc/dm.h and csrc/host.h as _host.pxi uses them.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from dmrpc_cxl._layout cimport dm_bool, dm_error, dm_host_entry, dm_ref_wire, dm_superblock


cdef extern from "dm.h" nogil:
    enum:
        DM_ALLOC_LAZY
        DM_MAP_COPY
        DM_MAP_RESERVE
        DM_MAP_VIEW
        DM_REF_BUSY
        DM_VMA_EXCLUSIVE
        DM_VMA_USED
        DM_AGAIN_BLOCKING

    struct dm_attach_how "dm_attach":
        int device_fd
        const char *fabric
        const char *name
        bint use_tcp
        bint strict
        bint reads_allocate
        bint user_mode_only
        uint32_t low
        uint32_t high
        uint32_t batch
        uint32_t copy_around
        uint64_t deadline_ns

    struct dm_latency:
        uint64_t line_ps
        uint32_t overlap
        uint64_t lines_alone
        uint64_t lines_copied
        uint64_t waits
        uint64_t owed_ns
        uint64_t waited_ns

    struct dm_latency_measured:
        double local_ns
        double overshoot_ns
        double charge_ns

    enum:
        DM_LATENCY_MAX_NS
        DM_LATENCY_MAX_OVERLAP

    dm_latency_measured dm_latency_measure()
    void dm_latency_set(dm_latency *l, uint64_t extra_ps, uint32_t overlap)
    double dm_latency_error(uint64_t extra_ps)
    bint dm_latency_on(const dm_latency *l)
    void dm_latency_bytes(dm_latency *l, uint64_t bytes)

    struct dm_vma:
        uint32_t page
        uint32_t nr_pages
        uint64_t length
        uint32_t page_offset
        uint32_t flags
        void *buffer

    struct dm_link:
        pass

    struct dm_freelist:
        uint32_t nr_free

    struct dm_host:
        dm_host_entry *entry
        dm_vma *vmas
        uint32_t nr_vmas
        uint32_t nr_reserved
        uint32_t nr_out
        uint32_t vm_pieces
        uint32_t vm_piece_limit
        uint32_t batch
        uint32_t high
        uint32_t low
        uint16_t id
        uint32_t page_shift
        uint32_t nr_frames
        uint64_t incarnation
        uint64_t fabric_id
        dm_superblock *sb
        uint64_t deadline_ns
        bint reads_allocate
        bint fenced
        int handler_tid
        dm_link link
        dm_freelist free
        dm_latency latency

    int dm_attach(const dm_attach_how *how, dm_host **out, dm_error *e)
    int dm_detach(dm_host *h, dm_error *e)
    bint dm_forked(const dm_host *h)
    bint dm_try_lock(dm_host *h)
    void dm_lock(dm_host *h)
    void dm_unlock(dm_host *h)
    int dm_ralloc(dm_host *h, uint64_t size, unsigned flags, bint may_block, uint32_t *id, dm_error *e)
    void dm_zero(dm_host *h, uint32_t id)
    int dm_rfree(dm_host *h, uint32_t id, dm_error *e)
    void dm_balance(dm_host *h)
    int dm_create_ref(dm_host *h, uint64_t addr, uint64_t size, bint may_block, dm_ref_wire *out, dm_error *e)
    int dm_move_ref(dm_host *h, uint32_t id, bint may_block, dm_ref_wire *out, dm_error *e)
    int dm_ref_check(dm_host *h, const dm_ref_wire *w, uint32_t *index, uint64_t *word, dm_error *e)
    int dm_ref_wire_check(const dm_ref_wire *w, uint64_t fabric_id, dm_error *e)
    int dm_ref_accept(dm_host *h, dm_ref_wire *w, bint anew, dm_error *e)
    int dm_ref_clone(dm_host *h, dm_ref_wire *source, bint may_block, dm_ref_wire *out, dm_error *e)
    int dm_ref_drop(dm_host *h, const dm_ref_wire *w, dm_error *e)
    bint dm_ref_held(dm_host *h, const void *bytes)
    uint64_t dm_refs_drop(dm_host *h, const void *bytes, size_t nr, dm_bool *busy)
    int dm_map_ref(dm_host *h, const dm_ref_wire *w, unsigned flags, bint may_block, uint32_t *id, dm_error *e)
    int dm_request(dm_host *h, uint16_t type, const void *payload, uint32_t length, void *reply,
                   uint32_t reply_max, uint32_t *reply_length, uint64_t deadline_ns, dm_error *e)
    uint32_t dm_vma_at(const dm_host *h, uint64_t addr)
    uint64_t dm_addr_of(const dm_host *h, uint32_t page)
    uint64_t dm_now_ns()
