# What Cython sees of csrc/layout.h, wire.h, status.h and device.h. Values and offsets come from the C compiler: no
# number is typed here, and a field left out here is merely invisible to Python.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "csrc/status.h" nogil:
    cdef enum dm_status:
        DM_OK
        DM_ERR_BAD_ADDRESS
        DM_ERR_BAD_SIZE
        DM_ERR_BAD_REF
        DM_ERR_REF_CONSUMED
        DM_ERR_TOO_MANY_REFS
        DM_ERR_CLOSED
        DM_ERR_FORKED
        DM_ERR_BUSY
        DM_ERR_RING_CLOSED
        DM_ERR_NOT_A_DEVICE
        DM_ERR_TRUNCATED
        DM_ERR_VERSION
        DM_ERR_CORRUPT
        DM_ERR_OUT_OF_FRAMES
        DM_ERR_NO_REF_SLOT
        DM_ERR_NO_ADDRESS_SPACE
        DM_ERR_DEVICE_FULL
        DM_ERR_NO_SERVICE_SLOT
        DM_ERR_UFFD_DENIED
        DM_ERR_UFFD_FEATURE
        DM_ERR_SYSTEM
        DM_ERR_NO_MEMORY
        DM_ERR_DESCRIPTOR_LOST
        DM_ERR_COORDINATOR_LOST
        DM_ERR_COORDINATOR_REFUSED
        DM_ERR_PROTOCOL
        DM_ERR_DEADLINE
        DM_ERR_FENCED
        DM_ERR_PEER_GONE
        DM_ERR_REPLACED
        DM_AGAIN_BLOCKING

    cdef struct dm_error:
        int sys_errno
        int wire_status
        const char *syscall
        unsigned long long address
        unsigned int frame
        char text[192]


