/*
 * handler.c - the native threads of a host: fault handler, supplier, watcher.
 *
 * Facts, and what they force on us:
 * - The thread that faults usually holds the GIL. No thread here takes it, calls into Python, or touches a page of the
 *   windows.
 * - Any thread of the process may close any descriptor (os.closerange). The handler unshares its descriptor table
 *   and keeps only what it needs; the supplier, which it creates, shares that table. Nothing closed elsewhere
 *   can stop them, and no number can be reused under them.
 * - A fault that waits for a frame must not hold up one that needs none. The handler never asks the coordinator:
 *   it puts such faults aside and wakes the supplier, which asks, and rings when there is something to retry.
 * - A dead handler would leave faulting threads asleep for ever. It holds a robust mutex all its life; the watcher waits
 *   for that mutex, gets it when the kernel cleans up after the handler, and stops the process.
 * - The faulting thread sleeps, so its CPU is the cheapest to run the rest on: the handler follows it there.
 * - Arming a timer costs as much as the rest of a wake-up: the handler waits without a time-out.
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
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dm.h"
#include "fault.h"
#include "uffd.h"

_Thread_local bool dm_in_handler; /* this thread has the handler's descriptor table */

#define EVENTS_PER_READ 16
#define MAX_WAITING 4096 /* threads that wait for a frame at once */

struct waiting {
    uint64_t addr, since_ns;
    uint32_t tid;
};

struct handler {
    struct dm_host *h;
    int ring_fd; /* supplier -> handler: retry, or look at guard_fd again */
    int tid_fd;
    uint32_t tid, cpu_checks;
    struct dm_stray last_stray;

    /* under the host's lock */
    pthread_t supplier;
    struct waiting waiting[MAX_WAITING];
    uint32_t nr_waiting;
    bool rang, reguard, recall, stop;
    uint32_t recall_want, recall_keep;
    struct dm_link link; /* the supplier's */
};

/* ---------------------------------------------------------------- supplier */

static void ring(struct handler *t) {
    uint64_t one = 1;
    if (write(t->ring_fd, &one, sizeof one) != sizeof one)
        dm_fatal(t->h, "cannot wake the fault handler: %s", strerror(errno));
}

static void out_of_time(struct handler *t, const struct dm_error *e) {
    struct dm_host *h = t->h;
    dm_fatal(h,
             "no free frame for a store to address 0x%llx before the deadline of %.1f s (%s). The "
             "device "
             "has %u frames of %u bytes: free buffers or drop Refs, create the fabric larger, or "
             "map with "
             "reserve=True to be refused early instead",
             (unsigned long long)t->waiting[0].addr, (double)h->deadline_ns / 1e9,
             e->text[0] ? e->text : "the coordinator has none left", h->nr_frames,
             1u << h->page_shift);
}

static bool can_retry(const struct handler *t) {
    return t->nr_waiting && !t->rang && dm_unpromised(t->h) > 0;
}

/* While the coordinator is asked, which may take long, other threads of this process may free frames. */
static void between(void *arg) {
    struct handler *t = arg;
    dm_lock(t->h);
    if (can_retry(t)) {
        t->rang = true;
        ring(t);
    }
    dm_unlock(t->h);
}

/* Get frames for the faults put aside. Frames that are free in this host may also come from its other threads. */
static void supply(struct handler *t, unsigned *pause_ms) {
    struct dm_host *h = t->h;
    struct dm_error e = {0};
    if (dm_unpromised(h) == 0 && dm_refill(h, &t->link, 1, 1, &e) != DM_OK && !t->rang &&
        dm_unpromised(h) == 0) {
        if (t->stop || h->closed)
            return;
        if (atomic_load(&h->fenced))
            dm_fatal(h,
                     "the coordinator declared this host dead; what it held is no longer its own");
        if (t->nr_waiting && dm_now_ns() - t->waiting[0].since_ns > h->deadline_ns)
            out_of_time(t, &e);
        dm_unlock(h);
        (void)poll(NULL, 0, (int)*pause_ms);
        dm_lock(h);
        *pause_ms = *pause_ms < 50 ? *pause_ms * 2 : 50;
    }
    if (can_retry(t)) {
        *pause_ms = 1;
        t->rang = true;
        ring(t);
    }
    while (t->rang && !t->stop)
        dm_wait_for_work(h);
}

