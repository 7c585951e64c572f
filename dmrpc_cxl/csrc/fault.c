/*
 * fault.c - the fault handler: one native thread per host that plays the DM layer's page-fault path.
 *
 * Facts, and what they force on us:
 * - The thread that faults usually holds the GIL. The handler never takes it, never calls into Python, never touches a
 *   page of the windows.
 * - Any thread of the process may close any descriptor (os.closerange). The handler unshares its descriptor table
 *   and keeps only what it needs, so nothing closed elsewhere can stop it, and no number can be reused under it.
 * - A dead handler would leave faulting threads asleep for ever. It holds a robust mutex all its life; a watcher
 *   thread that waits for it gets it when the kernel cleans up after the handler, and stops the process.
 * - A fault costs as much as copying dozens of pages: sequential writes are served in growing windows.
 * - The faulting thread sleeps, so its CPU is the cheapest to run the rest on: the handler follows it there.
 *
 * The three cases of the paper (V-B.4): no frame -> take one, map it zeroed; read-only and shared -> copy, repoint,
 * then drop the count; read-only and nobody else's -> make it writable.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dm.h"
#include "intent.h"
#include "uffd.h"

_Thread_local bool dm_in_handler;

#define GROWTH 16u /* of the window at each sequential fault, which costs as much as copying some 40 pages */
#define EVENTS_PER_READ 16

struct handler { /* the handler thread's own things */
    struct dm_host *h;
    struct dm_link link;
    int tid_fd;
    uint32_t tid, cpu_checks;
    cpu_set_t allowed;
    uint64_t next_guard_try;
};

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
    v->fault_window = page == v->next_fault ? v->fault_window * GROWTH : 1;
    if (v->fault_window > h->copy_around)
        v->fault_window = h->copy_around;
}

/* The pages to do together with `page`: one at random, GROWTH times as many at each sequential fault (copy_around at most); whole
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

/* Up to nr consecutive frames; asks the coordinator when there are none. Drops the lock then: *waited says that
 * whatever was decided before must be decided again. */
static int frames_for(struct handler *t, struct dm_vma *v, uint64_t addr, uint32_t nr,
                      struct dm_run *run, bool *waited) {
    struct dm_host *h = t->h;
    if (dm_take_upto(h, nr, v->reserved, run))
        return DM_OK;
    struct dm_error e = {0};
    *waited = true;
    uint64_t give_up = dm_now_ns() + h->deadline_ns;
    for (unsigned pause = 1;; pause = pause < 50 ? pause * 2 : 50) {
        int s = dm_refill(h, &t->link, 1, 1, &e);
        if (s == DM_OK)
            return DM_OK;
        if (s == DM_ERR_CLOSED)
            return s;
        if (dm_now_ns() > give_up || s == DM_ERR_FENCED)
            dm_fatal(h,
                     "no free frame for a store to address 0x%llx before the deadline of %.1f s (%s). The "
                     "device has %u frames of %u bytes: free buffers or drop Refs, create the fabric larger, "
                     "or map with reserve=True to be refused early instead",
                     (unsigned long long)addr, (double)h->deadline_ns / 1e9,
                     e.text[0] ? e.text : "the coordinator has none left", h->nr_frames,
                     1u << h->page_shift);
        /* Others may free some meanwhile, in this process too. */
        dm_unlock(h);
        (void)poll(NULL, 0, (int)pause);
        dm_lock(h);
        if (h->free.nr_free)
            return DM_OK;
    }
}

static void reserve_used(struct dm_host *h, struct dm_vma *v, uint32_t nr) {
    uint32_t used = nr < v->reserved ? nr : v->reserved;
    v->reserved -= used;
    h->nr_reserved -= used;
    h->entry->nr_reserved = h->nr_reserved;
}

