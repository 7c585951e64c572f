/*
 * layout.h - the G-FAM device file, described here and nowhere else.
 *
 * One file in /dev/shm stands for the device. Every host maps it; all integers are little-endian and
 * naturally aligned. Python reads the same declarations through _native.pyx.
 *
 *     offset 0        superblock            DM_SUPERBLOCK_BYTES
 *     host_table_off  struct dm_host_entry  [max_hosts]        host h is entry h - 1
 *     ref_table_off   struct dm_ref_entry   [max_refs]
 *     service_table_off struct dm_service_slot [nr_services]   names of services, see there
 *     frame_table_off uint64_t frame words  [nr_frames]
 *     page_table_off  uint32_t PTEs         [max_hosts][ptes_per_host]
 *     data_off        frames                [nr_frames]        2 MiB aligned; PFN f is at data_off + f * page_size
 *
 * Everything before data_off is metadata; DPA 0 is the first byte of frame 0.
 */
#ifndef DM_LAYOUT_H
#define DM_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the device format is little-endian"
#endif

#define DM_MAGIC 0x4d4146472d435244ull /* "DRC-GFAM" read as a little-endian word */
#define DM_LAYOUT_VERSION 2u
#define DM_SUPERBLOCK_BYTES 4096u
#define DM_DATA_ALIGN (2u << 20)
#define DM_MAX_HOSTS 1024u
#define DM_MAX_FRAMES (1u << 28) /* a PTE has 28 bits for the PFN: 1 TiB of 4 KiB frames */
#define DM_NAME_BYTES 64u
#define DM_SECRET_BYTES 32u
#define DM_NO_FRAME 0xffffffffu

/* ---------------------------------------------------------------- superblock */

struct dm_superblock {
    /* Written once by format, covered by the checksum. */
    uint64_t magic;
    uint32_t version;
    uint32_t page_size; /* bytes; 4096, 16384 or 65536 */
    uint64_t fabric_id; /* random, never 0; travels in every Ref */
    uint64_t device_bytes;
    uint64_t nr_frames;
    uint32_t max_hosts;
    uint32_t max_refs;
    uint64_t host_table_off;
    uint64_t ref_table_off;
    uint64_t service_table_off;
    uint64_t nr_services; /* slots of the service table, DM_SERVICES_PER_HOST for each host */
    uint64_t frame_table_off;
    uint64_t page_table_off;
    uint64_t ptes_per_host; /* owned window, shared window, VMA area, in this order */
    uint64_t vma_pages;     /* pages of the VMA area: ptes_per_host - 2 * nr_frames */
    uint64_t data_off;
    uint64_t created_ns; /* CLOCK_REALTIME */
    char name[DM_NAME_BYTES];
    uint8_t secret[DM_SECRET_BYTES]; /* proves to the coordinator that a peer may open the device */
    uint64_t checksum;               /* FNV-1a 64 of all bytes before this field */

    /* Changes while the fabric lives; written by the coordinator only. */
    uint64_t coordinator_epoch; /* atomic; +1 at every start of a coordinator */
    uint64_t coordinator_start_time;
    uint32_t coordinator_pid; /* 0 when none runs */
    uint32_t tcp_port;        /* 0: does not listen on TCP */
    char tcp_host[64];
    char unix_path[108]; /* empty: not listening */
    uint32_t reserved;
    /* What it is in the midst of that takes several stores, epoch << 16 | what; 0: nothing. See dm_device_begin_change. */
    uint64_t changing_host;     /* what: the entry that it brings to life */
    uint64_t changing_services; /* what: 1 */
};

/* ---------------------------------------------------------------- hosts */

enum dm_host_state {
    DM_HOST_FREE = 0,
    DM_HOST_ACTIVE = 1,
    DM_HOST_DEAD = 2,     /* process gone, reclaim not finished */
    DM_HOST_DRAINING = 3, /* reserved for an orderly leave that takes several steps */
};

/* What a host was doing when it died. op is written last when an operation starts (release) and zeroed
 * first when it ends, so that a record with op != 0 is complete. recover.c has one case for each. */
enum dm_intent_op {
    DM_INTENT_NONE = 0,
    DM_INTENT_ALLOC = 1,   /* frames [pfn, pfn+nr) get count 1 and PTEs at [page, page+nr) */
    DM_INTENT_FREE_X = 2,  /* exclusive run: frames [pfn, pfn+nr), PTEs [page, page+nr) go */
    DM_INTENT_SHARE = 3,   /* create_ref: counts of pages [page, page+nr) +1, done up to progress */
    DM_INTENT_MOVE = 4,    /* counts of [page, page+nr) pass to Ref ref once it is live */
    DM_INTENT_MAP = 5,     /* counts of Ref ref pass to [page, page+nr) once progress is 1 */
    DM_INTENT_CLONE = 6,   /* counts of Ref ref's frames +1 for the clone, done up to progress */
    DM_INTENT_DROP = 7,    /* Ref ref is released, counts dropped up to progress */
    DM_INTENT_COW = 8,     /* pages [page, page+nr) move to frames from pfn on, up to progress */
    DM_INTENT_FILL = 9,    /* holes [page, page+nr) get frames from pfn on */
    DM_INTENT_RETURN = 10, /* free frames [pfn, pfn+nr) go back to the pool */
    DM_INTENT_HOME = 11,   /* free frames [pfn, pfn+nr) are handed to host `page` */
};

