/*
 * host.h - the DM layer of one host, as its parts see it.
 *
 * Locks. `lock` guards everything in struct dm_host but the atomics. It is held over short work only: never while
 * waiting for the GIL, for the coordinator, or while touching a page of the windows (the layer copies through the
 * physmap). The fault handler takes it too, so a thread may hold the GIL while waiting for it: its holders never
 * need the GIL. `link_lock` guards the API threads' connection; it is taken with `lock` free.
 *
 * Addresses. One reservation holds the three registered views; a page number is an index from its start, and into
 * the host's page table:
 *
 *     page 0            nr_frames          2 * nr_frames            nr_ptes
 *     |  owned window   |  shared window   |  VMA area              |
 */
#ifndef DM_HOST_H
#define DM_HOST_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "crash.h"
#include "device.h"
#include "freelist.h"
#include "latency.h"
#include "layout.h"
#include "status.h"
#include "wire.h"

/* What the kernel shows at a page, kept so that no call is made twice. */
#define DM_KS_PROTECTED 0x01u /* write-protected */
#define DM_KS_REMAPPED 0x02u  /* shows another frame than its area normally does */
#define DM_KS_UNREGISTERED 0x04u

/* shown[page]: 0 when the page shows what its area normally shows (its own frame; nothing in the VMA area). */
#define DM_SHOWN(pfn) ((pfn) + 1)
#define DM_SHOWN_HOLE 0xffffffffu

#define DM_VMA_EXCLUSIVE 0x01u /* no other holder of any frame; known, not guessed */
#define DM_VMA_DIRTY 0x02u     /* some page is not in its window's normal state */
#define DM_VMA_HOLES 0x04u     /* some page may have no frame */
#define DM_VMA_VIEW 0x08u      /* no page-table entries: its counts are with its Ref, see view.c */
#define DM_VMA_USED 0x80u

#define DM_NO_VMA 0u

#define DM_BELL_BYTES 4096u
#define DM_REF_RING 256u

struct dm_vma { /* one mapping: what ralloc, map_ref or view_ref returned */
    uint32_t page;
    uint32_t nr_pages;
    uint64_t length; /* bytes the user asked for */
    uint32_t page_offset;
    uint32_t flags;
    uint32_t next_fault;   /* page after the last one that a fault made writable */
    uint32_t fault_window; /* pages to do at the next sequential fault */
    uint32_t reserved;     /* frames promised to this mapping's later writes */
    uint32_t next_free;
    uint16_t
        home;     /* exclusive, came in a Ref: who made that; 0: frames stay where they are freed */
    uint32_t ref; /* of a view: the entry of its Ref, */
    uint64_t ref_state; /* and the word that is in it as long as nobody interferes */
    void *buffer;       /* borrowed PyObject*, for the layer above; the DM layer never touches it */
};

struct dm_extent { /* free pages of the VMA area */
    uint32_t page;
    uint32_t nr;
};

struct dm_link { /* a request/response connection to the coordinator */
    int fd;
    uint64_t dev, ino; /* of fd: a descriptor that was closed and reused is noticed */
    uint64_t next_request;
    bool
        reopened; /* took the place of a connection that broke; cleared by whoever looks for what was lost */
    uint64_t epoch;                 /* of the coordinator that answered HELLO; 0: never connected */
    const struct dm_superblock *sb; /* says whether that one still is the fabric's */
    void (*between)(void *); /* called now and then while waiting for an answer; may be NULL */
    void *between_arg;
};

struct dm_host {
    struct dm_host *next_host; /* under attach.c's list lock */