static void show_or_die(struct dm_host *h, uint32_t page, uint32_t pfn, uint32_t nr) {
    struct dm_error e = {0};
    if (dm_show(h, page, pfn, nr, true, &e))
        dm_fatal(h, "cannot map a frame at 0x%llx: %s: %s (%u kernel mappings in use by this layer; see "
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
}

/* Copy completely, repoint, then drop the count. The old frames cannot change meanwhile: this host still holds a
 * count of each, so whoever else holds one sees it shared. */
static void copy_on_write(struct dm_host *h, struct dm_vma *v, uint32_t page, const struct dm_run *run) {
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_COW, page, run->count, run->pfn, 0, 0);
    dm_frames_enter_use(h, run->pfn, run->count);
    copy_frames(h, page, run);
    show_or_die(h, page, run->pfn, run->count);
    struct dm_run freed = {0, 0};
    for (uint32_t i = 0; i < run->count; i++) {
        uint32_t pte = h->pt[page + i], old = pte & DM_PTE_PFN;
        in->old = old;
        __atomic_store_n(&h->pt[page + i], (pte & DM_PTE_HEAD) | DM_PTE_PRESENT | (run->pfn + i),
                         __ATOMIC_RELEASE);
        dm_intent_progress(in, i + 1);
        /* Two hosts may copy the same frame at once: the drop that returns "last" reclaims it. */
        if (dm_count_down(h, old))
            dm_freed_add(h, &freed, old);
    }
    dm_freed_end(h, &freed);
    dm_intent_end(in);
    v->flags |= DM_VMA_DIRTY;
    reserve_used(h, v, run->count);
}

static void fill_holes(struct dm_host *h, struct dm_vma *v, uint32_t page, const struct dm_run *run) {
    uint64_t bytes = (uint64_t)run->count << h->page_shift;
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_FILL, page, run->count, run->pfn, 0, 0);
    dm_frames_enter_use(h, run->pfn, run->count);
    memset(dm_frame_data(h, run->pfn), 0, bytes);
    show_or_die(h, page, run->pfn, run->count);
    dm_pt_set(h, page, run->pfn, run->count, h->pt[page] & DM_PTE_HEAD);
    dm_intent_end(in);
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

/* Resolve one fault. Context: host lock held, may be dropped and taken again inside. */
static void resolve(struct handler *t, uint64_t addr, bool wp) {
    struct dm_host *h = t->h;
    uint32_t page = dm_page_of(h, addr);
    if (wp)
        DM_COUNT(h, wp_faults, 1);
    else
        DM_COUNT(h, missing_faults, 1);
    for (;;) {
        uint32_t id = h->vma_of[page], pte = h->pt[page];
        if (!id)
            dm_fatal(h,
                     "a thread stored to 0x%llx, which is no longer its memory: the buffer there was freed, "
                     "moved or handed over while a raw pointer to it was kept",
                     (unsigned long long)addr);
        struct dm_vma *v = &h->vmas[id];
        struct span s;
        struct dm_run run;
        bool waited = false;
        if (pte & DM_PTE_HOLE) {
            s = choose_holes(h, v, page);
        } else if (!(h->kstate[page] & DM_KS_PROTECTED)) {
            DM_COUNT(h, spurious_faults, 1);
            (void)dm_wake(h, page, 1);
            return;
        } else if (copyable(h, page, true)) {
            s = choose(h, v, page, true);
        } else {
            s = choose(h, v, page, false);
            upgrade(h, v, s);
            v->next_fault = s.page + s.nr;
            return;
        }
        /* One piece of frames may be shorter than the span: what contains the faulting page goes first. */
        uint32_t skip = page - s.page;
        if (frames_for(t, v, addr, s.nr, &run, &waited))
            return;
        if (waited)
            continue;
        if (run.count <= skip) {
            s.page = page;
            s.nr -= skip;
        }
        if (run.count > s.nr) {
            dm_frame_freed(h, run.pfn + s.nr, run.count - s.nr);
            run.count = s.nr;
        }
        if (pte & DM_PTE_HOLE)
            fill_holes(h, v, s.page, &run);
        else
            copy_on_write(h, v, s.page, &run);
        v->next_fault = s.page + run.count;
        (void)dm_wake(h, s.page, run.count);
        return;
    }
}

/* ---------------------------------------------------------------- the thread */

/* Follow the faulting thread to its CPU: waking a sleeper on one's own CPU is several times cheaper than on an idle
 * other one. Looked up now and then, after the fault is served. */