cdef extern from "csrc/layout.h" nogil:
    const uint64_t DM_MAGIC
    const uint32_t DM_LAYOUT_VERSION
    const uint32_t DM_SUPERBLOCK_BYTES
    const uint32_t DM_DATA_ALIGN
    const uint32_t DM_MAX_HOSTS
    const uint32_t DM_MAX_FRAMES
    const uint32_t DM_NAME_BYTES
    const uint32_t DM_SECRET_BYTES
    const uint32_t DM_NO_FRAME
    const uint32_t DM_NR_COUNTERS
    const uint32_t DM_OWNER_POOL
    const uint32_t DM_REFCOUNT_MAX
    const uint32_t DM_PTE_PRESENT
    const uint32_t DM_PTE_HEAD
    const uint32_t DM_PTE_HOLE
    const uint32_t DM_PTE_PFN
    const uint32_t DM_REF_EXCLUSIVE
    const uint32_t DM_REF_INLINE_RUNS
    const uint32_t DM_REF_MAGIC
    const uint32_t DM_MAX_SERVICE_NAME
    const uint32_t DM_MAX_SERVICE_ENDPOINT
    const uint32_t DM_SERVICE_SLOT_BYTES
    const uint32_t DM_SERVICE_SLOT_ROOM

    cdef enum dm_host_state:
        DM_HOST_FREE
        DM_HOST_ACTIVE
        DM_HOST_DEAD
        DM_HOST_DRAINING

    cdef enum dm_intent_op:
        DM_INTENT_NONE
        DM_INTENT_ALLOC
        DM_INTENT_FREE_X
        DM_INTENT_SHARE
        DM_INTENT_MOVE
        DM_INTENT_MAP
        DM_INTENT_CLONE
        DM_INTENT_DROP
        DM_INTENT_COW
        DM_INTENT_FILL
        DM_INTENT_RETURN
        DM_INTENT_HOME

    cdef enum dm_ref_state_name "dm_ref_state":
        DM_REF_FREE
        DM_REF_BUILDING
        DM_REF_LIVE
        DM_REF_MAPPING
        DM_REF_DROPPING
        DM_REF_CLONING

    cdef struct dm_superblock:
        uint64_t magic
        uint32_t version
        uint32_t page_size
        uint64_t fabric_id
        uint64_t device_bytes
        uint64_t nr_frames
        uint32_t max_hosts
        uint32_t max_refs
        uint64_t host_table_off
        uint64_t ref_table_off
        uint64_t service_table_off
        uint64_t nr_services
        uint64_t frame_table_off
        uint64_t page_table_off
        uint64_t ptes_per_host
        uint64_t vma_pages
        uint64_t data_off
        uint64_t created_ns
        char name[64]
        uint8_t secret[32]
        uint64_t checksum

    cdef struct dm_intent:
        uint32_t op
        uint32_t ref
        uint64_t ref_state
        uint64_t page
        uint64_t nr
        uint64_t progress
        uint32_t pfn
        uint32_t ref2
        uint64_t old
        uint64_t died_in

    cdef struct dm_homecoming:
        uint32_t nr_frames

    cdef struct dm_host_entry:
        uint32_t state
        uint32_t pid
        uint64_t start_time
        uint64_t incarnation
        uint64_t heartbeat_ns
        uint32_t nr_free
        uint32_t nr_reserved
        uint32_t vm_pieces
        uint32_t frame_limit
        uint64_t registered_ns
        uint64_t activity
        dm_intent intent
        char name[64]
        dm_homecoming homecoming
        uint64_t counters[96]

    cdef struct dm_run:
        uint32_t pfn
        uint32_t count

    cdef struct dm_ref_entry:
        uint64_t state
        uint64_t nonce
        uint64_t length
        uint32_t page_offset
        uint32_t nr_pages
        uint32_t nr_runs
        uint32_t overflow
        uint32_t nr_overflow
        uint16_t creator
        dm_run runs[9]

    cdef struct dm_ref_wire:
        uint16_t magic
        uint16_t reserved
        uint32_t entry
        uint32_t generation
        uint32_t check
        uint64_t fabric_id
        uint64_t nonce
        uint64_t length

    uint32_t dm_frame_refcount(uint64_t word) noexcept
    uint16_t dm_frame_owner(uint64_t word) noexcept
    uint16_t dm_frame_seq(uint64_t word) noexcept
    uint8_t dm_ref_state(uint64_t word) noexcept
    uint8_t dm_ref_flags(uint64_t word) noexcept
    uint16_t dm_ref_holder(uint64_t word) noexcept
    uint32_t dm_ref_gen(uint64_t word) noexcept


cdef extern from "csrc/wire.h" nogil:
    const uint32_t DM_WIRE_MAGIC
    const uint32_t DM_WIRE_VERSION
    const uint32_t DM_WIRE_MAX_PAYLOAD
    const uint32_t DM_WIRE_MAX_RUNS

    cdef enum dm_msg_type:
        DM_MSG_HELLO
        DM_MSG_REGISTER
        DM_MSG_REJOIN
        DM_MSG_GUARD
        DM_MSG_GRANT
        DM_MSG_RETURN
        DM_MSG_LEAVE
        DM_MSG_PUBLISH
        DM_MSG_WITHDRAW
        DM_MSG_LOOKUP
        DM_MSG_LIST
        DM_MSG_STATS
        DM_MSG_HOSTS
        DM_MSG_SHUTDOWN
        DM_MSG_WAIT
        DM_MSG_CHECK
        DM_MSG_NOTIFY_RECALL
        DM_MSG_NOTIFY_FENCED

    cdef enum dm_wire_status:
        DM_WIRE_OK
        DM_WIRE_BAD_REQUEST
        DM_WIRE_DENIED
        DM_WIRE_VERSION_MISMATCH
        DM_WIRE_NO_FRAMES
        DM_WIRE_NO_HOST_SLOT
        DM_WIRE_NOT_REGISTERED
        DM_WIRE_FENCED
        DM_WIRE_NOT_FOUND
        DM_WIRE_EXISTS
        DM_WIRE_QUOTA
        DM_WIRE_INTERNAL
        DM_WIRE_SHUTTING_DOWN
        DM_WIRE_TABLE_FULL

    cdef struct dm_msg_header:
        uint32_t magic
        uint16_t version
        uint16_t type
        uint32_t status
        uint32_t length
        uint64_t request

    cdef struct dm_msg_hello:
        uint64_t fabric_id
        uint8_t secret[32]

    cdef struct dm_msg_hello_reply:
        uint64_t epoch

    cdef struct dm_msg_register:
        uint64_t token
        uint64_t start_time
        uint32_t pid
        uint32_t low
        uint32_t high
        uint32_t batch
        char name[64]

    cdef struct dm_msg_registered:
        uint64_t incarnation
        uint64_t epoch
        uint32_t host
        uint32_t low
        uint32_t high
        uint32_t batch
        uint32_t batch_max
        uint32_t frame_limit

    cdef struct dm_msg_rejoin:
        uint64_t incarnation
        uint32_t host
        uint32_t reserved

    cdef struct dm_msg_grant:
        uint32_t want
        uint32_t min_run

    cdef struct dm_msg_recall:
        uint32_t want
        uint32_t keep


