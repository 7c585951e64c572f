/*
 * fault.c - the DM layer's page-fault path: what a store to a page that is not writable does.
 *
 * The three cases of the paper (V-B.4): no frame -> take one, map it zeroed; read-only and shared -> copy, repoint,
 * then drop the count; read-only and nobody else's -> make it writable.
 *
 * A fault costs as much as copying dozens of pages: sequential writes are served in growing windows.
 *
 * Context: the fault handler thread, host lock held. Nothing here blocks but in the kernel: a fault that needs a frame
 * when there is none is put aside (DM_FAULT_NO_FRAME), and the supplier thread asks for one.
 */
#include "fault.h"

#include <errno.h>
#include <string.h>

#include "dm.h"
#include "intent.h"
#include "uffd.h"

/* Growth of the window at the first sequential fault, and at those after it: a fault costs some 40 page copies. */
#define GROWTH_FIRST 8
#define GROWTH 32

/* ---------------------------------------------------------------- which pages */

struct span {
    uint32_t page, nr;
};

static bool copyable(const struct dm_host *h, uint32_t page, bool want_shared) {
    uint32_t pte = h->pt[page];
    if (!(pte & DM_PTE_PRESENT) || !(h->kstate[page] & DM_KS_PROTECTED))
        return false;
    uint64_t word = __atomic_load_n(&h->frames[pte & DM_PTE_PFN], __ATOMIC_ACQUIRE);
    return (dm_frame_refcount(word) > 1) == want_shared;
}

static void grow_window(const struct dm_host *h, struct dm_vma *v, uint32_t page) {
    uint64_t window = 1;
    if (page == v->next_fault)
        window = (uint64_t)v->fault_window * (v->fault_window == 1 ? GROWTH_FIRST : GROWTH);
    v->fault_window = window < h->copy_around ? (uint32_t)window : h->copy_around;
}

/* The pages to do together with `page`: one at random, 8, 256, copy_around (at most) at sequential faults; whole
 * aligned chunks when kernel mappings run short. All present, protected, alike in being shared or not. */
static struct span choose(struct dm_host *h, struct dm_vma *v, uint32_t page, bool shared) {
    grow_window(h, v, page);
    uint32_t first = page, last = page + v->fault_window, end = v->page + v->nr_pages;
    uint32_t chunk = shared ? dm_pieces_chunk(h) : 1;
    if (chunk > v->fault_window) {
        first = page - (page - v->page) % chunk;
        last = first + chunk;
    }
    if (last > end)
        last = end;
    uint32_t from = page, to = page + 1;
    while (from > first && copyable(h, from - 1, shared))
        from--;
    while (to < last && copyable(h, to, shared))
        to++;
    return (struct span){from, to - from};
}

static struct span choose_holes(struct dm_host *h, struct dm_vma *v, uint32_t page) {
    grow_window(h, v, page);
    uint32_t to = page + 1, end = v->page + v->nr_pages;
    uint32_t chunk = dm_pieces_chunk(h);
    uint32_t window = chunk > v->fault_window ? chunk : v->fault_window;
    while (to < end && to - page < window && h->pt[to] & DM_PTE_HOLE)
        to++;
    return (struct span){page, to - page};
}

/* ---------------------------------------------------------------- frames */

static void reserve_used(struct dm_host *h, struct dm_vma *v, uint32_t nr) {
    uint32_t used = nr < v->reserved ? nr : v->reserved;
    v->reserved -= used;
    h->nr_reserved -= used;
    h->entry->nr_reserved = h->nr_reserved;
}

static void show_or_die(struct dm_host *h, uint32_t page, uint32_t pfn, uint32_t nr) {
    struct dm_error e = {0};
    if (dm_show(h, page, pfn, nr, true, &e))
        dm_fatal(
            h,
            "cannot map a frame at 0x%llx: %s: %s (%u kernel mappings in use by this layer; see "
            "vm.max_map_count)",
            (unsigned long long)dm_addr_of(h, page), e.syscall ? e.syscall : "mmap",
            strerror(e.sys_errno), h->vm_pieces);
}

/* ---------------------------------------------------------------- the three cases */

static void copy_frames(struct dm_host *h, uint32_t page, const struct dm_run *run) {
    uint64_t page_bytes = (uint64_t)1 << h->page_shift;
    for (uint32_t i = 0, n; i < run->count; i += n) {
        uint32_t old = h->pt[page + i] & DM_PTE_PFN;
        for (n = 1; i + n < run->count && (h->pt[page + i + n] & DM_PTE_PFN) == old + n;)
            n++;
        memcpy(dm_frame_data(h, run->pfn + i), dm_frame_data(h, old), n * page_bytes);
    }
    DM_COUNT(h, frames_copied, run->count);
    DM_COUNT(h, bytes_copied, run->count * page_bytes);
    dm_latency_bytes(&h->latency, 2 * run->count * page_bytes);
}

/* Copy completely, repoint, then drop the count. The old frames cannot change meanwhile: this host still holds a
 * count of each, so whoever else holds one sees it shared. */