static void follow(struct handler *t, uint32_t tid) {
    if (!tid || (t->cpu_checks++ & 7))
        return;
    if (tid != t->tid || t->tid_fd < 0) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/task/%u/stat", tid);
        if (t->tid_fd >= 0)
            close(t->tid_fd);
        t->tid_fd = open(path, O_RDONLY | O_CLOEXEC);
        t->tid = tid;
    }
    char text[1024];
    ssize_t n = t->tid_fd < 0 ? -1 : pread(t->tid_fd, text, sizeof text - 1, 0);
    t->h->entry->counters[DM_CNT_syscalls] += 3;
    if (n <= 0) {
        if (t->tid_fd >= 0)
            close(t->tid_fd);
        t->tid_fd = -1;
        return;
    }
    text[n] = 0;
    char *p = strrchr(text, ')'); /* field 2 may hold anything; the CPU is field 39 */
    for (int field = 2; p && field < 39; field++)
        p = strchr(p + 1, ' ');
    int cpu = p ? atoi(p + 1) : -1;
    if (cpu < 0 || cpu >= CPU_SETSIZE || cpu == sched_getcpu())
        return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one) < 0)
        t->cpu_checks = 1; /* not ours to run on: stay where we are */
}

static void answer_bell(struct dm_host *h) {
    struct uffdio_zeropage z = {.range = {(uintptr_t)h->bell, DM_BELL_BYTES}};
    if (ioctl(h->uffd, UFFDIO_ZEROPAGE, &z) < 0 && errno != EEXIST)
        dm_fatal(h, "cannot answer the bell page: %s", strerror(errno));
}

static void serve_events(struct handler *t) {
    struct dm_host *h = t->h;
    struct uffd_msg events[EVENTS_PER_READ];
    ssize_t n = read(h->uffd, events, sizeof events);
    DM_COUNT(h, syscalls, 1);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0 || n % (ssize_t)sizeof events[0])
        dm_fatal(h, "reading the userfaultfd failed: %s", n < 0 ? strerror(errno) : "short read");
    uint64_t start = dm_now_ns();
    uint32_t tid = 0;
    dm_lock(h);
    DM_COUNT(h, handler_wakeups, 1);
    for (size_t i = 0; i < (size_t)n / sizeof events[0]; i++) {
        if (events[i].event != UFFD_EVENT_PAGEFAULT)
            dm_fatal(h, "unexpected userfaultfd event %u", events[i].event);
        if (events[i].arg.pagefault.address - (uint64_t)(uintptr_t)h->bell < DM_BELL_BYTES) {
            answer_bell(h);
            continue;
        }
        tid = events[i].arg.pagefault.feat.ptid;
        resolve(t, events[i].arg.pagefault.address,
                events[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP);
    }
    DM_COUNT(h, handler_ns, dm_now_ns() - start);
    dm_unlock(h);
    follow(t, tid);
}

static void serve_guard(struct handler *t, short revents) {
    struct dm_host *h = t->h;
    struct {
        struct dm_msg_header head;
        char payload[64];
    } m;
    ssize_t n = revents & POLLIN ? recv(h->guard_fd, &m, sizeof m, MSG_DONTWAIT) : 0;
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n < (ssize_t)sizeof m.head) { /* the coordinator is gone: try to be guarded by its successor */
        close(h->guard_fd);
        h->guard_fd = -1;
        t->next_guard_try = 0;
        return;
    }
    if (m.head.type == DM_MSG_NOTIFY_FENCED)
        dm_fatal(h, "the coordinator declared this host dead; what it held is no longer its own");
    if (m.head.type == DM_MSG_NOTIFY_RECALL) {
        struct dm_error e = {0};
        dm_lock(h);
        h->batch = h->batch_min;
        h->high = 2 * h->batch_min;
        (void)dm_give_back(h, &t->link, h->low, &e);
        dm_unlock(h);
    }
}

static void reguard(struct handler *t) {
    uint64_t now = dm_now_ns();
    if (now < t->next_guard_try)
        return;
    struct dm_error e = {0};
    int s = dm_guard_open(t->h, &e);
    if (s == DM_ERR_FENCED || e.wire_status == DM_WIRE_FENCED)
        dm_fatal(t->h, "the coordinator declared this host dead; what it held is no longer its own");
    t->next_guard_try = now + 100000000u;
}

