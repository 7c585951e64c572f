/*
 * audit.c - exact accounting of a device: rules 1 and 2 of the design, checked frame by frame.
 *
 *     refcount(f) == present PTEs that name f, over all hosts that are not FREE
 *                    + live Refs that cover f
 *                    + 1 if f is an overflow frame of a Ref
 *     and with refcount 0: owner(f) is the pool or a host that is not FREE
 *     and every Ref has a holder that is not FREE: of one without nobody would ever think again
 *
 * Exact on a quiescent fabric. With operations in flight counts and mappings change between two looks, and what is
 * reported may be transient; `in_flight` tells that some were seen.
 *
 * Only page-table pages that exist are read (SEEK_DATA): a page table of a large device is mostly never touched.
 * Nothing that is read from the device is trusted: bad numbers become violations, not crashes.
 *
 * Context: any thread, no locks, no GIL; touches only tables that are allocated.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "device_private.h"

struct audit {
    const struct dm_device *dev;
    struct dm_audit *out;
    uint32_t *expected; /* [nr_frames]: the refcount that mappings and Refs add up to */
    uint8_t *page;      /* one overflow frame */
};

__attribute__((format(printf, 3, 4))) static void violation(struct audit *a, uint32_t pfn,
                                                            const char *format, ...) {
    uint64_t n = a->out->nr_violations++;
    if (n >= DM_AUDIT_MAX_VIOLATIONS)
        return;
    struct dm_violation *v = a->out->violations + n;
    va_list args;
    v->pfn = pfn;
    va_start(args, format);
    vsnprintf(v->text, sizeof v->text, format, args);
    va_end(args);
}

/* ---------------------------------------------------------------- page tables */

static void audit_pte(struct audit *a, uint32_t host, uint64_t page, uint32_t pte) {
    if (pte == 0)
        return;
    uint32_t pfn = pte & DM_PTE_PFN;
    bool present = pte & DM_PTE_PRESENT, hole = pte & DM_PTE_HOLE;
    if (present == hole || (hole && pfn != 0) ||
        (pte & ~(DM_PTE_PRESENT | DM_PTE_HEAD | DM_PTE_HOLE | DM_PTE_PFN))) {
        violation(a, DM_NO_FRAME, "host %u, page %llu: %#010x is no page-table entry", host,
                  (unsigned long long)page, pte);
    } else if (hole) {
        a->out->hole_pages++;
    } else if (pfn >= a->dev->geo.nr_frames) {
        violation(a, DM_NO_FRAME, "host %u, page %llu maps frame %u, which does not exist", host,
                  (unsigned long long)page, pfn);
    } else {
        a->out->mapped_pages++;
        a->expected[pfn]++;
    }
}

