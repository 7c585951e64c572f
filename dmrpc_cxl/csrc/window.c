/*
 * window.c - what the kernel shows at each page: protection, remapping, and the way back.
 *
 * Facts about the kernel, and what they force on us:
 * - UFFDIO_WRITEPROTECT needs its range registered, and on older kernels inside one kernel mapping: ranges are cut
 *   wherever two neighbouring pages do not belong to one piece.
 * - mmap(MAP_FIXED) makes a new, unregistered mapping. Registering costs a call, so a page that copy-on-write made
 *   private is registered only when it is shared again.
 * - Clearing write protection leaves page-table entries read-only: the next write of each page is a minor fault.
 *   Where nobody may access the range meanwhile, unregister + mprotect read-only + mprotect read-write + register
 *   leaves them writable, at a third of the cost.
 * - A kernel mapping that is not MADV_DONTFORK would be inherited by a forked child without its protection.
 * - vm.max_map_count caps the pieces; they are counted exactly (vm_pieces).
 *
 * Context, unless a function says otherwise: host lock held; API threads and the fault handler; blocks only in
 * the kernel. Nobody touches a page of the windows here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "host.h"
#include "uffd.h"

#define TRICK_MIN_PAGES 4u

static inline uint64_t bytes_of(const struct dm_host *h, uint32_t nr) {
    return (uint64_t)nr << h->page_shift;
}

/* ---------------------------------------------------------------- pieces */

static inline uint32_t shown_frame(const struct dm_host *h, uint32_t page) {
    return h->shown[page] ? h->shown[page] - 1 : dm_identity(h, page);
}

/* Do pages i - 1 and i lie in one kernel mapping? */
static bool one_piece(const struct dm_host *h, uint32_t i) {
    if (i == h->nr_frames || i == 2 * h->nr_frames)
        return false;
    if ((h->kstate[i - 1] ^ h->kstate[i]) & DM_KS_UNREGISTERED)
        return false;
    bool area = i > 2 * h->nr_frames;
    if (area && (!h->shown[i - 1] || !h->shown[i] || h->shown[i] == DM_SHOWN_HOLE))
        return h->shown[i - 1] == h->shown[i];
    return shown_frame(h, i - 1) + 1 == shown_frame(h, i) && h->shown[i - 1] != DM_SHOWN_HOLE;
}

static uint32_t boundaries(const struct dm_host *h, uint32_t page, uint32_t nr) {
    uint32_t n = 0;
    for (uint32_t i = page ? page : 1; i <= page + nr && i < h->nr_ptes; i++)
        n += !one_piece(h, i);
    return n;
}

static void pieces_changed(struct dm_host *h, uint32_t before, uint32_t after) {
    h->vm_pieces += after - before;
    h->entry->vm_pieces = h->vm_pieces;
}

/* How many pages a copy-on-write fault must move at least, so that scattered writes cannot use up the
 * kernel's mappings: whole aligned chunks merge where single pages would not. */
uint32_t dm_pieces_chunk(const struct dm_host *h) {
    if (h->vm_pieces < h->vm_piece_limit / 4)
        return 1;
    if (h->vm_pieces < h->vm_piece_limit / 2)
        return 16;
    return h->vm_pieces < h->vm_piece_limit / 4 * 3 ? 64 : 512;
}

/* ---------------------------------------------------------------- system calls */

static int check_fds(struct dm_host *h, struct dm_error *e) {
    extern _Thread_local bool dm_in_handler; /* has a descriptor table of its own */
    if (dm_in_handler)
        return DM_OK;
    h->entry->counters[DM_CNT_syscalls] += 2;
    if (dm_descriptor_check(h->uffd, h->uffd_dev, h->uffd_ino) < 0 ||
        dm_descriptor_check(h->device_fd, h->device_dev, h->device_ino) < 0)
        return dm_fail(e, DM_ERR_DESCRIPTOR_LOST,
                       "a descriptor of the DM layer was closed behind its back (os.closerange, "
                       "os.close?); shared memory stays protected, but this host can only detach");
    return DM_OK;
}