struct dm_intent {
    uint32_t op;
    uint32_t ref;
    uint64_t ref_state; /* the state word that ref had when the operation began */
    uint64_t page;      /* first page, as an index into the host's page table */
    uint64_t nr;
    uint64_t progress;
    uint32_t pfn;
    uint32_t ref2;
    uint64_t old; /* DM_INTENT_COW: the frame that page + progress showed before */
    uint64_t
        died_in; /* the op under way when the host died, set by recovery; the fields above stay */
};

/* Counters: one writer (the host, under its lock, or its handler thread), many readers. */
#define DM_COUNTERS(X)                                                                             \
    X(missing_faults, "userfaults on pages that had no frame")                                     \
    X(wp_faults, "userfaults on write-protected pages")                                            \
    X(spurious_faults, "userfaults whose page was writable by the time it was looked at")          \
    X(frames_copied, "frames copied by copy-on-write")                                             \
    X(inplace_upgrades, "pages made writable in place because nobody else held the frame")         \
    X(frames_filled, "frames given to pages that had none")                                        \
    X(bytes_copied, "bytes copied by the DM layer: copy-on-write and eager copies")                \
    X(bytes_zeroed, "bytes zeroed by the DM layer")                                                \
    X(handler_ns, "time the fault handler spent on faults, ns")                                    \
    X(handler_wakeups, "times the fault handler woke up with work to do")                          \
    X(frames_granted, "frames received from the coordinator")                                      \
    X(frames_returned, "frames given back to the coordinator")                                     \
    X(coordinator_round_trips, "requests sent to the coordinator by the DM layer")                 \
    X(syscalls, "system calls made by the DM layer, all kinds")                                    \
    X(protect_calls, "system calls that write-protected pages")                                    \
    X(unprotect_calls, "system calls that removed write protection")                               \
    X(remap_calls, "mmap calls that changed which frame a page shows")                             \
    X(ralloc_calls, "ralloc operations")                                                           \
    X(rfree_calls, "rfree operations")                                                             \
    X(create_ref_calls, "create_ref operations that share")                                        \
    X(move_ref_calls, "create_ref operations that move")                                           \
    X(map_ref_calls, "map_ref operations")                                                         \
    X(map_exclusive, "map_ref and view_ref operations that found the Ref exclusive")               \
    X(map_scattered, "map_ref operations served from the VMA area")                                \
    X(eager_copies, "map_ref operations that copied every page")                                   \
    X(clone_calls, "Ref.clone operations")                                                         \
    X(drop_calls, "Ref.drop operations that released a Ref")                                       \
    X(accept_calls, "Refs accepted from another holder")                                           \
    X(bytes_referenced, "bytes covered by the Refs this host made")                                \
    X(out_of_frames, "operations refused for want of frames")                                      \
    X(map_views, "view_ref operations that touched no page-table entry")                           \
    X(views_materialised, "views that became mappings because they were stored to or shared")      \
    X(frames_sent_home, "freed frames handed to the host that had sent them")                      \
    X(frames_came_home, "frames that other hosts freed and handed back")                           \
    X(frames_allocated, "frames that this host took into use")                                     \
    X(frames_freed, "frames whose last count this host dropped")

enum dm_counter {
#define DM_COUNTER_ENUM(name, text) DM_CNT_##name,
    DM_COUNTERS(DM_COUNTER_ENUM)
#undef DM_COUNTER_ENUM
        DM_NR_COUNTERS
};
#define DM_COUNTER_SLOTS 96u

/* Where other hosts leave word of frames that they have handed to this one: hints, see home.c. */
#define DM_HINTS 30u
struct dm_homecoming {
    uint32_t nr_taken;  /* atomic; slots given out: the next hint goes to nr_taken % DM_HINTS */
    uint32_t nr_hints;  /* atomic; hints that stand in their slots */
    uint32_t nr_frames; /* atomic gauge: frames handed over and not found yet, roughly */
    uint32_t reserved;
    uint64_t hints[DM_HINTS]; /* atomic; count << 32 | first frame; 0: none */
};

