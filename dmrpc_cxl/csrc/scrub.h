/*
 * scrub.h - accounting for every frame while the fabric runs, in slices, and repairing what is wrong for certain.
 *
 * A look goes through the page tables, the Refs and the frame words, as audit.c does, but a piece at a time. Hosts go on
 * meanwhile, so a look proves nothing: a frame that moves from what was not looked at yet to what was looks lost. Three
 * sieves follow, each finer than the one before.
 *
 *   1. A frame is suspect when its count is not what the look added up, or when a host owns it that is not attached.
 *   2. A suspect that the next look does not find again, with the same word and the same sum, is dropped.
 *   3. dm_scrub_settle counts once more what holds the suspects, and those alone. If during that no host was inside an
 *      operation (`activity` even and unchanged, no intent, no Ref in transition, nobody being reclaimed), the
 *      count was exact. Otherwise nothing is known, and it is tried again later.
 *
 * What is repaired is a difference, never a value: n counts too many are taken off by compare-and-swap, whatever holders
 * have done in between; a count that belongs to nobody can be dropped by nobody else. A frame that something still
 * holds keeps what holds it. A count too few is reported and left alone.
 *
 * A Ref is an orphan when its holder is no host that is attached: recovery drops all Refs of a host before its entry is
 * FREE, so nobody would ever look for this one again. Its word proves it, at two looks the same: the generation grows
 * with each holder. It holds nothing: its frames are suspects as if it were not there. dm_scrub_settle frees the
 * entry, by compare-and-swap from that word, before it counts what holds the suspects. Whoever accepts the Ref at
 * that moment wins, and is counted.
 *
 * Context: one thread at a time for each dm_scrub. No locks, no GIL.
 */
#ifndef DM_SCRUB_H
#define DM_SCRUB_H

#include "device.h"

#define DM_SCRUB_MAX_SUSPECTS 4096u
#define DM_SCRUB_MAX_ORPHANS 256u

enum dm_scrub_kind {
    DM_SCRUB_LEAKED = 1,    /* counts that nothing holds */
    DM_SCRUB_MISSING = 2,   /* held more often than it is counted: may be handed out twice */
    DM_SCRUB_ORPHAN = 3,    /* free, and owned by a host that is not attached */
    DM_SCRUB_BAD_OWNER = 4, /* owned by a host that cannot exist */
};

struct dm_suspect {
    uint32_t pfn;
    uint32_t expected; /* what mappings and Refs add up to */
    uint64_t word;
    uint32_t kind;    /* enum dm_scrub_kind */
    uint32_t looks;   /* in how many looks in a row */
    uint32_t settled; /* 1: certain; 2: and repaired */
    uint32_t host;    /* 0, or the host whose intent record names the frame */
    uint32_t op;      /* what that host was doing, or did when it died */
};

struct dm_orphan { /* a Ref that nobody holds */
    uint32_t entry;
    uint32_t looks, settled; /* as above */
    uint64_t word;
};

struct dm_scrub_look { /* the accounting of one look */
    uint64_t pool, free, in_use, mapped_pages, hole_pages, refs, ref_pages, bad_entries, in_flight;
};

struct dm_scrub {
    const struct dm_device *dev;
    uint32_t *expected;
    uint8_t *page;
    uint32_t phase, host;
    uint64_t at;
    struct dm_scrub_look look, last; /* the one under way, the one completed */
    uint64_t nr_looks;
    struct dm_suspect suspects[DM_SCRUB_MAX_SUSPECTS]; /* of the last look, by pfn */
    uint32_t nr_suspects;
    uint32_t nr_overflowed,
        nr_overlooked; /* too many to keep: of the last look, of the one under way */
    struct dm_suspect found[DM_SCRUB_MAX_SUSPECTS]; /* of the look under way */
    uint32_t nr_found;
    struct dm_orphan orphans[DM_SCRUB_MAX_ORPHANS]; /* of the last look, by entry */
    uint32_t nr_orphans;
    struct dm_orphan orphans_found[DM_SCRUB_MAX_ORPHANS]; /* of the look under way */
    uint32_t nr_orphans_found;
    char bad_entry[192]; /* the first one of the last look */
    char bad_entry_found[192];
};

int dm_scrub_new(const struct dm_device *dev, struct dm_scrub **out, struct dm_error *err);
void dm_scrub_free(struct dm_scrub *s);
int dm_scrub_step(struct dm_scrub *s, uint64_t budget_ns, bool *done, struct dm_error *err);
int dm_scrub_settle(struct dm_scrub *s, struct dm_device *dev, uint32_t min_looks, bool repair,
                    bool *quiet, struct dm_error *err);

uint32_t dm_scrub_forget_refs(struct dm_device *dev);

#endif