/* The coordinator went away: be guarded by its successor as soon as there is one. */
static void guard_again(struct handler *t) {
    struct dm_host *h = t->h;
    struct dm_error e = {0};
    dm_unlock(h);
    int s = dm_guard_open(h, &e);
    if (s == DM_ERR_FENCED || e.wire_status == DM_WIRE_FENCED)
        dm_fatal(h, "the coordinator declared this host dead; what it held is no longer its own");
    if (s)
        (void)poll(NULL, 0, 100);
    else
        ring(t);
    dm_lock(h);
    t->reguard = s != DM_OK;
}

/* What is wanted, and all above the low watermark: others are short. The coordinator waits for an answer. */
static void give_back_recalled(struct handler *t) {
    struct dm_host *h = t->h;
    struct dm_error e = {0};
    dm_all_home(h);
    uint32_t free = h->free.nr_free, leave = free > t->recall_want ? free - t->recall_want : 0;
    if (leave > h->low)
        leave = h->low;
    if (leave < t->recall_keep)
        leave = t->recall_keep;
    t->recall = false;
    h->batch = h->batch_min;
    h->high = 2 * h->batch_min;
    if (dm_give_back(h, &t->link, leave, &e) == DM_OK && h->free.nr_free == free)
        (void)dm_give_back_none(h, &t->link, &e);
}

/* Give back above the high watermark; the limit grows while a host keeps receiving more than it uses. */
static void balance(struct handler *t) {
    struct dm_host *h = t->h;
    struct dm_error e = {0};
    h->wants_balance = false;
    if (!dm_too_many_free(h))
        return;
    (void)dm_give_back(h, &t->link, h->high / 2 + h->nr_reserved, &e);
    if (h->high < 2 * h->batch_max)
        h->high *= 2;
}

/* Below the low watermark: ask before somebody has to wait. When the pool is short, not again at once. */
static void refill_ahead(struct handler *t) {
    struct dm_host *h = t->h;
    struct dm_error e = {0};
    h->wants_refill = false;
    if (dm_unpromised(h) < h->low && dm_refill(h, &t->link, 1, 1, &e) != DM_OK)
        h->no_refill_before_ns = dm_now_ns() + 100000000u;
}

static void *supplier_main(void *arg) {
    struct handler *t = arg;
    struct dm_host *h = t->h;
    unsigned pause_ms = 1;
    dm_in_handler = true;
    pthread_setname_np(pthread_self(), "dmrpc-supply");
    dm_lock(h);
    while (!t->stop) {
        if (t->nr_waiting)
            supply(t, &pause_ms);
        else if (t->recall)
            give_back_recalled(t);
        else if (h->wants_balance)
            balance(t);
        else if (h->wants_refill)
            refill_ahead(t);
        else if (t->reguard)
            guard_again(t);
        else
            dm_wait_for_work(h);
    }
    dm_unlock(h);
    dm_link_close(&t->link);
    return NULL;
}

/* ---------------------------------------------------------------- fault handler */

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

/* The pages around some address were served: so are the faults there that were put aside. Their threads are awake, and
 * their buffer may be gone by the time the list is looked at. */
static void forget_served(struct handler *t) {
    uint32_t left = 0;
    for (uint32_t i = 0; i < t->nr_waiting; i++)
        if (dm_fault_pending(t->h, t->waiting[i].addr))
            t->waiting[left++] = t->waiting[i];
    t->nr_waiting = left;
}