struct dm_host_entry {
    uint32_t state;        /* enum dm_host_state; atomic */
    uint32_t pid;          /* as the coordinator sees it */
    uint64_t start_time;   /* clock ticks after boot, /proc/PID/stat field 22: tells a reused pid */
    uint64_t incarnation;  /* never repeated within a fabric; fences out a host declared dead */
    uint64_t heartbeat_ns; /* CLOCK_MONOTONIC of the fault handler's last wake-up */
    uint32_t nr_free;      /* gauge: frames on the host's free list */
    uint32_t nr_reserved;  /* gauge: of these, promised to reserve=True mappings */
    uint32_t vm_pieces;    /* gauge: kernel mappings that copy-on-write and the VMA area made */
    uint32_t frame_limit;  /* most frames the coordinator lets this host own or map; 0: no limit */
    uint64_t registered_ns;
    uint64_t
        activity; /* odd while a thread of the host is inside an operation; +1 at each end of one */
    struct dm_intent intent; /* its own cache lines */
    uint64_t dropping; /* recovery: Ref entry + 1 in the upper half, pages dropped of it; 0: none */
    uint8_t pad1[56];
    char name[DM_NAME_BYTES];
    struct dm_homecoming homecoming; /* its own cache lines: others write them */
    uint64_t counters[DM_COUNTER_SLOTS];
    uint8_t pad3[4096 - 64 - 128 - 64 - 256 - 8 * DM_COUNTER_SLOTS];
};

/* ---------------------------------------------------------------- frame words
 *
 *      63        48   47    46    32 31                              0
 *     +------------+------+--------+---------------------------------+
 *     |  sequence  |coming| owner  |            refcount             |
 *     +------------+------+--------+---------------------------------+
 *
 * One atomic word, so that "the count reached zero" and "the frame is mine now" are one step.
 * owner says who may hand the frame out while refcount is 0: DM_OWNER_POOL or a host id.
 * While refcount > 0 the owner field is the last owner and means nothing.
 * coming: another host handed the free frame to its owner, who has not taken it in yet (home.c). Until then who handed it
 * over may take it back, should the owner turn out to be dead: a compare-and-swap of the word decides.
 * sequence grows by one each time the frame enters use.
 */
#define DM_OWNER_POOL 0u
#define DM_COMING 0x8000u           /* in dm_frame_pack's owner */
#define DM_REFCOUNT_MAX 0x7fffffffu /* above it: too many Refs, never a carry into owner */

static inline uint64_t dm_frame_pack(uint32_t refcount, uint16_t owner, uint16_t seq) {
    return (uint64_t)refcount | (uint64_t)owner << 32 | (uint64_t)seq << 48;
}
static inline uint32_t dm_frame_refcount(uint64_t word) { return (uint32_t)word; }
static inline uint16_t dm_frame_owner(uint64_t word) {
    return (uint16_t)(word >> 32) & (uint16_t)~DM_COMING;
}
static inline bool dm_frame_coming(uint64_t word) { return word >> 47 & 1; }
static inline uint16_t dm_frame_seq(uint64_t word) { return (uint16_t)(word >> 48); }

/* ---------------------------------------------------------------- page-table entries
 *
 *      31      30     29     28   27                              0
 *     +-------+------+------+----+---------------------------------+
 *     |present| head | hole | 0  |              PFN                |
 *     +-------+------+------+----+---------------------------------+
 *
 * A present entry is one count of its frame. hole: the page belongs to a mapping and has no frame yet.
 * head: first page of a mapping.
 */
#define DM_PTE_PRESENT 0x80000000u
#define DM_PTE_HEAD 0x40000000u
#define DM_PTE_HOLE 0x20000000u
#define DM_PTE_PFN 0x0fffffffu

/* ---------------------------------------------------------------- Refs
 *
 *      63                       32 31         16 15     8 7       0
 *     +---------------------------+-------------+--------+---------+
 *     |        generation         |   holder    | flags  |  state  |
 *     +---------------------------+-------------+--------+---------+
 *
 * One atomic word: whoever changes it by compare-and-swap has decided.
 */
enum dm_ref_state {
    DM_REF_FREE = 0,
    DM_REF_BUILDING = 1, /* holder is filling the entry in; counts are not the Ref's yet */
    DM_REF_LIVE = 2,     /* the Ref owns one count of every frame it covers */
    DM_REF_MAPPING = 3,  /* holder turns the counts into a mapping's */
    DM_REF_DROPPING = 4, /* holder gives the counts back */
    DM_REF_CLONING = 5,  /* holder copies the entry; turns LIVE again at once, others wait */
};
#define DM_REF_EXCLUSIVE 0x01u /* flag: no other holder of any frame */

