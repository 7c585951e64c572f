/* scrub.c - see scrub.h. What is read from the device is not trusted: bad numbers are reported, never followed. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "scrub.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "device_private.h"

enum { PAGES, REFS, FRAMES };
#define STEP_ENTRIES 4096u /* looked at between two looks at the clock */

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int dm_scrub_new(const struct dm_device *dev, struct dm_scrub **out, struct dm_error *err) {
    struct dm_scrub *s = calloc(1, sizeof *s);
    if (s) {
        s->dev = dev;
        s->expected = calloc(dev->geo.nr_frames, sizeof *s->expected);
        s->page = malloc(dev->geo.page_size);
        s->host = 1;
    }
    if (!s || !s->expected || !s->page) {
        dm_scrub_free(s);
        return dm_device_fail(err, DM_ERR_NO_MEMORY, "no memory to account for %llu frames",
                              (unsigned long long)dev->geo.nr_frames);
    }
    *out = s;
    return DM_OK;
}

void dm_scrub_free(struct dm_scrub *s) {
    if (!s)
        return;
    free(s->expected);
    free(s->page);
    free(s);
}

static void bad_entry(struct dm_scrub *s, const char *what, uint64_t number) {
    if (s->look.bad_entries++ == 0)
        snprintf(s->bad_entry_found, sizeof s->bad_entry_found, "%s %llu", what,
                 (unsigned long long)number);
}

/* ---------------------------------------------------------------- what holds frames */

typedef void (*hold)(void *arg, uint32_t pfn, uint32_t nr);

/* Call `fn` for every run of a Ref entry, overflow frames included. False: the entry makes no sense. */
static bool runs_of_ref(const struct dm_device *dev, uint8_t *page, const struct dm_ref_entry *ref,
                        hold fn, void *arg) {
    const struct dm_ref_overflow *over = (const struct dm_ref_overflow *)page;
    const uint64_t bytes = dev->geo.page_size, nr_frames = dev->geo.nr_frames;
    const uint32_t cap = (uint32_t)((bytes - sizeof *over) / sizeof(struct dm_run));
    const struct dm_run *runs = ref->runs;
    uint32_t left = ref->nr_runs, link = ref->overflow, links = 0;
    uint32_t nr = left < DM_REF_INLINE_RUNS ? left : DM_REF_INLINE_RUNS;
    for (;;) {
        for (uint32_t i = 0; i < nr; i++) {
            if (runs[i].pfn == DM_NO_FRAME)
                continue;
            if (runs[i].pfn >= nr_frames || runs[i].count > nr_frames - runs[i].pfn)
                return false;
            fn(arg, runs[i].pfn, runs[i].count);
        }
        left -= nr;
        if (links == ref->nr_overflow)
            return left == 0;
        if (link == 0 || link > nr_frames)
            return false;
        fn(arg, link - 1, 1);
        off_t off = (off_t)(dev->geo.data_off + (uint64_t)(link - 1) * bytes);
        if (pread(dev->fd, page, bytes, off) != (ssize_t)bytes || over->nr_runs > cap ||
            over->nr_runs > left)
            return false;
        runs = over->runs;
        nr = over->nr_runs;
        link = over->next;
        links++;
    }
}

static bool attached(const struct dm_device *dev, uint32_t host) {
    return host >= 1 && host <= dev->geo.max_hosts &&
           __atomic_load_n(&dev->hosts[host - 1].state, __ATOMIC_ACQUIRE) != DM_HOST_FREE;
}

/* Is a Ref in this state nobody's? The word is read again behind the host's state: its holder was none at that moment. */
static bool is_orphan(const struct dm_device *dev, uint32_t index, uint64_t word) {
    return dm_ref_state(word) != DM_REF_FREE && !attached(dev, dm_ref_holder(word)) &&
           __atomic_load_n(&dev->refs[index].state, __ATOMIC_ACQUIRE) == word;
}

static bool holds_counts(uint8_t state) { return state >= DM_REF_LIVE && state <= DM_REF_CLONING; }

static void add_expected(void *arg, uint32_t pfn, uint32_t nr) {
    struct dm_scrub *s = arg;
    s->look.ref_pages += nr;
    for (uint32_t i = 0; i < nr; i++)
        s->expected[pfn + i]++;
}

static void note_orphan(struct dm_scrub *s, uint32_t index, uint64_t word) {
    if (s->nr_orphans_found < DM_SCRUB_MAX_ORPHANS)
        s->orphans_found[s->nr_orphans_found++] =
            (struct dm_orphan){.entry = index, .word = word, .looks = 1};
    else
        s->nr_overlooked++;
}