/* Keep the descriptors the handler needs, close the rest of this thread's own table. */
static void keep_descriptors(const struct dm_host *h) {
    int keep[] = {2, h->uffd, h->guard_fd, h->device_fd};
    enum { N = sizeof keep / sizeof keep[0] };
    for (int i = 1; i < N; i++)
        for (int j = i; j > 0 && keep[j] < keep[j - 1]; j--) {
            int t = keep[j];
            keep[j] = keep[j - 1];
            keep[j - 1] = t;
        }
    unsigned from = 0;
    for (int i = 0; i < N; i++) {
        if (keep[i] > (int)from)
            (void)syscall(SYS_close_range, from, (unsigned)keep[i] - 1, 0);
        if (keep[i] >= (int)from)
            from = (unsigned)keep[i] + 1;
    }
    (void)syscall(SYS_close_range, from, ~0u, 0);
}

static void *handler_main(void *arg) {
    struct handler t = {.h = arg, .link = {.fd = -1}, .tid_fd = -1};
    struct dm_host *h = t.h;
    dm_in_handler = true;
    pthread_setname_np(pthread_self(), "dmrpc-fault");
    pthread_mutex_lock(&h->handler_alive);
    if (unshare(CLONE_FILES) < 0) {
        atomic_store(&h->handler_state, -errno);
        pthread_mutex_unlock(&h->handler_alive);
        return NULL;
    }
    keep_descriptors(h);
    atomic_store(&h->handler_tid, (int)syscall(SYS_gettid));
    atomic_store(&h->handler_state, 1);
    while (atomic_load(&h->handler_state) == 1) {
        struct pollfd p[2] = {{.fd = h->uffd, .events = POLLIN}, {.fd = h->guard_fd, .events = POLLIN}};
        /* No time-out while all is well: arming a timer costs as much as the rest of a wake-up. */
        int n = poll(p, 2, h->guard_fd < 0 ? 100 : -1);
        DM_COUNT(h, syscalls, n > 0);
        if (n < 0 && errno != EINTR)
            dm_fatal(h, "poll failed in the fault handler: %s", strerror(errno));
        if (n > 0 && p[0].revents)
            serve_events(&t);
        if (n > 0 && p[1].revents && h->guard_fd >= 0)
            serve_guard(&t, p[1].revents);
        if (h->guard_fd < 0)
            reguard(&t);
    }
    dm_link_close(&t.link);
    if (t.tid_fd >= 0)
        close(t.tid_fd);
    atomic_store(&h->handler_state, 3);
    pthread_mutex_unlock(&h->handler_alive);
    return NULL;
}

/* Gets the mutex when the handler ends: in order, or because something killed that one thread. */
static void *watcher_main(void *arg) {
    struct dm_host *h = arg;
    pthread_setname_np(pthread_self(), "dmrpc-watch");
    int got = pthread_mutex_lock(&h->handler_alive);
    if (got == EOWNERDEAD)
        pthread_mutex_consistent(&h->handler_alive);
    if (atomic_load(&h->handler_state) != 3)
        dm_fatal(h, "the fault handler thread died; without it no store to shared memory can be served");
    pthread_mutex_unlock(&h->handler_alive);
    return NULL;
}

int dm_handler_start(struct dm_host *h, struct dm_error *e) {
    pthread_mutexattr_t robust;
    pthread_mutexattr_init(&robust);
    pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&h->handler_alive, &robust);
    pthread_mutexattr_destroy(&robust);
    sigset_t all, before; /* Python's signals are for Python's threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&h->handler, NULL, handler_main, h);
    if (!failed) {
        while (atomic_load(&h->handler_state) == 0)
            sched_yield();
        if (atomic_load(&h->handler_state) < 0) {
            pthread_join(h->handler, NULL);
            failed = -atomic_load(&h->handler_state);
        } else if ((failed = pthread_create(&h->watcher, NULL, watcher_main, h))) {
            h->watcher = h->handler;
            dm_handler_stop(h);
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        errno = failed;
        return dm_fail_sys(e, "pthread_create", 0);
    }
    return DM_OK;
}

/* Context: no lock held. The bell is a page that was never touched: the store raises a fault, which wakes the handler
 * through the one descriptor it always has, whatever was closed in the rest of the process. */
void dm_handler_stop(struct dm_host *h) {
    atomic_store(&h->handler_state, 2);
    *(volatile char *)h->bell = 1;
    pthread_join(h->handler, NULL);
    if (h->watcher != h->handler)
        pthread_join(h->watcher, NULL);
    pthread_mutex_destroy(&h->handler_alive);
}