cdef extern from "csrc/device.h" nogil:
    # Cython's bint is an int: where C wants the address of a bool, it must be one.
    ctypedef bint dm_bool "bool"

    const uint32_t DM_MAX_REFS
    const uint32_t DM_AUDIT_MAX_VIOLATIONS

    void dm_error_init(dm_error *err) noexcept

    cdef struct dm_device:
        int fd
        dm_bool writable
        uint64_t fence_epoch
        dm_superblock geo
        uint8_t *base
        dm_superblock *sb
        dm_host_entry *hosts
        dm_ref_entry *refs
        uint64_t *frames
        uint32_t *ptes
        uint8_t *data

    cdef struct dm_coordinator:
        uint64_t epoch
        uint64_t start_time
        uint32_t pid
        uint32_t tcp_port
        char tcp_host[64]
        char unix_path[108]

    void dm_device_changing(const dm_device *dev, uint32_t *host, dm_bool *services) noexcept

    cdef struct dm_host_identity:
        uint32_t pid
        uint32_t frame_limit
        uint64_t start_time
        uint64_t incarnation
        const char *name

    cdef struct dm_counter_info:
        const char *name
        const char *text

    cdef struct dm_violation:
        uint32_t pfn
        char text[188]

    cdef struct dm_audit:
        uint64_t pool
        uint64_t free
        uint64_t in_use
        uint64_t mapped_pages
        uint64_t hole_pages
        uint64_t live_refs
        uint64_t ref_pages
        uint64_t overflow_frames
        uint64_t in_flight
        uint64_t nr_violations
        uint64_t free_of[1025]
        uint64_t coming_to[1025]
        dm_violation violations[64]

    const dm_counter_info dm_device_counters[]

    cdef struct dm_service:
        uint32_t slot
        uint32_t host
        uint64_t incarnation
        uint64_t serial
        uint32_t name_bytes
        uint32_t endpoint_bytes
        char text[1]  # as long as C says

    int dm_device_service(const dm_device *dev, uint32_t slot, dm_service *out) noexcept
    int dm_device_publish(dm_device *dev, const dm_service *what, dm_error *err) noexcept
    int dm_device_withdraw(dm_device *dev, uint32_t slot, uint64_t serial, dm_error *err) noexcept
    void dm_device_owned(const dm_device *dev, uint64_t *counts) noexcept

    int dm_device_geometry(dm_superblock *out, uint64_t data_bytes, uint32_t page_size,
                           uint32_t max_hosts, uint32_t max_refs, dm_error *err) noexcept
    int dm_device_format(int fd, const char *name, const dm_superblock *geo,
                         dm_error *err) noexcept
    int dm_allocate(int fd, uint64_t off, uint64_t bytes, uint64_t *huge_bytes, dm_error *err)
    int dm_device_open(dm_device *dev, int fd, bint writable, dm_error *err) noexcept
    void dm_device_close(dm_device *dev) noexcept
    int dm_device_prefault(dm_device *dev, uint64_t first, uint64_t nr, dm_error *err) noexcept
    int dm_device_frame(const dm_device *dev, uint64_t pfn, uint64_t *word,
                        dm_error *err) noexcept
    size_t dm_device_free_runs(const dm_device *dev, uint16_t owner, uint64_t *cursor,
                               dm_run *runs, size_t cap) noexcept
    int dm_device_transfer(dm_device *dev, uint64_t pfn, uint64_t nr, uint32_t owner_from,
                           uint32_t owner_to, uint64_t *moved, dm_error *err) noexcept
    int dm_device_start_coordinator(dm_device *dev, dm_coordinator *who, dm_error *err) noexcept
    bint dm_device_stop_coordinator(dm_device *dev, uint64_t epoch) noexcept
    void dm_device_coordinator(const dm_device *dev, dm_coordinator *out) noexcept
    int dm_device_activate_host(dm_device *dev, uint32_t host, const dm_host_identity *who,
                                dm_error *err) noexcept
    int dm_device_set_host_state(dm_device *dev, uint32_t host, uint32_t expect, uint32_t state,
                                 dm_bool *changed, dm_error *err) noexcept
    int dm_device_host(const dm_device *dev, uint32_t host, dm_host_entry *out,
                       dm_error *err) noexcept
    bint dm_device_ref(const dm_device *dev, uint32_t entry, dm_ref_entry *out) noexcept
    int dm_device_audit(const dm_device *dev, dm_audit *out, dm_error *err) noexcept


