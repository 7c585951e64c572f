/*
 * dm.h - the DM layer's operations, as _native.pyx calls them. Everything is called with the host lock held (dm_lock,
 * dm_try_lock) unless it says otherwise.
 */
#ifndef DM_DM_H
#define DM_DM_H

#include "host.h"

#define DM_ALLOC_LAZY 0x1u
#define DM_MAP_COPY 0x1u
#define DM_MAP_RESERVE 0x2u
#define DM_MAP_VIEW 0x4u

struct dm_attach {
    int device_fd; /* the caller keeps its own */
    const char *fabric;
    const char *name;
    bool use_tcp;
    bool strict;
    bool reads_allocate; /* behave as on kernels older than 6.4 */
    bool user_mode_only;
    uint32_t low, high, batch; /* 0: the coordinator's choice */
    uint32_t copy_around;      /* pages, 1 and up */
    uint64_t deadline_ns;
};

/* attach.c. Context: no lock, GIL released. */
int dm_attach(const struct dm_attach *how, struct dm_host **out, struct dm_error *e);
int dm_detach(struct dm_host *h, struct dm_error *e);
bool dm_forked(const struct dm_host *h);
int dm_request(struct dm_host *h, uint16_t type, const void *payload, uint32_t length, void *reply,
               uint32_t reply_max, uint32_t *reply_length, uint64_t wait_ns, struct dm_error *e);

static inline bool dm_try_lock(struct dm_host *h) {
    if (pthread_mutex_trylock(&h->lock) != 0)
        return false;
    dm_enter(h);
    return true;
}
static inline void dm_lock(struct dm_host *h) {
    pthread_mutex_lock(&h->lock);
    dm_enter(h);
}
static inline void dm_unlock(struct dm_host *h) {
    dm_exit(h);
    pthread_mutex_unlock(&h->lock);
}
/* Wait for work, without being inside an operation. */
static inline void dm_wait_for_work(struct dm_host *h) {
    dm_exit(h);
    pthread_cond_wait(&h->work, &h->lock);
    dm_enter(h);
}

/* alloc.c */
int dm_ralloc(struct dm_host *h, uint64_t size, unsigned flags, bool may_block, uint32_t *id,
              struct dm_error *e);
void dm_zero(struct dm_host *h, uint32_t id);
int dm_rfree(struct dm_host *h, uint32_t id, struct dm_error *e);
void dm_pt_set(struct dm_host *h, uint32_t page, uint32_t pfn, uint32_t nr, uint32_t head);
void dm_pt_clear(struct dm_host *h, uint32_t page, uint32_t nr);
void dm_pt_set_holes(struct dm_host *h, uint32_t page, uint32_t nr, uint32_t head);
void dm_uncount_pages(struct dm_host *h, uint32_t page, uint32_t nr);
void dm_freed_add(struct dm_host *h, struct dm_run *run, uint32_t pfn);
void dm_freed_end(struct dm_host *h, struct dm_run *run);
static inline bool dm_too_many_free(const struct dm_host *h) {
    return h->free.nr_free > h->high + h->nr_reserved;
}
/* After a call that took or freed frames: let the supplier bring the free list between its watermarks. Never waits for
 * the coordinator. */
static inline void dm_balance(struct dm_host *h) {
    if (dm_too_many_free(h) && !h->wants_balance) {
        h->wants_balance = true;
        pthread_cond_signal(&h->work);
    } else if (h->ask_ahead && !h->wants_refill && dm_unpromised(h) < h->low &&
               dm_now_ns() >= h->no_refill_before_ns) {
        h->wants_refill = true;
        pthread_cond_signal(&h->work);
    }
}

/* share.c: create_ref */
int dm_create_ref(struct dm_host *h, uint64_t addr, uint64_t size, bool may_block,
                  struct dm_ref_wire *out, struct dm_error *e);