static int uffd_register(struct dm_host *h, uint32_t page, uint32_t nr, uint64_t mode,
                         struct dm_error *e) {
    struct uffdio_register r = {.range = {dm_addr_of(h, page), bytes_of(h, nr)}, .mode = mode};
    DM_COUNT(h, syscalls, 1);
    if (ioctl(h->uffd, UFFDIO_REGISTER, &r) < 0)
        return dm_fail_sys(e, "UFFDIO_REGISTER", r.range.start);
    return DM_OK;
}

static int uffd_protect(struct dm_host *h, uint32_t page, uint32_t nr, bool on,
                        struct dm_error *e) {
    struct uffdio_writeprotect w = {.range = {dm_addr_of(h, page), bytes_of(h, nr)},
                                    .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
    DM_COUNT(h, syscalls, 1);
    if (on)
        DM_COUNT(h, protect_calls, 1);
    else
        DM_COUNT(h, unprotect_calls, 1);
    while (ioctl(h->uffd, UFFDIO_WRITEPROTECT, &w) < 0) {
        if (errno != EAGAIN)
            return dm_fail_sys(e, "UFFDIO_WRITEPROTECT", w.range.start);
        DM_COUNT(h, syscalls, 1); /* the address space is changing (fork): again */
    }
    return DM_OK;
}

static int map_fixed(struct dm_host *h, uint32_t page, uint32_t nr, uint32_t pfn,
                     struct dm_error *e) {
    void *at = (void *)(uintptr_t)dm_addr_of(h, page);
    void *got;
    if (pfn == DM_NO_FRAME)
        got = mmap(at, bytes_of(h, nr), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    else
        got = mmap(at, bytes_of(h, nr), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                   h->device_fd, (off_t)(h->data_off + bytes_of(h, pfn)));
    h->entry->counters[DM_CNT_syscalls] += 2;
    DM_COUNT(h, remap_calls, 1);
    if (got == MAP_FAILED)
        return dm_fail_sys(e, "mmap", (uint64_t)(uintptr_t)at);
    if (madvise(at, bytes_of(h, nr), MADV_DONTFORK) < 0)
        return dm_fail_sys(e, "madvise(MADV_DONTFORK)", (uint64_t)(uintptr_t)at);
    return DM_OK;
}

/*
 * Populate page-table entries of a fresh mapping that is not registered yet, so that reading it raises no userfault. A read
 * maps the 64 KiB around it at once (fault-around); MADV_POPULATE_READ would look at every page singly, and costs
 * three times as much. Only an optimisation: what is not populated faults one by one later.
 */
static void populate(struct dm_host *h, uint32_t page, uint32_t nr) {
    const uint64_t around = 65536;
    uint64_t at = dm_addr_of(h, page), end = at + bytes_of(h, nr);
    for (; at < end; at = (at / around + 1) * around)
        (void)*(const volatile char *)(uintptr_t)at;
}

int dm_wake(struct dm_host *h, uint32_t page, uint32_t nr) {
    struct uffdio_range r = {dm_addr_of(h, page), bytes_of(h, nr)};
    DM_COUNT(h, syscalls, 1);
    return ioctl(h->uffd, UFFDIO_WAKE, &r);
}

/* ---------------------------------------------------------------- ranges */

/* Length of the run from page, at most nr, that is one piece and whose pages all have (kstate & mask) == want. */
static uint32_t run_of(const struct dm_host *h, uint32_t page, uint32_t nr, uint8_t mask,
                       uint8_t want) {
    uint32_t n = 0;
    while (n < nr && (h->kstate[page + n] & mask) == want && (n == 0 || one_piece(h, page + n)))
        n++;
    return n;
}

static void kstate_change(struct dm_host *h, uint32_t page, uint32_t nr, uint8_t clear,
                          uint8_t set) {
    for (uint32_t i = 0; i < nr; i++)
        h->kstate[page + i] = (uint8_t)((h->kstate[page + i] & ~clear) | set);
}

static int ensure_registered(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    for (uint32_t i = 0, n; i < nr; i += n ? n : 1) {
        n = run_of(h, page + i, nr - i, DM_KS_UNREGISTERED, DM_KS_UNREGISTERED);
        if (!n)
            continue;
        int s = uffd_register(h, page + i, n, UFFDIO_REGISTER_MODE_WP, e);
        if (s)
            return s;
        uint32_t before = boundaries(h, page + i, n);
        kstate_change(h, page + i, n, DM_KS_UNREGISTERED, 0);
        pieces_changed(h, before, boundaries(h, page + i, n));
    }
    return DM_OK;
}

/* Pages from `page`, in eights, whose kstate has every bit of mask: skipped without a look at each. */
static uint32_t skip_all(const struct dm_host *h, uint32_t page, uint32_t nr, uint8_t mask) {
    const uint64_t every = 0x0101010101010101ull * mask;
    uint32_t i = 0;
    for (uint64_t eight; i + 8 <= nr; i += 8) {
        memcpy(&eight, h->kstate + page + i, 8);
        if ((eight & every) != every)
            break;
    }
    return i;
}

/* Write-protect pages; those that are already cost nothing. On failure what was protected stays so: harmless. */
int dm_protect(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    bool checked = false;
    for (uint32_t i = skip_all(h, page, nr, DM_KS_PROTECTED), n; i < nr; i += n ? n : 1) {
        n = run_of(h, page + i, nr - i, DM_KS_PROTECTED, 0);
        if (!n)
            continue;
        int s = checked ? DM_OK : check_fds(h, e);
        checked = true;
        if (s || (s = ensure_registered(h, page + i, n, e)) ||
            (s = uffd_protect(h, page + i, n, true, e)))
            return s;
        kstate_change(h, page + i, n, 0, DM_KS_PROTECTED);
    }
    return DM_OK;
}

/* Remove write protection and wake whoever waits for it. Other threads may be using the range. */
int dm_unprotect(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    for (uint32_t i = 0, n; i < nr; i += n ? n : 1) {
        n = run_of(h, page + i, nr - i, DM_KS_PROTECTED, DM_KS_PROTECTED);
        if (!n)
            continue;
        int s = uffd_protect(h, page + i, n, false, e);
        if (s)
            return s;
        kstate_change(h, page + i, n, DM_KS_PROTECTED, 0);
    }
    return DM_OK;
}

/* unregister, read-only, read-write, register: see the head of this file. */
static int unprotect_unused(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    void *at = (void *)(uintptr_t)dm_addr_of(h, page);
    struct uffdio_range r = {(uintptr_t)at, bytes_of(h, nr)};
    h->entry->counters[DM_CNT_syscalls] += 3;
    DM_COUNT(h, unprotect_calls, 1);
    if (ioctl(h->uffd, UFFDIO_UNREGISTER, &r) < 0)
        return dm_fail_sys(e, "UFFDIO_UNREGISTER", r.start);
    int s = DM_OK;
    if (mprotect(at, r.len, PROT_READ) < 0 || mprotect(at, r.len, PROT_READ | PROT_WRITE) < 0) {
        s = dm_fail_sys(e, "mprotect", r.start);
        (void)mprotect(at, r.len, PROT_READ | PROT_WRITE);
    }
    int t = uffd_register(h, page, nr, UFFDIO_REGISTER_MODE_WP, e);
    return s ? s : t;
}

/* Make vacant owned-window pages writable before they are handed out: earlier Refs may have left them protected.
 * In the steady state there is nothing to do and this is a scan of nr bytes. */
int dm_make_ready(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    const uint8_t *state = h->kstate + page;
    uint32_t i = 0;
    for (uint64_t eight; i + 8 <= nr; i += 8) {
        memcpy(&eight, state + i, 8);
        if (eight)
            break;
    }
    bool checked = false;
    for (uint32_t n; i < nr; i += n ? n : 1) {
        n = run_of(h, page + i, nr - i, DM_KS_PROTECTED, DM_KS_PROTECTED);
        if (!n)
            continue;
        int s = checked ? DM_OK : check_fds(h, e);
        checked = true;
        if (!s)
            s = n < TRICK_MIN_PAGES ? uffd_protect(h, page + i, n, false, e)
                                    : unprotect_unused(h, page + i, n, e);
        if (s)
            return s;
        kstate_change(h, page + i, n, DM_KS_PROTECTED, 0);
    }
    return DM_OK;
}

/* Show frames [pfn, pfn + nr) at pages [page, page + nr), writable and unregistered. */
int dm_show(struct dm_host *h, uint32_t page, uint32_t pfn, uint32_t nr, bool fill,
            struct dm_error *e) {
    int s = check_fds(h, e);
    if (s || (s = map_fixed(h, page, nr, pfn, e)))
        return s;
    uint32_t before = boundaries(h, page, nr);
    for (uint32_t i = 0; i < nr; i++) {
        h->shown[page + i] = DM_SHOWN(pfn + i);
        h->kstate[page + i] = DM_KS_REMAPPED | DM_KS_UNREGISTERED;
    }
    pieces_changed(h, before, boundaries(h, page, nr));
    if (fill && nr > 1)
        populate(h, page, nr);
    return DM_OK;
}

/* Show holes: pages of the VMA area that read as zeros and raise a fault when written (or touched at all, on
 * kernels that cannot protect what is not there). */
int dm_show_holes(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    int s = check_fds(h, e);
    if (s || (s = map_fixed(h, page, nr, DM_NO_FRAME, e)))
        return s;
    uint32_t before = boundaries(h, page, nr);
    for (uint32_t i = 0; i < nr; i++) {
        h->shown[page + i] = DM_SHOWN_HOLE;
        h->kstate[page + i] = DM_KS_REMAPPED;
    }
    pieces_changed(h, before, boundaries(h, page, nr));
    uint64_t mode = UFFDIO_REGISTER_MODE_WP;
    if (h->reads_allocate)
        mode |= UFFDIO_REGISTER_MODE_MISSING;
    s = uffd_register(h, page, nr, mode, e);
    if (!s && !h->reads_allocate)
        s = uffd_protect(h, page, nr, true, e);
    if (!s)
        kstate_change(h, page, nr, 0, DM_KS_PROTECTED);
    return s;
}

static int restore_window(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    int s = map_fixed(h, page, nr, dm_identity(h, page), e);
    if (s)
        return s;
    uint32_t before = boundaries(h, page, nr);
    memset(h->shown + page, 0, nr * sizeof h->shown[0]);
    memset(h->kstate + page, DM_KS_UNREGISTERED, nr);
    pieces_changed(h, before, boundaries(h, page, nr));
    populate(h, page, nr);
    return ensure_registered(h, page, nr, e);
}

static int restore_area(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    void *at = (void *)(uintptr_t)dm_addr_of(h, page);
    h->entry->counters[DM_CNT_syscalls] += 2;
    if (mmap(at, bytes_of(h, nr), PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED ||
        madvise(at, bytes_of(h, nr), MADV_DONTFORK) < 0)
        return dm_fail_sys(e, "mmap", (uint64_t)(uintptr_t)at);
    uint32_t before = boundaries(h, page, nr);
    memset(h->shown + page, 0, nr * sizeof h->shown[0]);
    memset(h->kstate + page, 0, nr);
    pieces_changed(h, before, boundaries(h, page, nr));
    return DM_OK;
}

/* Bring pages back to what their area normally shows. Owned-window pages that are merely protected stay so until
 * they are handed out again (dm_make_ready). */
int dm_restore(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    if (page >= 2 * h->nr_frames)
        return restore_area(h, page, nr, e);
    int s = check_fds(h, e);
    if (s)
        return s;
    for (uint32_t i = 0, n; i < nr; i += n ? n : 1) {
        n = 0;
        while (i + n < nr && h->kstate[page + i + n] & DM_KS_REMAPPED)
            n++;
        if (n && (s = restore_window(h, page + i, n, e)))
            return s;
    }
    return page >= h->nr_frames ? dm_protect(h, page, nr, e) : DM_OK;
}