cdef extern from "csrc/recover.h" nogil:
    cdef struct dm_recovery:
        uint32_t intent
        uint64_t pages_unmapped
        uint64_t refs_dropped
        uint64_t frames_reclaimed
        uint64_t refs_damaged
        uint64_t duration_ns

    int dm_recover_host(dm_device *dev, uint32_t host, dm_recovery *out, dm_error *e)


cdef extern from "csrc/scrub.h" nogil:
    const uint32_t DM_SCRUB_MAX_SUSPECTS

    cdef enum dm_scrub_kind:
        DM_SCRUB_LEAKED
        DM_SCRUB_MISSING
        DM_SCRUB_ORPHAN
        DM_SCRUB_BAD_OWNER

    cdef struct dm_suspect:
        uint32_t pfn
        uint32_t expected
        uint64_t word
        uint32_t kind
        uint32_t looks
        uint32_t settled
        uint32_t host
        uint32_t op

    cdef struct dm_orphan:
        uint32_t entry
        uint32_t looks
        uint32_t settled
        uint64_t word

    cdef struct dm_scrub_look:
        uint64_t pool
        uint64_t free
        uint64_t in_use
        uint64_t mapped_pages
        uint64_t hole_pages
        uint64_t refs
        uint64_t ref_pages
        uint64_t bad_entries
        uint64_t in_flight

    cdef struct dm_scrub:
        dm_scrub_look last
        uint64_t nr_looks
        dm_suspect suspects[1]  # as many as C says
        uint32_t nr_suspects
        uint32_t nr_overflowed
        dm_orphan orphans[1]
        uint32_t nr_orphans
        char bad_entry[192]

    int dm_scrub_new(const dm_device *dev, dm_scrub **out, dm_error *err) noexcept
    void dm_scrub_free(dm_scrub *s) noexcept
    int dm_scrub_step(dm_scrub *s, uint64_t budget_ns, dm_bool *done, dm_error *err) noexcept
    int dm_scrub_settle(dm_scrub *s, dm_device *dev, uint32_t min_looks, bint repair,
                        dm_bool *quiet, dm_error *err) noexcept
    uint32_t dm_scrub_forget_refs(dm_device *dev) noexcept


cdef extern from "csrc/dm.h" nogil:
    cdef struct dm_runs:
        dm_run *list
        uint32_t nr

    void dm_runs_init(dm_runs *r) noexcept
    void dm_runs_free(dm_runs *r) noexcept
    int dm_runs_of_entry(const dm_ref_entry *entry, const char *physmap, uint32_t page_shift,
                         uint32_t nr_frames, dm_runs *r) noexcept