static void put_aside(struct handler *t, uint64_t addr, uint32_t tid, uint64_t since_ns) {
    /* A signal interrupts a waiting thread, which then faults again. */
    for (uint32_t i = 0; i < t->nr_waiting; i++)
        if (t->waiting[i].tid == tid && t->waiting[i].addr == addr)
            return;
    if (t->nr_waiting == MAX_WAITING)
        dm_fatal(t->h, "more than %d threads wait for a free frame", MAX_WAITING);
    t->waiting[t->nr_waiting++] = (struct waiting){addr, since_ns, tid};
    pthread_cond_signal(&t->h->work);
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
    h->entry->heartbeat_ns = start;
    dm_lock(h);
    DM_COUNT(h, handler_wakeups, 1);
    for (size_t i = 0; i < (size_t)n / sizeof events[0]; i++) {
        if (events[i].event != UFFD_EVENT_PAGEFAULT)
            dm_fatal(h, "unexpected userfaultfd event %u", events[i].event);
        uint64_t addr = events[i].arg.pagefault.address;
        if (addr - (uint64_t)(uintptr_t)h->bell < DM_BELL_BYTES) {
            answer_bell(h);
            continue;
        }
        tid = events[i].arg.pagefault.feat.ptid;
        if (events[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)
            DM_COUNT(h, wp_faults, 1);
        else
            DM_COUNT(h, missing_faults, 1);
        if (dm_serve_fault(h, &t->last_stray, addr, tid) == DM_FAULT_NO_FRAME)
            put_aside(t, addr, tid, start);
        else if (t->nr_waiting)
            forget_served(t);
    }
    DM_COUNT(h, handler_ns, dm_now_ns() - start);
    dm_unlock(h);
    follow(t, tid);
}

/* The supplier rang: try the faults that were put aside again, oldest first. */
static void retry(struct handler *t) {
    struct dm_host *h = t->h;
    uint64_t rung;
    if (read(t->ring_fd, &rung, sizeof rung) != sizeof rung)
        return;
    dm_lock(h);
    uint32_t left = 0;
    for (uint32_t i = 0; i < t->nr_waiting; i++) {
        struct waiting w = t->waiting[i];
        if (!dm_fault_pending(h, w.addr))
            (void)dm_wake(h, dm_page_of(h, w.addr), 1);
        else if (dm_serve_fault(h, &t->last_stray, w.addr, w.tid) == DM_FAULT_NO_FRAME)
            t->waiting[left++] = w;
    }
    t->nr_waiting = left;
    t->rang = false;
    pthread_cond_signal(&h->work);
    dm_unlock(h);
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
    if (n >= (ssize_t)sizeof m.head && m.head.type == DM_MSG_NOTIFY_FENCED)
        dm_fatal(h, "the coordinator declared this host dead; what it held is no longer its own");
    dm_lock(h);
    if (n < (ssize_t)sizeof m.head) {
        close(h->guard_fd);
        h->guard_fd = -1;
        t->reguard = true;
    } else if (m.head.type == DM_MSG_NOTIFY_RECALL) {
        struct dm_msg_recall ask = {0, 0};
        if (n >= (ssize_t)(sizeof m.head + sizeof ask))
            memcpy(&ask, m.payload, sizeof ask);
        /* One that was not seen to yet is contained in this one. */
        t->recall_want = t->recall && t->recall_want > ask.want ? t->recall_want : ask.want;
        t->recall_keep = t->recall && t->recall_keep < ask.keep ? t->recall_keep : ask.keep;
        t->recall = true;
    }
    pthread_cond_signal(&h->work);
    dm_unlock(h);
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

static int start_supplier(struct handler *t) {
    t->ring_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (t->ring_fd < 0)
        return errno;
    return pthread_create(&t->supplier, NULL, supplier_main, t);
}

static void stop_supplier(struct handler *t) {
    struct dm_host *h = t->h;
    dm_lock(h);
    t->stop = true;
    pthread_cond_signal(&h->work);
    dm_unlock(h);
    pthread_join(t->supplier, NULL);
}

static void serve(struct handler *t) {
    struct dm_host *h = t->h;
    while (atomic_load(&h->handler_state) == 1) {
        struct pollfd p[3] = {{.fd = h->uffd, .events = POLLIN},
                              {.fd = h->guard_fd, .events = POLLIN},
                              {.fd = t->ring_fd, .events = POLLIN}};
        int n = poll(p, 3, -1);
        DM_COUNT(h, syscalls, 1);
        if (n < 0 && errno != EINTR)
            dm_fatal(h, "poll failed in the fault handler: %s", strerror(errno));
        if (n <= 0)
            continue;
        if (p[0].revents)
            serve_events(t);
        if (p[1].revents)
            serve_guard(t, p[1].revents);
        if (p[2].revents)
            retry(t);
    }
}

static void *handler_main(void *arg) {
    struct dm_host *h = arg;
    dm_in_handler = true;
    pthread_setname_np(pthread_self(), "dmrpc-fault");
    pthread_mutex_lock(&h->handler_alive);
    struct handler *t = calloc(1, sizeof *t);
    int failed = !t ? ENOMEM : unshare(CLONE_FILES) < 0 ? errno : 0;
    if (!failed) {
        t->h = h;
        t->link = (struct dm_link){.fd = -1, .between = between, .between_arg = t};
        t->tid_fd = -1;
        keep_descriptors(h);
        failed = start_supplier(t);
    }
    if (failed) {
        free(t);
        atomic_store(&h->handler_state, -failed);
        pthread_mutex_unlock(&h->handler_alive);
        return NULL;
    }
    atomic_store(&h->handler_tid, (int)syscall(SYS_gettid));
    atomic_store(&h->handler_state, 1);
    serve(t);
    stop_supplier(t);
    free(t);
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
        dm_fatal(
            h, "the fault handler thread died; without it no store to shared memory can be served");
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
