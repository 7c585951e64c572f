/*
 * freelist.h - the frames this host owns with refcount 0. Host-local: the truth is in the device's frame words, this is
 * the index that makes taking a run cheap. Guarded by the host's lock. No I/O, no device access: tested alone.
 *
 *     quick      the last few freed runs, newest last, not merged: a run of the same length is taken back while
 *                its cache lines and page-table entries are still warm
 *     bits       one bit a frame; runs merge by lying side by side
 *     displaced  frames whose owned-window page is occupied by another frame's contents (copy-on-write put
 *                them there): good for copies and holes, not for identity mappings
 */
#ifndef DM_FREELIST_H
#define DM_FREELIST_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

#define DM_QUICK_RUNS 32u

struct dm_freelist {
    uint64_t *bits;
    uint64_t *displaced;
    uint32_t nr_frames;
    uint32_t nr_free; /* all three kinds */
    uint32_t nr_displaced;
    uint32_t nr_in_bits;
    uint32_t cursor; /* next-fit position in bits */
    uint32_t displaced_cursor;
    uint32_t nr_quick;
    struct dm_run quick[DM_QUICK_RUNS];
};

int dm_freelist_init(struct dm_freelist *fl, uint32_t nr_frames);
void dm_freelist_destroy(struct dm_freelist *fl);

/* Give frames to the list. They must not be in it. */
void dm_freelist_put(struct dm_freelist *fl, uint32_t pfn, uint32_t nr);
void dm_freelist_put_cold(struct dm_freelist *fl, uint32_t pfn, uint32_t nr);
void dm_freelist_put_displaced(struct dm_freelist *fl, uint32_t pfn);
/* The owned-window page of pfn is vacant again. */
void dm_freelist_vacated(struct dm_freelist *fl, uint32_t pfn);

/* Take a run of exactly nr frames; false when there is none. Never displaced frames. */
bool dm_freelist_take(struct dm_freelist *fl, uint32_t nr, uint32_t *pfn);
/* Take up to nr consecutive frames, at least one, displaced ones allowed; returns how many, 0 when empty. */
uint32_t dm_freelist_take_upto(struct dm_freelist *fl, uint32_t nr, uint32_t *pfn);
/* Take a run of up to nr frames that is least worth keeping: displaced first, then from bits, then the oldest quick run. */
uint32_t dm_freelist_evict(struct dm_freelist *fl, uint32_t nr, uint32_t *pfn);
bool dm_freelist_has(const struct dm_freelist *fl, uint32_t pfn);
/* Is any frame of the run in it? */
bool dm_freelist_overlaps(const struct dm_freelist *fl, uint32_t pfn, uint32_t nr);

#endif