static void copy_on_write(struct dm_host *h, struct dm_vma *v, uint32_t page,
                          const struct dm_run *run) {
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_COW, page, run->count, run->pfn, 0, 0);
    DM_CRASH_POINT(cow_begun);
    dm_frames_enter_use(h, run->pfn, run->count);
    copy_frames(h, page, run);
    DM_CRASH_POINT(cow_copied);
    show_or_die(h, page, run->pfn, run->count);
    DM_CRASH_POINT(cow_shown);
    struct dm_run freed = {0, 0};
    uint32_t nr_freed = 0;
    for (uint32_t i = 0; i < run->count; i++) {
        uint32_t pte = h->pt[page + i], old = pte & DM_PTE_PFN;
        in->old = old;
        DM_CRASH_POINT(cow_noted);
        __atomic_store_n(&h->pt[page + i], (pte & DM_PTE_HEAD) | DM_PTE_PRESENT | (run->pfn + i),
                         __ATOMIC_RELEASE);
        DM_CRASH_POINT(cow_repointed);
        dm_intent_progress(in, i + 1);
        DM_CRASH_POINT(cow_progress);
        /* Two hosts may copy the same frame at once: the drop that returns "last" reclaims it. */
        if (dm_count_down(h, old)) {
            dm_freed_add(h, &freed, old);
            nr_freed++;
        }
    }
    dm_freed_end(h, &freed);
    DM_COUNT(h, frames_freed, nr_freed);
    dm_intent_end(in);
    DM_CRASH_POINT(cow_ended);
    v->flags |= DM_VMA_DIRTY;
    reserve_used(h, v, run->count);
}

static void fill_holes(struct dm_host *h, struct dm_vma *v, uint32_t page,
                       const struct dm_run *run) {
    uint64_t bytes = (uint64_t)run->count << h->page_shift;
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_FILL, page, run->count, run->pfn, 0, 0);
    DM_CRASH_POINT(fill_begun);
    dm_frames_enter_use(h, run->pfn, run->count);
    memset(dm_frame_data(h, run->pfn), 0, bytes);
    DM_CRASH_POINT(fill_zeroed);
    dm_latency_bytes(&h->latency, bytes);
    show_or_die(h, page, run->pfn, run->count);
    DM_CRASH_POINT(fill_shown);
    dm_pt_set(h, page, run->pfn, run->count, h->pt[page] & DM_PTE_HEAD);
    dm_intent_end(in);
    DM_CRASH_POINT(fill_ended);
    DM_COUNT(h, frames_filled, run->count);
    DM_COUNT(h, bytes_zeroed, bytes);
    v->flags |= DM_VMA_DIRTY;
    reserve_used(h, v, run->count);
}

static void upgrade(struct dm_host *h, struct dm_vma *v, struct span s) {
    struct dm_error e = {0};
    if (dm_unprotect(h, s.page, s.nr, &e))
        dm_fatal(h, "cannot make a page writable at 0x%llx: %s: %s",
                 (unsigned long long)dm_addr_of(h, s.page), e.syscall, strerror(e.sys_errno));
    DM_COUNT(h, inplace_upgrades, s.nr);
    if (s.page >= h->nr_frames)
        v->flags |= DM_VMA_DIRTY;
}

bool dm_fault_pending(const struct dm_host *h, uint64_t addr) {
    uint32_t page = dm_page_of(h, addr);
    return h->vma_of[page] && (h->pt[page] & DM_PTE_HOLE || h->kstate[page] & DM_KS_PROTECTED);
}

/*
 * No mapping there. Either the fault was served together with another thread's and the buffer freed since, in order:
 * then a wake-up is all it needs. Or the store is a bug, and faults again at once.
 */
static int stray(struct dm_host *h, struct dm_stray *last, uint64_t addr, uint32_t tid) {
    uint64_t now = dm_now_ns();
    if (last->addr == addr && last->tid == tid && now - last->when_ns < 1000000000u)
        dm_fatal(
            h,
            "a thread stored to 0x%llx, which is no longer its memory: the buffer there was freed, "
            "moved or handed over while a raw pointer to it was kept",
            (unsigned long long)addr);
    *last = (struct dm_stray){.addr = addr, .when_ns = now, .tid = tid};
    DM_COUNT(h, spurious_faults, 1);
    (void)dm_wake(h, dm_page_of(h, addr), 1);
    return DM_FAULT_SERVED;
}

/* Serve one fault. */
int dm_serve_fault(struct dm_host *h, struct dm_stray *last, uint64_t addr, uint32_t tid) {
    uint32_t page = dm_page_of(h, addr), id = h->vma_of[page];
    if (!id)
        return stray(h, last, addr, tid);
    if (last->tid == tid)
        last->tid = 0; /* it went on since */
    struct dm_vma *v = &h->vmas[id];
    if (v->flags & DM_VMA_VIEW && h->kstate[page] & DM_KS_PROTECTED)
        dm_view_materialise(h, id);
    uint32_t pte = h->pt[page];
    struct span s;
    struct dm_run run;
    if (pte & DM_PTE_HOLE) {
        s = choose_holes(h, v, page);
    } else if (!(h->kstate[page] & DM_KS_PROTECTED)) {
        DM_COUNT(h, spurious_faults, 1);
        (void)dm_wake(h, page, 1);
        return DM_FAULT_SERVED;
    } else if (copyable(h, page, true)) {
        s = choose(h, v, page, true);
    } else {
        s = choose(h, v, page, false);
        upgrade(h, v, s);
        v->next_fault = s.page + s.nr;
        return DM_FAULT_SERVED;
    }
    if (!dm_take_upto(h, s.nr, v->reserved, &run))
        return DM_FAULT_NO_FRAME;
    /* The run may be shorter than the span: the faulting page must be in it. */
    if (run.count <= page - s.page) {
        s.nr -= page - s.page;
        s.page = page;
        if (run.count > s.nr) {
            dm_frame_freed(h, run.pfn + s.nr, run.count - s.nr);
            run.count = s.nr;
        }
    }
    if (pte & DM_PTE_HOLE)
        fill_holes(h, v, s.page, &run);
    else
        copy_on_write(h, v, s.page, &run);
    v->next_fault = s.page + run.count;
    (void)dm_wake(h, s.page, run.count);
    return DM_FAULT_SERVED;
}