static void look_at_ref(struct dm_scrub *s, uint32_t index) {
    struct dm_ref_entry ref;
    uint64_t word = __atomic_load_n(&s->dev->refs[index].state, __ATOMIC_ACQUIRE);
    if (dm_ref_state(word) == DM_REF_FREE)
        return;
    if (is_orphan(s->dev, index, word)) {
        note_orphan(s, index, word);
        return;
    }
    if (!dm_device_ref(s->dev, index, &ref)) {
        s->look.in_flight++;
        return;
    }
    uint8_t state = dm_ref_state(ref.state);
    if (state != DM_REF_LIVE)
        s->look.in_flight += state != DM_REF_FREE;
    else
        s->look.refs++;
    if (state > DM_REF_CLONING ||
        (holds_counts(state) && !runs_of_ref(s->dev, s->page, &ref, add_expected, s)))
        bad_entry(s, "Ref entry", index);
}

/* ---------------------------------------------------------------- a look, in steps */

static uint32_t judge(const struct dm_device *dev, uint64_t word, uint32_t expected) {
    uint32_t count = dm_frame_refcount(word), owner = dm_frame_owner(word);
    if (count > expected)
        return DM_SCRUB_LEAKED;
    if (count < expected)
        return DM_SCRUB_MISSING;
    if (count == 0 && owner > dev->geo.max_hosts)
        return DM_SCRUB_BAD_OWNER;
    if (count == 0 && owner != DM_OWNER_POOL && !attached(dev, owner))
        return DM_SCRUB_ORPHAN;
    return 0;
}

static void look_at_frame(struct dm_scrub *s, uint32_t pfn) {
    uint64_t word = __atomic_load_n(s->dev->frames + pfn, __ATOMIC_ACQUIRE);
    if (dm_frame_refcount(word))
        s->look.in_use++;
    else if (dm_frame_owner(word) == DM_OWNER_POOL)
        s->look.pool++;
    else
        s->look.free++;
    uint32_t kind = judge(s->dev, word, s->expected[pfn]);
    s->expected[pfn] = 0; /* for the next look */
    if (!kind)
        return;
    if (s->nr_found == DM_SCRUB_MAX_SUSPECTS) {
        s->nr_overlooked++;
        return;
    }
    s->found[s->nr_found++] =
        (struct dm_suspect){.pfn = pfn, .word = word, .kind = kind, .looks = 1};
}

static void look_at_pte(struct dm_scrub *s, uint32_t pte) {
    uint32_t pfn = pte & DM_PTE_PFN;
    if (pte & DM_PTE_HOLE) {
        s->look.hole_pages++;
    } else if (!(pte & DM_PTE_PRESENT) || pfn >= s->dev->geo.nr_frames) {
        bad_entry(s, "page-table entry of host", s->host);
    } else {
        s->look.mapped_pages++;
        s->expected[pfn]++;
    }
}

/* One piece of host s->host's page table from entry s->at on, as far as it was ever touched. */
static int step_pages(struct dm_scrub *s, struct dm_error *err) {
    const struct dm_device *dev = s->dev;
    const uint64_t table = dev->geo.ptes_per_host * sizeof(uint32_t);
    if (s->host > dev->geo.max_hosts) {
        s->phase = REFS;
        s->at = 0;
        return DM_OK;
    }
    const struct dm_host_entry *entry = dev->hosts + s->host - 1;
    if (s->at == 0) {
        if (!attached(dev, s->host)) {
            s->host++;
            return DM_OK;
        }
        s->look.in_flight += entry->intent.op != DM_INTENT_NONE;
    }
    const uint64_t start = dev->geo.page_table_off + (uint64_t)(s->host - 1) * table;
    off_t data = lseek(dev->fd, (off_t)(start + s->at * sizeof(uint32_t)), SEEK_DATA);
    if (data < 0 && errno != ENXIO)
        return dm_device_fail_sys(err, "lseek", "walk a host's page table");
    uint64_t first = data < 0 ? UINT64_MAX : ((uint64_t)data - start) / sizeof(uint32_t);
    if (data < 0 || first >= dev->geo.ptes_per_host) {
        s->host++;
        s->at = 0;
        return DM_OK;
    }
    off_t hole = lseek(dev->fd, data, SEEK_HOLE);
    uint64_t end = hole < 0 ? first + STEP_ENTRIES : ((uint64_t)hole - start) / sizeof(uint32_t);
    if (end > first + STEP_ENTRIES)
        end = first + STEP_ENTRIES;
    if (end > dev->geo.ptes_per_host)
        end = dev->geo.ptes_per_host;
    const uint32_t *ptes = dm_device_ptes(dev, s->host);
    for (uint64_t page = first; page < end; page++) {
        uint32_t pte = __atomic_load_n(ptes + page, __ATOMIC_RELAXED);
        if (pte)
            look_at_pte(s, pte);
    }
    s->at = end;
    if (s->at >= dev->geo.ptes_per_host) {
        s->host++;
        s->at = 0;
    }
    return DM_OK;
}