    /* set at attach, constant */
    struct dm_device device; /* the physmap is its mapping of the data area */
    struct dm_superblock *sb;
    struct dm_host_entry *entry;
    struct dm_ref_entry *refs;
    uint64_t *frames; /* atomic words */
    uint32_t *pt;     /* this host's page table */
    char *physmap;
    char *base; /* first page of the owned window */
    uint32_t page_shift;
    uint32_t nr_frames;
    uint32_t nr_ptes;
    uint32_t max_refs;
    uint16_t id;
    bool strict;
    bool use_tcp;
    bool ask_ahead;      /* a low watermark was wished for */
    bool reads_allocate; /* kernel without WP_UNPOPULATED: reading a hole takes a frame */
    uint64_t incarnation;
    uint64_t fabric_id;
    size_t data_off;
    uint32_t low, batch_max, batch_min;
    uint32_t copy_around; /* most pages that one fault copies */
    uint64_t deadline_ns; /* longest wait for the coordinator */
    unsigned fork_generation;
    char name[DM_NAME_BYTES];
    char fabric[DM_NAME_BYTES];
    struct dm_latency latency; /* of slower memory; off by default */

    int device_fd, uffd;
    uint64_t device_dev, device_ino, uffd_dev, uffd_ino;

    pthread_mutex_t lock;
    pthread_mutex_t link_lock;
    struct dm_link link;

    /* under lock */
    struct dm_freelist free;
    uint32_t nr_reserved; /* frames of the free list promised to mappings */
    uint32_t batch;       /* what to ask for next */
    uint32_t high;        /* above it: give back */
    uint32_t hints_seen;  /* of the entry's homecoming */
    uint32_t nr_out;  /* frames given away in Refs that were moved, and not made up for: home.c */
    uint8_t *kstate;  /* DM_KS_* per page */
    uint32_t *shown;  /* frame the kernel shows per page, see DM_SHOWN */
    uint32_t *vma_of; /* vma id per page of a mapping */
    struct dm_vma *vmas; /* slot 0 unused */
    uint32_t nr_vma_slots, vma_free, nr_vmas;
    struct dm_extent *extents;
    uint32_t nr_extents, max_extents;
    uint32_t vm_pieces, vm_piece_limit;
    uint32_t ref_cursor, ref_ring_at;
    uint32_t ref_ring[DM_REF_RING]; /* entries taken lately, oldest at ref_ring_at */
    uint64_t nonce_key[2], nonce_counter;
    bool closed;
    bool wants_balance; /* more free frames than it should sit on: for the supplier */
    bool wants_refill;  /* fewer than the low watermark */
    uint64_t no_refill_before_ns;
    pthread_cond_t work; /* the supplier waits for it */

    /* fault handler */
    pthread_t handler, watcher;
    pthread_mutex_t handler_alive; /* robust; held by the handler for its whole life */
    int guard_fd;                  /* in the handler's own descriptor table */
    char *bell;                    /* a page whose first store wakes the handler */
    _Atomic int handler_state;     /* 0 starting, 1 serving, 2 to stop, 3 stopped, < 0: errno */
    _Atomic int handler_tid;
    _Atomic bool fenced;
};

/* The host lock was taken, or is about to be given back: others can see whether an operation is under way (layout.h,
 * `activity`). On the stores' order depends who may conclude what: odd before anything changes, even after all has. */