static inline uint64_t dm_ref_pack(uint8_t state, uint8_t flags, uint16_t holder, uint32_t gen) {
    return (uint64_t)state | (uint64_t)flags << 8 | (uint64_t)holder << 16 | (uint64_t)gen << 32;
}
static inline uint8_t dm_ref_state(uint64_t word) { return (uint8_t)word; }
static inline uint8_t dm_ref_flags(uint64_t word) { return (uint8_t)(word >> 8); }
static inline uint16_t dm_ref_holder(uint64_t word) { return (uint16_t)(word >> 16); }
static inline uint32_t dm_ref_gen(uint64_t word) { return (uint32_t)(word >> 32); }

struct dm_run { /* consecutive frames; pfn == DM_NO_FRAME: a hole of count pages */
    uint32_t pfn;
    uint32_t count;
};

#define DM_REF_INLINE_RUNS 9u

struct dm_ref_entry {
    uint64_t state; /* atomic, packed as above */
    uint64_t nonce; /* random; a Ref on the wire must repeat it */
    uint64_t length;
    uint32_t page_offset; /* of the first byte in the first page */
    uint32_t nr_pages;
    uint32_t nr_runs;
    uint32_t overflow; /* first overflow frame + 1; 0: none, as in every free entry */
    uint32_t nr_overflow;
    uint16_t creator;
    uint16_t reserved;
    uint64_t reserved2;
    struct dm_run runs[DM_REF_INLINE_RUNS];
};

/* Overflow frame: runs that do not fit inline; the Ref holds one count of it. */
struct dm_ref_overflow {
    uint32_t next; /* next overflow frame + 1; 0: none */
    uint32_t nr_runs;
    struct dm_run runs[];
};

/* ---------------------------------------------------------------- services
 *
 * A published name is a chain of slots: a head, and as many more as name and endpoint need. Only heads have a state.
 * A slot that no live head leads to is free, whatever it holds. So the chain is written first and the state of the
 * head last (release), and a crash at any store leaves the entry in or out as a whole. A changed endpoint is a new
 * entry with a higher serial number; the old one is freed afterwards, and of two with the same name and host the
 * higher number counts. Written by the coordinator only.
 */
enum dm_service_state {
    DM_SERVICE_FREE = 0,
    DM_SERVICE_LIVE = 1,
};
#define DM_SERVICE_SLOT_BYTES 512u
#define DM_SERVICE_SLOT_ROOM 464u
#define DM_SERVICES_PER_HOST 32u /* slots; together, not each */
#define DM_MIN_SERVICES 256u
#define DM_MAX_SERVICE_NAME 1023u /* bytes of UTF-8 */
#define DM_MAX_SERVICE_ENDPOINT 4096u

struct dm_service_slot {
    uint32_t state; /* enum dm_service_state; atomic; of heads only, 0 in other slots */
    uint32_t next;  /* slot that follows + 1; 0: none */
    uint64_t serial;
    uint64_t incarnation; /* of the host that published it */
    uint64_t checksum;    /* FNV-1a 64 of incarnation, host, lengths, name and endpoint */
    uint32_t host;
    uint32_t name_bytes;
    uint32_t endpoint_bytes; /* they follow the name at once */
    uint32_t reserved;
    uint8_t text[DM_SERVICE_SLOT_ROOM];
};

/* A Ref on the wire: fixed size, unguessable, checked on use. */
#define DM_REF_MAGIC 0x3152u /* "R1" */
struct dm_ref_wire {
    uint16_t magic;
    uint16_t reserved;
    uint32_t entry;
    uint32_t generation;
    uint32_t check; /* folded FNV-1a of the rest: garbling is told from forging */
    uint64_t fabric_id;
    uint64_t nonce;
    uint64_t length;
};

_Static_assert(sizeof(struct dm_superblock) <= DM_SUPERBLOCK_BYTES, "superblock fits its page");
_Static_assert(offsetof(struct dm_superblock, coordinator_epoch) % 8 == 0,
               "epoch is an atomic word");
_Static_assert(sizeof(struct dm_host_entry) == 4096, "a host entry is one page");
_Static_assert(offsetof(struct dm_host_entry, intent) % 64 == 0, "intent has its own cache lines");
_Static_assert(offsetof(struct dm_host_entry, counters) % 64 == 0, "counters have their own lines");
_Static_assert(sizeof(struct dm_homecoming) == 256, "a homecoming is four cache lines");
_Static_assert(offsetof(struct dm_host_entry, homecoming) % 64 == 0, "which are its own");
_Static_assert(sizeof(struct dm_intent) == 64, "an intent record is one cache line");
_Static_assert(sizeof(struct dm_ref_entry) == 128, "a Ref entry is two cache lines");
_Static_assert(sizeof(struct dm_service_slot) == DM_SERVICE_SLOT_BYTES, "a service slot");
_Static_assert(sizeof(struct dm_ref_wire) == 40, "a Ref on the wire");
_Static_assert(sizeof(struct dm_run) == 8, "a run");
_Static_assert(DM_NR_COUNTERS <= DM_COUNTER_SLOTS, "counters fit");

#endif