static void end_look_at_refs(struct dm_scrub *s) {
    uint32_t old = 0;
    for (uint32_t i = 0; i < s->nr_orphans_found; i++) {
        struct dm_orphan *f = s->orphans_found + i;
        while (old < s->nr_orphans && s->orphans[old].entry < f->entry)
            old++;
        if (old < s->nr_orphans && s->orphans[old].entry == f->entry &&
            s->orphans[old].word == f->word)
            f->looks = s->orphans[old].looks + 1;
    }
    memcpy(s->orphans, s->orphans_found, s->nr_orphans_found * sizeof *s->orphans_found);
    s->nr_orphans = s->nr_orphans_found;
    s->nr_orphans_found = 0;
}

/* Keep of the suspects those that the look before had as well, exactly so. */
static void end_look(struct dm_scrub *s) {
    end_look_at_refs(s);
    uint32_t old = 0;
    for (uint32_t i = 0; i < s->nr_found; i++) {
        struct dm_suspect *f = s->found + i;
        while (old < s->nr_suspects && s->suspects[old].pfn < f->pfn)
            old++;
        if (old == s->nr_suspects)
            break;
        const struct dm_suspect *o = s->suspects + old;
        if (o->pfn == f->pfn && o->word == f->word && o->kind == f->kind)
            f->looks = o->looks + 1;
    }
    memcpy(s->suspects, s->found, s->nr_found * sizeof *s->found);
    s->nr_suspects = s->nr_found;
    s->nr_overflowed = s->nr_overlooked;
    s->nr_overlooked = 0;
    s->last = s->look;
    memcpy(s->bad_entry, s->bad_entry_found, sizeof s->bad_entry);
    s->bad_entry_found[0] = 0;
    memset(&s->look, 0, sizeof s->look);
    s->nr_looks++;
    s->nr_found = 0;
    s->phase = PAGES;
    s->host = 1;
    s->at = 0;
}

/*
 * Go on with the look for about budget_ns; *done says that it is complete: `last` and `suspects` are its results.
 * Returns DM_OK or DM_ERR_SYSTEM.
 */
int dm_scrub_step(struct dm_scrub *s, uint64_t budget_ns, bool *done, struct dm_error *err) {
    uint64_t end = now_ns() + budget_ns;
    *done = false;
    do {
        if (s->phase == PAGES) {
            int status = step_pages(s, err);
            if (status != DM_OK)
                return status;
        } else if (s->phase == REFS) {
            for (uint32_t i = 0; i < STEP_ENTRIES / 4 && s->at < s->dev->geo.max_refs; i++)
                look_at_ref(s, (uint32_t)s->at++);
            if (s->at >= s->dev->geo.max_refs) {
                s->phase = FRAMES;
                s->at = 0;
            }
        } else {
            for (uint32_t i = 0; i < STEP_ENTRIES && s->at < s->dev->geo.nr_frames; i++)
                look_at_frame(s, (uint32_t)s->at++);
            if (s->at >= s->dev->geo.nr_frames) {
                end_look(s);
                *done = true;
                return DM_OK;
            }
        }
    } while (now_ns() < end);
    return DM_OK;
}

/* ---------------------------------------------------------------- certainty */

struct settling {
    struct dm_scrub *s;
    const struct dm_device *dev;
    uint64_t *activity; /* [max_hosts] */
    uint32_t
        *index; /* pfn -> suspect + 1, by a table of all frames: s->expected, all 0 between looks */
};

/* Note every attached host's activity. False: one is inside an operation, or being reclaimed. */
static bool all_idle(const struct dm_device *dev, uint64_t *activity, bool compare) {
    for (uint32_t i = 0; i < dev->geo.max_hosts; i++) {
        const struct dm_host_entry *entry = dev->hosts + i;
        uint32_t state = __atomic_load_n(&entry->state, __ATOMIC_ACQUIRE);
        uint64_t now = 1; /* stands for no host: odd, so no activity that counts */
        if (state != DM_HOST_FREE) {
            now = __atomic_load_n(&entry->activity, __ATOMIC_ACQUIRE);
            if (state != DM_HOST_ACTIVE || now % 2 ||
                __atomic_load_n(&entry->intent.op, __ATOMIC_ACQUIRE) != DM_INTENT_NONE)
                return false;
        }
        if (compare && activity[i] != now)
            return false;
        activity[i] = now;
    }
    return true;
}