/* Walk the parts of a host's page table that were ever touched. */
static int audit_page_table(struct audit *a, uint32_t host, struct dm_error *err) {
    const struct dm_device *dev = a->dev;
    const uint32_t *ptes = dm_device_ptes(dev, host);
    const uint64_t start =
        dev->geo.page_table_off + (uint64_t)(host - 1) * dev->geo.ptes_per_host * sizeof(uint32_t);
    const uint64_t end = start + dev->geo.ptes_per_host * sizeof(uint32_t);

    for (uint64_t at = start; at < end;) {
        off_t data = lseek(dev->fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            break;
        off_t hole = data < 0 ? -1 : lseek(dev->fd, data, SEEK_HOLE);
        if (hole < 0) {
            dm_device_fail_sys(err, "lseek", "walk a host's page table");
            return DM_ERR_SYSTEM;
        }
        at = (uint64_t)hole < end ? (uint64_t)hole : end;
        for (uint64_t page = ((uint64_t)data - start) / sizeof *ptes;
             page < (at - start) / sizeof *ptes && (uint64_t)data < end; page++)
            audit_pte(a, host, page, __atomic_load_n(ptes + page, __ATOMIC_RELAXED));
    }
    return DM_OK;
}

static int audit_hosts(struct audit *a, struct dm_error *err) {
    for (uint32_t host = 1; host <= a->dev->geo.max_hosts; host++) {
        const struct dm_host_entry *entry = a->dev->hosts + host - 1;
        uint32_t state = __atomic_load_n(&entry->state, __ATOMIC_ACQUIRE);
        if (state == DM_HOST_FREE)
            continue;
        if (state > DM_HOST_DRAINING)
            violation(a, DM_NO_FRAME, "host %u: state %u is none", host, state);
        if (__atomic_load_n(&entry->intent.op, __ATOMIC_ACQUIRE) != DM_INTENT_NONE)
            a->out->in_flight++;
        int status = audit_page_table(a, host, err);
        if (status != DM_OK)
            return status;
    }
    return DM_OK;
}

/* ---------------------------------------------------------------- Refs */

/* Count the frames of nr runs; returns how many pages they cover, holes included. */
static uint64_t audit_runs(struct audit *a, uint32_t entry, const struct dm_run *runs,
                           uint32_t nr) {
    uint64_t pages = 0;
    for (uint32_t i = 0; i < nr; i++) {
        uint64_t pfn = runs[i].pfn, count = runs[i].count;
        pages += count;
        if (pfn == DM_NO_FRAME)
            continue;
        if (count == 0 || pfn + count > a->dev->geo.nr_frames) {
            violation(a, DM_NO_FRAME, "Ref entry %u covers frames %llu to %llu, which do not exist",
                      entry, (unsigned long long)pfn, (unsigned long long)(pfn + count));
            continue;
        }
        a->out->ref_pages += count;
        for (uint64_t f = pfn; f < pfn + count; f++)
            a->expected[f]++;
    }
    return pages;
}

/* Runs beyond the inline ones: a chain of nr_overflow frames, of which the Ref holds one count each. */
static uint64_t audit_overflow(struct audit *a, uint32_t entry, const struct dm_ref_entry *ref,
                               uint32_t left) {
    const struct dm_superblock *geo = &a->dev->geo;
    const struct dm_ref_overflow *over = (const struct dm_ref_overflow *)a->page;
    const uint32_t cap = (uint32_t)((geo->page_size - sizeof *over) / sizeof(struct dm_run));
    uint32_t link = ref->overflow, links = 0;
    uint64_t pages = 0;

    for (; link && links < ref->nr_overflow; links++) {
        uint32_t pfn = link - 1;
        if (pfn >= geo->nr_frames) {
            violation(a, DM_NO_FRAME, "Ref entry %u: overflow frame %u does not exist", entry, pfn);
            return pages;
        }
        a->out->overflow_frames++;
        a->expected[pfn]++;
        uint64_t off = geo->data_off + (uint64_t)pfn * geo->page_size;
        if (pread(a->dev->fd, a->page, geo->page_size, (off_t)off) != (ssize_t)geo->page_size ||
            over->nr_runs > cap || over->nr_runs > left) {
            violation(a, pfn, "overflow frame %u of Ref entry %u holds no list of runs", pfn,
                      entry);
            return pages;
        }
        pages += audit_runs(a, entry, over->runs, over->nr_runs);
        left -= over->nr_runs;
        link = over->next;
    }
    if (left != 0 || links != ref->nr_overflow || link)
        violation(a, DM_NO_FRAME, "Ref entry %u: its overflow frames end too early or too late",
                  entry);
    return pages;
}

/* The word is read once more: a Ref may have gone to another holder before this one's entry became free. */
static void audit_holder(struct audit *a, uint32_t entry, uint64_t word) {
    const struct dm_device *dev = a->dev;
    uint32_t holder = dm_ref_holder(word);
    bool there = holder >= 1 && holder <= dev->geo.max_hosts &&
                 __atomic_load_n(&dev->hosts[holder - 1].state, __ATOMIC_ACQUIRE) != DM_HOST_FREE;
    if (!there && __atomic_load_n(&dev->refs[entry].state, __ATOMIC_ACQUIRE) == word)
        violation(a, DM_NO_FRAME, "Ref entry %u is held by host %u, which is not attached: leaked",
                  entry, holder);
}

static void audit_ref(struct audit *a, uint32_t entry) {
    struct dm_ref_entry ref;
    uint8_t state = dm_ref_state(__atomic_load_n(&a->dev->refs[entry].state, __ATOMIC_ACQUIRE));

    if (state == DM_REF_FREE)
        return;
    if (!dm_device_ref(a->dev, entry, &ref)) {
        a->out->in_flight++;
        return;
    }
    state = dm_ref_state(ref.state);
    if (state != DM_REF_LIVE)
        a->out->in_flight++;
    if (state > DM_REF_CLONING)
        violation(a, DM_NO_FRAME, "Ref entry %u: state %u is none", entry, state);
    audit_holder(a, entry, ref.state);
    /* BUILDING: the counts are not the Ref's yet. In the other states they are until it is FREE. */
    if (state < DM_REF_LIVE || state > DM_REF_CLONING)
        return;
    if (state == DM_REF_LIVE)
        a->out->live_refs++;
    uint32_t nr_inline = ref.nr_runs < DM_REF_INLINE_RUNS ? ref.nr_runs : DM_REF_INLINE_RUNS;
    uint64_t pages = audit_runs(a, entry, ref.runs, nr_inline);
    if (ref.nr_runs > nr_inline || ref.nr_overflow != 0)
        pages += audit_overflow(a, entry, &ref, ref.nr_runs - nr_inline);
    if (pages != ref.nr_pages)
        violation(a, DM_NO_FRAME, "Ref entry %u: its runs cover %llu pages, it says %u", entry,
                  (unsigned long long)pages, ref.nr_pages);
}

/* ---------------------------------------------------------------- frames */

static void audit_frame(struct audit *a, uint32_t pfn) {
    uint64_t word = __atomic_load_n(a->dev->frames + pfn, __ATOMIC_ACQUIRE);
    uint32_t refcount = dm_frame_refcount(word), owner = dm_frame_owner(word);

    if (refcount != a->expected[pfn])
        violation(a, pfn, "refcount of frame %u is %u, but mappings and Refs hold %u%s", pfn,
                  refcount, a->expected[pfn], a->expected[pfn] == 0 ? ": leaked" : "");
    if (refcount != 0) {
        a->out->in_use++;
        if (refcount > DM_REFCOUNT_MAX)
            violation(a, pfn, "refcount of frame %u is %u, above the maximum", pfn, refcount);
    } else if (owner == DM_OWNER_POOL) {
        a->out->pool++;
    } else {
        a->out->free++;
        if (owner > a->dev->geo.max_hosts) {
            violation(a, pfn, "frame %u is owned by host %u, which cannot exist", pfn, owner);
            return;
        }
        a->out->free_of[owner]++;
        a->out->coming_to[owner] += dm_frame_coming(word);
        if (__atomic_load_n(&a->dev->hosts[owner - 1].state, __ATOMIC_ACQUIRE) == DM_HOST_FREE)
            violation(a, pfn, "frame %u is owned by host %u, which is not attached: leaked", pfn,
                      owner);
    }
}

/*
 * Account for every frame of the device. Returns DM_OK (violations are found in *out, they are no failure),
 * DM_ERR_NO_MEMORY or DM_ERR_SYSTEM.
 */
int dm_device_audit(const struct dm_device *dev, struct dm_audit *out, struct dm_error *err) {
    struct audit a = {.dev = dev, .out = out};
    int status = DM_ERR_NO_MEMORY;

    dm_error_init(err);
    memset(out, 0, sizeof *out);
    a.expected = calloc(dev->geo.nr_frames, sizeof *a.expected);
    a.page = malloc(dev->geo.page_size);
    if (a.expected && a.page) {
        status = audit_hosts(&a, err);
        for (uint32_t entry = 0; status == DM_OK && entry < dev->geo.max_refs; entry++)
            audit_ref(&a, entry);
        for (uint32_t pfn = 0; status == DM_OK && pfn < dev->geo.nr_frames; pfn++)
            audit_frame(&a, pfn);
    }
    free(a.expected);
    free(a.page);
    return status;
}