static inline void dm_enter(struct dm_host *h) {
    if (!h->entry)
        return;
    __atomic_store_n(&h->entry->activity, h->entry->activity + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
}
static inline void dm_exit(struct dm_host *h) {
    if (h->entry)
        __atomic_store_n(&h->entry->activity, h->entry->activity + 1, __ATOMIC_RELEASE);
}

#define DM_COUNT(h, name, n) ((h)->entry->counters[DM_CNT_##name] += (n))

static inline uint32_t dm_page_of(const struct dm_host *h, uint64_t addr) {
    return (uint32_t)((addr - (uint64_t)(uintptr_t)h->base) >> h->page_shift);
}
static inline uint64_t dm_addr_of(const struct dm_host *h, uint32_t page) {
    return (uint64_t)(uintptr_t)h->base + ((uint64_t)page << h->page_shift);
}
static inline bool dm_addr_inside(const struct dm_host *h, uint64_t addr) {
    return addr - (uint64_t)(uintptr_t)h->base < (uint64_t)h->nr_ptes << h->page_shift;
}
static inline char *dm_frame_data(const struct dm_host *h, uint32_t pfn) {
    return h->physmap + ((uint64_t)pfn << h->page_shift);
}
/* The frame that a window page shows in its normal state; VMA-area pages have none. */
static inline uint32_t dm_identity(const struct dm_host *h, uint32_t page) {
    if (page < h->nr_frames)
        return page;
    return page < 2 * h->nr_frames ? page - h->nr_frames : DM_NO_FRAME;
}
static inline uint8_t dm_normal_kstate(const struct dm_host *h, uint32_t page) {
    return page >= h->nr_frames && page < 2 * h->nr_frames ? DM_KS_PROTECTED : 0;
}

/* Tables of four bytes a page are read and filled 16 bytes at a time: the loops that the steady state runs for every
 * page of a buffer that nobody looks at. */
typedef uint32_t dm_quad __attribute__((vector_size(16), aligned(4), may_alias));

static inline void dm_fill(uint32_t *table, uint32_t value, uint32_t nr) {
    const dm_quad four = {value, value, value, value};
    uint32_t i = 0;
    for (; i + 4 <= nr; i += 4)
        *(dm_quad *)(table + i) = four;
    for (; i < nr; i++)
        table[i] = value;
}

static inline bool dm_all_zero(const uint32_t *table, uint32_t nr) {
    dm_quad any = {0};
    uint32_t i = 0, rest = 0;
    for (; i + 4 <= nr; i += 4)
        any |= *(const dm_quad *)(table + i);
    for (; i < nr; i++)
        rest |= table[i];
    return (any[0] | any[1] | any[2] | any[3] | rest) == 0;
}

/* Which table words are of, for dm_latency_words. */
#define DM_FRAME_WORDS 0u
#define DM_REF_WORDS 1u
static inline void dm_charge_frames(struct dm_host *h, uint32_t pfn, uint32_t nr) {
    dm_latency_words(&h->latency, DM_FRAME_WORDS, pfn, nr);
}
#define DM_WORDS_PER_REF (sizeof(struct dm_ref_entry) / 8)
static inline void dm_charge_ref(struct dm_host *h, uint32_t index) {
    dm_latency_words(&h->latency, DM_REF_WORDS, index * DM_WORDS_PER_REF, DM_WORDS_PER_REF);
}

/* +1. Relaxed: the caller holds a count through a mapping or a Ref, so the frame cannot go away meanwhile. */
static inline int dm_count_up(struct dm_host *h, uint32_t pfn) {
    uint64_t before = __atomic_fetch_add(&h->frames[pfn], 1, __ATOMIC_RELAXED);
    dm_charge_frames(h, pfn, 1);
    if (__builtin_expect(dm_frame_refcount(before) < DM_REFCOUNT_MAX, 1))
        return DM_OK;
    DM_CRASH_POINT(frame_overcounted);
    __atomic_fetch_sub(&h->frames[pfn], 1, __ATOMIC_RELAXED);
    DM_CRASH_POINT(frame_counted_down);
    return DM_ERR_TOO_MANY_REFS;
}

/* ---- error.c */
int dm_fail(struct dm_error *e, int status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
int dm_fail_sys(struct dm_error *e, const char *syscall, uint64_t address);
void dm_fatal(struct dm_host *h, const char *fmt, ...)
    __attribute__((format(printf, 2, 3), noreturn));
uint64_t dm_now_ns(void);
int dm_descriptor_check(int fd, uint64_t dev, uint64_t ino);

/* ---- intent.h is inline; see there */

/* ---- counts.c: frame words */
/* Frame words are shared with other hosts and often cold, and an atomic waits for its line alone: to prefetch. */
#define DM_COUNTS_AHEAD 96
void dm_frames_enter_use(struct dm_host *h, uint32_t pfn, uint32_t nr);
void dm_frames_leave_use(struct dm_host *h, uint32_t pfn, uint32_t nr);
bool dm_count_down(struct dm_host *h, uint32_t pfn);
void dm_frame_freed(struct dm_host *h, uint32_t pfn, uint32_t nr);
bool dm_all_exclusive(struct dm_host *h, const struct dm_run *runs, uint32_t nr_runs);

/* ---- supply.c: frames from and to the coordinator */
int dm_take_run(struct dm_host *h, uint32_t nr, bool may_block, uint32_t *pfn, struct dm_error *e);
uint32_t dm_unpromised(const struct dm_host *h);
int dm_take_one(struct dm_host *h, bool may_block, uint32_t *pfn, struct dm_error *e);
int dm_take_upto(struct dm_host *h, uint32_t nr, uint32_t reserved, struct dm_run *run);
int dm_refill(struct dm_host *h, struct dm_link *l, uint32_t need, uint32_t min_run,
              struct dm_error *e);
int dm_give_back(struct dm_host *h, struct dm_link *l, uint32_t keep, struct dm_error *e);
int dm_give_back_none(struct dm_host *h, struct dm_link *l, struct dm_error *e);
void dm_rescan_owned(struct dm_host *h);
void dm_add_owned(struct dm_host *h, const struct dm_run *runs, uint32_t nr_runs);

/* ---- home.c: frames that other hosts freed */
void dm_gave_away(struct dm_host *h, uint32_t nr);
bool dm_send_home(struct dm_host *h, uint16_t to, uint32_t pfn, uint32_t nr);
void dm_leave_hint(struct dm_host_entry *home, uint32_t pfn, uint32_t nr);
bool dm_take_in(struct dm_host *h, uint32_t pfn);
void dm_take_hints(struct dm_host *h);
bool dm_search_home(struct dm_host *h);
void dm_all_home(struct dm_host *h);
static inline void dm_welcome_home(struct dm_host *h) {
    if (__builtin_expect(
            __atomic_load_n(&h->entry->homecoming.nr_hints, __ATOMIC_RELAXED) != h->hints_seen, 0))
        dm_take_hints(h);
}

/* ---- vma.c: mappings and the VMA area's address space */
uint32_t dm_vma_new(struct dm_host *h, uint32_t page, uint32_t nr_pages, uint64_t length,
                    uint32_t page_offset, uint32_t flags);
void dm_vma_delete(struct dm_host *h, uint32_t id);
uint32_t dm_vma_at(const struct dm_host *h, uint64_t addr);
uint32_t dm_area_take(struct dm_host *h, uint32_t nr);
int dm_area_give(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e);

/* ---- window.c: what the kernel shows */
int dm_protect(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e);
int dm_unprotect(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e);
int dm_make_ready(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e);
int dm_show(struct dm_host *h, uint32_t page, uint32_t pfn, uint32_t nr, bool populate,
            struct dm_error *e);
int dm_show_holes(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e);
int dm_restore(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e);
int dm_wake(struct dm_host *h, uint32_t page, uint32_t nr);
uint32_t dm_pieces_chunk(const struct dm_host *h);

/* ---- link.c */
int dm_link_open(struct dm_link *l, struct dm_host *h, bool unix_only, uint64_t deadline,
                 struct dm_error *e);
void dm_link_close(struct dm_link *l);
int dm_link_request(struct dm_link *l, struct dm_host *h, uint16_t type, const void *payload,
                    uint32_t length, void *reply, uint32_t reply_max, uint32_t *reply_length,
                    uint64_t deadline, struct dm_error *e);
int dm_guard_open(struct dm_host *h, struct dm_error *e);

/* ---- handler.c */
int dm_handler_start(struct dm_host *h, struct dm_error *e);
void dm_handler_stop(struct dm_host *h);

#endif