static void add_suspect(void *arg, uint32_t pfn, uint32_t nr) {
    struct settling *t = arg;
    for (uint32_t i = 0; i < nr; i++)
        if (t->index[pfn + i])
            t->s->suspects[t->index[pfn + i] - 1].expected++;
}

/* Count what holds the suspects. False: something was seen on its way. */
static bool count_suspects(struct settling *t) {
    const struct dm_device *dev = t->dev;
    const uint64_t table = dev->geo.ptes_per_host * sizeof(uint32_t);
    for (uint32_t host = 1; host <= dev->geo.max_hosts; host++) {
        if (!attached(dev, host))
            continue;
        const uint64_t start = dev->geo.page_table_off + (uint64_t)(host - 1) * table;
        const uint32_t *ptes = dm_device_ptes(dev, host);
        for (uint64_t at = start; at < start + table;) {
            off_t data = lseek(dev->fd, (off_t)at, SEEK_DATA);
            if (data < 0 || (uint64_t)data >= start + table)
                break;
            off_t hole = lseek(dev->fd, data, SEEK_HOLE);
            if (hole < 0)
                return false;
            at = (uint64_t)hole < start + table ? (uint64_t)hole : start + table;
            for (uint64_t p = ((uint64_t)data - start) / 4; p < (at - start) / 4; p++) {
                uint32_t pte = __atomic_load_n(ptes + p, __ATOMIC_RELAXED);
                if (pte & DM_PTE_PRESENT && (pte & DM_PTE_PFN) < dev->geo.nr_frames)
                    add_suspect(t, pte & DM_PTE_PFN, 1);
            }
        }
    }
    for (uint32_t i = 0; i < dev->geo.max_refs; i++) {
        struct dm_ref_entry ref;
        uint64_t word = __atomic_load_n(&dev->refs[i].state, __ATOMIC_ACQUIRE);
        if (dm_ref_state(word) == DM_REF_FREE || is_orphan(dev, i, word))
            continue;
        if (!dm_device_ref(dev, i, &ref) || dm_ref_state(ref.state) != DM_REF_LIVE)
            return false;
        if (!runs_of_ref(dev, t->s->page, &ref, add_suspect, t))
            return false; /* damaged: what it holds cannot be known */
    }
    return true;
}