int dm_move_ref(struct dm_host *h, uint32_t id, bool may_block, struct dm_ref_wire *out,
                struct dm_error *e);

/* ref.c */
int dm_ref_check(struct dm_host *h, const struct dm_ref_wire *w, uint32_t *index, uint64_t *word,
                 struct dm_error *e);
int dm_ref_accept(struct dm_host *h, struct dm_ref_wire *w, bool anew, struct dm_error *e);
int dm_ref_clone(struct dm_host *h, struct dm_ref_wire *source, bool may_block,
                 struct dm_ref_wire *out, struct dm_error *e);
int dm_ref_drop(struct dm_host *h, const struct dm_ref_wire *w, struct dm_error *e);
bool dm_ref_held(struct dm_host *h, const void *bytes); /* needs no lock */
uint64_t dm_refs_drop(struct dm_host *h, const void *bytes, size_t nr, bool *busy);
void dm_ref_wire_of(const struct dm_host *h, uint32_t index, struct dm_ref_wire *out);
/* Relaxed, for others may be looking whether stale bytes fit; see dm_ref_check. */
static inline void dm_ref_set_length(struct dm_ref_entry *entry, uint64_t length) {
    __atomic_store_n(&entry->length, length, __ATOMIC_RELAXED);
}
int dm_ref_slot(struct dm_host *h, uint32_t *index, struct dm_error *e);
void dm_ref_slot_undo(struct dm_host *h, uint32_t index);
int dm_ref_store_runs(struct dm_host *h, uint32_t index, const struct dm_run *runs,
                      uint32_t nr_runs, bool may_block, struct dm_error *e);
void dm_ref_publish(struct dm_host *h, uint32_t index, uint8_t flags, struct dm_ref_wire *out);
void dm_ref_free_overflow(struct dm_host *h, struct dm_ref_entry *entry);
uint64_t dm_ref_make_free(struct dm_host *h, uint32_t index);
int dm_ref_wire_check(const struct dm_ref_wire *w, uint64_t fabric_id, struct dm_error *e);
void dm_ref_release(struct dm_host *h, uint32_t index);

/* The runs of a Ref, copied out: small lists live in the struct. */
struct dm_runs {
    struct dm_run *list;
    uint32_t nr, max;
    struct dm_run small[16];
};
void dm_runs_init(struct dm_runs *r);
int dm_runs_add(struct dm_runs *r, uint32_t pfn, uint32_t count);
void dm_runs_free(struct dm_runs *r);
int dm_runs_of_entry(const struct dm_ref_entry *entry, const char *physmap, uint32_t page_shift,
                     uint32_t nr_frames, struct dm_runs *r);

/* map.c: map_ref */
int dm_map_ref(struct dm_host *h, const struct dm_ref_wire *w, unsigned flags, bool may_block,
               uint32_t *id, struct dm_error *e);

bool dm_window_vacant(const struct dm_host *h, uint32_t page, uint32_t nr);
void dm_map_commit(struct dm_host *h, uint32_t index, uint32_t page, uint32_t nr,
                   const struct dm_runs *runs);

/* view.c: view_ref */
int dm_view_new(struct dm_host *h, uint32_t index, uint64_t before, uint32_t page, bool exclusive,
                uint32_t *id, struct dm_error *e);
void dm_view_materialise(struct dm_host *h, uint32_t id);
void dm_view_free(struct dm_host *h, uint32_t id);
int dm_view_move(struct dm_host *h, uint32_t id, struct dm_ref_wire *out, struct dm_error *e);
static inline int dm_view_ref(struct dm_host *h, const struct dm_ref_wire *w, bool may_block,
                              uint32_t *id, struct dm_error *e) {
    return dm_map_ref(h, w, DM_MAP_VIEW, may_block, id, e);
}

/* Status of dm_ref_* when another host is just cloning the Ref: try again without the lock. */
#define DM_REF_BUSY (-91)

#endif