/* Take the counts off that belong to nobody; with the last one the frame is the pool's. */
static bool take_off(struct dm_device *dev, uint32_t pfn, uint32_t nr) {
    uint64_t *at = dev->frames + pfn, word = __atomic_load_n(at, __ATOMIC_ACQUIRE), next;
    do {
        if (dm_frame_refcount(word) < nr || dm_device_fenced(dev))
            return false;
        next = dm_frame_refcount(word) == nr ? dm_frame_pack(0, DM_OWNER_POOL, dm_frame_seq(word))
                                             : word - nr;
    } while (
        !__atomic_compare_exchange_n(at, &word, next, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    DM_CRASH_POINT(scrub_taken_off);
    return true;
}

/* Free the entry of an orphan. Claimed first: until its chain is forgotten, which no free entry has, nobody may use it. A
 * crash between the two leaves an orphan. */
static bool drop_orphan(struct dm_device *dev, const struct dm_orphan *o) {
    struct dm_ref_entry *entry = dev->refs + o->entry;
    uint64_t word = o->word,
             claimed = dm_ref_pack(DM_REF_DROPPING, 0, DM_OWNER_POOL, dm_ref_gen(word));
    if (dm_device_fenced(dev) || !__atomic_compare_exchange_n(&entry->state, &word, claimed, false,
                                                              __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return false;
    DM_CRASH_POINT(scrub_ref_claimed);
    entry->overflow = entry->nr_overflow = 0;
    DM_CRASH_POINT(scrub_ref_unlinked);
    __atomic_store_n(&entry->state, dm_ref_pack(DM_REF_FREE, 0, 0, dm_ref_gen(word) + 1),
                     __ATOMIC_RELEASE);
    DM_CRASH_POINT(scrub_ref_freed);
    return true;
}

static void settle_orphans(struct dm_scrub *s, struct dm_device *dev, uint32_t min_looks,
                           bool repair) {
    for (uint32_t i = 0; i < s->nr_orphans; i++) {
        struct dm_orphan *o = s->orphans + i;
        if (o->looks < min_looks || o->settled == 2)
            continue;
        o->settled = is_orphan(dev, o->entry, o->word);
        if (o->settled && repair && drop_orphan(dev, o))
            o->settled = 2;
    }
}

static bool repair_one(struct dm_device *dev, const struct dm_suspect *f) {
    uint64_t word = f->word;
    if (f->kind == DM_SCRUB_LEAKED)
        return take_off(dev, f->pfn, dm_frame_refcount(f->word) - f->expected);
    if (f->kind == DM_SCRUB_MISSING || dm_device_fenced(dev))
        return false;
    if (!__atomic_compare_exchange_n(dev->frames + f->pfn, &word,
                                     dm_frame_pack(0, DM_OWNER_POOL, dm_frame_seq(word)), false,
                                     __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return false;
    DM_CRASH_POINT(scrub_reclaimed);
    return true;
}

/* Whose intent record names the frame, that of one at work or of one that died here? */
static void blame(const struct dm_device *dev, struct dm_suspect *f) {
    for (uint32_t i = 0; i < dev->geo.max_hosts; i++) {
        const struct dm_intent *in = &dev->hosts[i].intent;
        uint32_t op = in->op ? in->op : (uint32_t)in->died_in;
        if (op && ((f->pfn >= in->pfn && f->pfn - in->pfn < in->nr) || f->pfn == in->old)) {
            f->host = i + 1;
            f->op = op;
        }
    }
}

/*
 * Make certain of the suspects that were found in min_looks looks in a row, and with `repair` (dev is then writable)
 * take back those that nothing holds. *quiet is false when hosts were at work, and nothing is known. Call it between two
 * looks. Returns DM_OK or DM_ERR_NO_MEMORY.
 */
int dm_scrub_settle(struct dm_scrub *s, struct dm_device *dev, uint32_t min_looks, bool repair,
                    bool *quiet, struct dm_error *err) {
    struct settling t = {.s = s, .dev = dev, .index = s->expected};
    *quiet = false;
    t.activity = calloc(dev->geo.max_hosts, sizeof *t.activity);
    if (!t.activity)
        return dm_device_fail(err, DM_ERR_NO_MEMORY, "no memory to look at the hosts");
    settle_orphans(s, dev, min_looks, repair);
    for (uint32_t i = 0; i < s->nr_suspects; i++) {
        struct dm_suspect *f = s->suspects + i;
        f->expected = 0;
        f->settled = 0;
        if (f->looks >= min_looks)
            t.index[f->pfn] = i + 1;
    }
    bool idle = all_idle(dev, t.activity, false) && count_suspects(&t);
    for (uint32_t i = 0; i < s->nr_suspects; i++) {
        struct dm_suspect *f = s->suspects + i;
        if (f->looks >= min_looks)
            f->word = __atomic_load_n(dev->frames + f->pfn, __ATOMIC_ACQUIRE);
        t.index[f->pfn] = 0;
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* all of the above before the second look */
    *quiet = idle && all_idle(dev, t.activity, true);
    free(t.activity);
    for (uint32_t i = 0; *quiet && i < s->nr_suspects; i++) {
        struct dm_suspect *f = s->suspects + i;
        if (f->looks < min_looks)
            continue;
        f->kind = judge(dev, f->word, f->expected);
        if (!f->kind)
            continue; /* it was on its way */
        f->settled = 1;
        blame(dev, f);
        if (repair && repair_one(dev, f))
            f->settled = 2;
    }
    return DM_OK;
}

/* Free every Ref entry, without touching counts: nobody lives who could use one. Returns how many there were. */
uint32_t dm_scrub_forget_refs(struct dm_device *dev) {
    uint32_t forgotten = 0;
    for (uint32_t i = 0; i < dev->geo.max_refs; i++) {
        struct dm_ref_entry *entry = dev->refs + i;
        uint64_t word = __atomic_load_n(&entry->state, __ATOMIC_ACQUIRE);
        if (dm_ref_state(word) == DM_REF_FREE)
            continue;
        entry->overflow = entry->nr_overflow = 0;
        DM_CRASH_POINT(scrub_ref_unlinked);
        __atomic_store_n(&entry->state, dm_ref_pack(DM_REF_FREE, 0, 0, dm_ref_gen(word) + 1),
                         __ATOMIC_RELEASE);
        DM_CRASH_POINT(scrub_ref_freed);
        forgotten++;
    }
    return forgotten;
}
