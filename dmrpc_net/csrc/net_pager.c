/* net_pager.c - see net_pager.h: regions, and the thread that serves their faults. Fetching is in net_pager_io.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "net_pager_io.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#define FEATURE_POISON (1ull << 14) /* Linux 6.6 */
struct poison_range {
    struct uffdio_range range;
    uint64_t mode;
    int64_t updated;
};
#define IOC_POISON _IOWR(UFFDIO, 0x08, struct poison_range)
struct continue_range {
    struct uffdio_range range;
    uint64_t mode;
    int64_t mapped;
};
#define IOC_CONTINUE _IOWR(UFFDIO, 0x07, struct continue_range)
#define CONTINUE_MODE_DONTWAKE (1ull << 0)
#define CONTINUE_MODE_WP (1ull << 1) /* Linux 6.4 */
#define REGISTER_MODE_MINOR (1ull << 2)
#define FEATURE_MINOR_SHMEM (1ull << 10)
#define FEATURE_WP_SHMEM (1ull << 12)

#define FETCH_PAGES 256u /* at once */
#define EVENTS_PER_READ 16

struct net_pager {
    int uffd, wake;
    bool poisons, protects; /* what the kernel can */
    pid_t owner;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t idle;         /* a region is not busy any more */
    struct net_region **regions; /* by address */
    uint32_t nr_regions, capacity;
    uint64_t deadline_ns;
    struct net_pager_stats stats;
    struct net_routes *routes;
};

/* What others look at without the lock: whole, and in no order with anything. */
static void set(bool *flag, bool to) { __atomic_store_n(flag, to, __ATOMIC_RELAXED); }

static bool is_present(const struct net_region *r, uint64_t page) {
    return r->present[page >> 3] >> (page & 7) & 1;
}

static void set_present(struct net_region *r, uint64_t page) {
    r->present[page >> 3] |= (uint8_t)(1u << (page & 7));
    __atomic_store_n(&r->nr_present, r->nr_present + 1, __ATOMIC_RELAXED);
}

/* ---------------------------------------------------------------- ioctls; the lock is held */

static void wake(struct net_pager *p, struct net_region *r, uint64_t page, uint64_t nr) {
    struct uffdio_range range = {(uint64_t)r->run.front + page * NET_PAGE, nr * NET_PAGE};
    (void)ioctl(p->uffd, UFFDIO_WAKE, &range);
}

static int protect(struct net_pager *p, struct net_region *r, bool on) {
    struct uffdio_writeprotect wp = {
        .range = {(uint64_t)r->run.front, r->run.nr_pages * NET_PAGE},
        .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };
    int status;
    while ((status = ioctl(p->uffd, UFFDIO_WRITEPROTECT, &wp)) != 0 && errno == EAGAIN)
        ;
    return status ? errno : 0;
}

static int map_one_run(struct net_pager *p, struct net_region *r, uint64_t page, uint64_t nr,
                       uint64_t *done) {
    struct continue_range c = {
        .range = {(uint64_t)r->run.front + page * NET_PAGE, nr * NET_PAGE},
        .mode = CONTINUE_MODE_DONTWAKE | (r->dirty ? 0 : CONTINUE_MODE_WP),
    };
    if (!p->protects && !r->dirty) { /* a store would not be noticed */
        set(&r->dirty, true);
        c.mode &= ~CONTINUE_MODE_WP;
    }
    int failed = ioctl(p->uffd, IOC_CONTINUE, &c) ? errno : 0;
    *done = c.mapped > 0 ? (uint64_t)c.mapped / NET_PAGE : 0;
    if (failed == EINVAL && c.mode & CONTINUE_MODE_WP && p->protects) { /* before Linux 6.4 */
        p->protects = false;
        failed = EAGAIN;
    }
    return failed;
}

/* Have the front show pages that it does not, and that are filled at the back. */
static int map_pages(struct net_pager *p, struct net_region *r, uint64_t page, uint64_t nr) {
    int again = 0;
    while (nr) {
        uint64_t done, run = 1;
        if (is_present(r, page)) {
            wake(p, r, page, 1);
            page++, nr--;
            continue;
        }
        while (run < nr && !is_present(r, page + run))
            run++;
        int failed = map_one_run(p, r, page, run, &done);
        if (failed && failed != EAGAIN && failed != EEXIST && !done)
            return failed;
        if (failed == EEXIST && !done) { /* not what was received, and not protected */
            (void)madvise(r->run.front + page * NET_PAGE, NET_PAGE, MADV_DONTNEED);
            if (++again > 100)
                return failed;
        }
        for (uint64_t i = 0; i < done; i++)
            set_present(r, page + i);
        if (done) /* who waits finds it counted */
            wake(p, r, page, done);
        page += done, nr -= done;
    }
    return 0;
}

/* A page that is here, of which the front has lost sight: it was never touched there, or the kernel wanted memory. */
static void map_again(struct net_pager *p, struct net_region *r, uint64_t page) {
    volatile char *at = r->run.back + page * NET_PAGE;
    uint64_t done;
    (void)*at;
    while (map_one_run(p, r, page, 1, &done) == EAGAIN)
        ;
    wake(p, r, page, 1);
}

/* Never wrong bytes: what is missing ends whoever touches it. */
static void give_up(struct net_pager *p, struct net_region *r, const char *why) {
    static const char text[] = "dmrpc_net: bytes of a memory server cannot be had: ";
    set(&r->failed, true);
    p->stats.nr_failed++;
    struct iovec parts[] = {{(void *)text, sizeof text - 1}, {(void *)why, strlen(why)}, {"\n", 1}};
    ssize_t ignored = writev(2, parts, 3);
    (void)ignored;
    for (uint64_t page = 0; page < r->run.nr_pages; page++) {
        if (is_present(r, page))
            continue;
        uint64_t run = 1;
        while (page + run < r->run.nr_pages && !is_present(r, page + run))
            run++;
        struct poison_range poison = {
            .range = {(uint64_t)r->run.front + page * NET_PAGE, run * NET_PAGE}};
        if (!p->poisons || ioctl(p->uffd, IOC_POISON, &poison))
            (void)kill(getpid(), SIGBUS);
        page += run;
    }
}

/* ---------------------------------------------------------------- faults */

static struct net_region *region_at(struct net_pager *p, uint64_t address) {
    uint32_t lo = 0, hi = p->nr_regions;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if ((uint64_t)p->regions[mid]->run.front <= address)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (!lo)
        return NULL;
    struct net_region *r = p->regions[lo - 1];
    return address < (uint64_t)r->run.front + r->run.nr_pages * NET_PAGE ? r : NULL;
}

/* Fetch a run of missing pages; the lock is let go meanwhile. */
static int fetch(struct net_pager *p, struct net_region *r, uint64_t page, uint64_t nr,
                 uint64_t until_ns, const char **why) {
    uint64_t offset = page * NET_PAGE, bytes = nr * NET_PAGE;
    int status = 0;
    if (offset + bytes > r->length)
        bytes = r->length - offset;
    if (r->key) {
        pthread_mutex_unlock(&p->lock);
        status = net_routes_get(p->routes, r, offset, bytes, r->run.back + offset, until_ns, why);
        pthread_mutex_lock(&p->lock);
        p->stats.nr_requests++;
        p->stats.bytes_fetched += bytes;
    } else {
        bytes = 0;
    }
    if (status)
        return status;
    memset(r->run.back + offset + bytes, 0, nr * NET_PAGE - bytes);
    status = map_pages(p, r, page, nr);
    if (status)
        *why = strerror(status);
    return status;
}

/* What to fetch for a fault: how many pages from `page` on, all of them missing. */
static uint64_t extent(struct net_region *r, uint64_t page) {
    uint64_t most = FETCH_PAGES, nr = 1;
    if (!r->whole) {
        r->window = page == r->next_page && r->window ? 2 * r->window : 1;
        if (r->window > most)
            r->window = most;
        most = r->window;
    }
    while (nr < most && page + nr < r->run.nr_pages && !is_present(r, page + nr))
        nr++;
    return nr;
}

static void missing(struct net_pager *p, struct net_region *r, uint64_t page, bool store) {
    const uint64_t until_ns = net_pager_now() + p->deadline_ns;
    const char *why = "";
    if (is_present(r, page)) {
        map_again(p, r, page);
        return;
    }
    if (r->failed) {
        wake(p, r, page, 1);
        return;
    }
    if (store && !r->dirty) {
        set(&r->dirty, true);
        (void)protect(p, r, false);
    }
    r->busy = true;
    for (uint64_t at = page; r->nr_present < r->run.nr_pages;) {
        uint64_t nr = extent(r, at);
        if (fetch(p, r, at, nr, until_ns, &why)) {
            give_up(p, r, why);
            break;
        }
        at += nr;
        r->next_page = at;
        if (!r->whole)
            break;
        for (uint64_t i = 0; i < r->run.nr_pages && is_present(r, at % r->run.nr_pages); i++)
            at++;
        at %= r->run.nr_pages;
    }
    r->busy = false;
    pthread_cond_broadcast(&p->idle);
    wake(p, r, page, 1);
}

static void serve(struct net_pager *p, const struct uffd_msg *m) {
    if (m->event != UFFD_EVENT_PAGEFAULT)
        return;
    const uint64_t address = m->arg.pagefault.address, flags = m->arg.pagefault.flags;
    pthread_mutex_lock(&p->lock);
    struct net_region *r = region_at(p, address);
    if (r && (flags & UFFD_PAGEFAULT_FLAG_WP)) {
        p->stats.nr_stores++;
        set(&r->dirty, true);
        (void)protect(p, r, false); /* wakes */
    } else if (r) {
        p->stats.nr_faults++;
        missing(p, r, (address - (uint64_t)r->run.front) / NET_PAGE,
                flags & UFFD_PAGEFAULT_FLAG_WRITE);
    } else { /* it was just removed */
        struct uffdio_range range = {address & ~(uint64_t)(NET_PAGE - 1), NET_PAGE};
        (void)ioctl(p->uffd, UFFDIO_WAKE, &range);
    }
    pthread_mutex_unlock(&p->lock);
}

static void *run(void *arg) {
    struct net_pager *p = arg;
    struct uffd_msg messages[EVENTS_PER_READ];
    pthread_setname_np(pthread_self(), "dmrpc-pager");
    for (;;) {
        struct pollfd polled[2] = {{.fd = p->uffd, .events = POLLIN},
                                   {.fd = p->wake, .events = POLLIN}};
        (void)poll(polled, 2, -1);
        if (polled[1].revents)
            return NULL;
        ssize_t n = read(p->uffd, messages, sizeof messages);
        for (ssize_t i = 0; i * (ssize_t)sizeof messages[0] < n; i++)
            serve(p, &messages[i]);
    }
}

/* ---------------------------------------------------------------- regions */

int net_pager_add(struct net_pager *p, struct net_region *r, bool all_present) {
    struct uffdio_register reg = {
        .range = {(uint64_t)r->run.front, r->run.nr_pages * NET_PAGE},
        .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP | REGISTER_MODE_MINOR,
    };
    int status = 0;
    if (!(r->present = calloc((r->run.nr_pages + 7) / 8, 1)))
        return ENOMEM;
    if (all_present) {
        memset(r->present, 0xff, (r->run.nr_pages + 7) / 8);
        r->nr_present = r->run.nr_pages;
    }
    pthread_mutex_lock(&p->lock);
    if (p->nr_regions == p->capacity) {
        uint32_t capacity = p->capacity ? 2 * p->capacity : 64;
        struct net_region **grown = realloc(p->regions, capacity * sizeof *grown);
        if (grown) {
            p->regions = grown;
            p->capacity = capacity;
        } else {
            status = ENOMEM;
        }
    }
    if (!status && ioctl(p->uffd, UFFDIO_REGISTER, &reg))
        status = errno;
    /* Only now: as long as the run was not registered, a fault of a neighbour's could map its old pages again. */
    if (!status && !all_present && !net_arena_hide(&r->run))
        status = errno;
    if (status)
        (void)ioctl(p->uffd, UFFDIO_UNREGISTER, &reg.range);
    if (!status) {
        uint32_t at = p->nr_regions++;
        for (; at && p->regions[at - 1]->run.front > r->run.front; at--)
            p->regions[at] = p->regions[at - 1];
        p->regions[at] = r;
    }
    pthread_mutex_unlock(&p->lock);
    if (status) {
        free(r->present);
        r->present = NULL;
    }
    return status;
}

bool net_pager_remove(struct net_pager *p, struct net_region *r) {
    struct uffdio_range range = {(uint64_t)r->run.front, r->run.nr_pages * NET_PAGE};
    pthread_mutex_lock(&p->lock);
    while (r->busy)
        pthread_cond_wait(&p->idle, &p->lock);
    for (uint32_t i = 0; i < p->nr_regions; i++) {
        if (p->regions[i] == r) {
            memmove(&p->regions[i], &p->regions[i + 1],
                    (--p->nr_regions - i) * sizeof p->regions[0]);
            break;
        }
    }
    bool plain = ioctl(p->uffd, UFFDIO_UNREGISTER, &range) == 0; /* which lifts protections */
    pthread_mutex_unlock(&p->lock);
    free(r->present);
    r->present = NULL;
    return plain;
}

int net_pager_protect(struct net_pager *p, struct net_region *r) {
    pthread_mutex_lock(&p->lock);
    set(&r->dirty, false);
    int status = protect(p, r, true);
    if (status)
        set(&r->dirty, true);
    pthread_mutex_unlock(&p->lock);
    return status;
}

int net_pager_supply(struct net_pager *p, struct net_region *r, const char *bytes) {
    const uint64_t end = r->run.nr_pages * NET_PAGE;
    pthread_mutex_lock(&p->lock);
    while (r->busy)
        pthread_cond_wait(&p->idle, &p->lock);
    for (uint64_t page = 0; page < r->run.nr_pages; page++) {
        uint64_t at = page * NET_PAGE, n = r->length - at < NET_PAGE ? r->length - at : NET_PAGE;
        if (!is_present(r, page))
            memcpy(r->run.back + at, bytes + at, n);
    }
    if (!is_present(r, r->run.nr_pages - 1))
        memset(r->run.back + r->length, 0, end - r->length);
    int status = map_pages(p, r, 0, r->run.nr_pages);
    pthread_mutex_unlock(&p->lock);
    return status;
}

void net_pager_settle(struct net_pager *p, struct net_region *r) {
    pthread_mutex_lock(&p->lock);
    while (r->busy)
        pthread_cond_wait(&p->idle, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

void net_pager_stats(struct net_pager *p, struct net_pager_stats *to) {
    pthread_mutex_lock(&p->lock);
    *to = p->stats;
    to->nr_regions = p->nr_regions;
    pthread_mutex_unlock(&p->lock);
}

int net_pager_route(struct net_pager *p, const struct sockaddr *address, socklen_t length,
                    const struct net_hello *hello, uint16_t server) {
    return net_routes_set(p->routes, address, length, hello, server);
}

bool net_pager_poisons(const struct net_pager *p) { return p->poisons; }

void net_pager_never_protect(struct net_pager *p) { p->protects = false; }

/* ---------------------------------------------------------------- beginning and end */

static int open_uffd(void) {
    const int flags = O_CLOEXEC | O_NONBLOCK;
    int fd = (int)syscall(SYS_userfaultfd, flags);
    if (fd >= 0)
        return fd;
    int why = errno, dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (dev >= 0) {
        fd = ioctl(dev, USERFAULTFD_IOC_NEW, flags);
        close(dev);
    }
    if (fd < 0)
        errno = why;
    return fd;
}

/* A handshake is for life, so whether the kernel can poison is asked of a descriptor of its own. */
static int handshake(struct net_pager *p) {
    const uint64_t must = UFFD_FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM | FEATURE_WP_SHMEM |
                          UFFD_FEATURE_PAGEFAULT_FLAG_WP;
    const uint64_t wanted[] = {must | FEATURE_POISON, must};
    for (int i = 0; i < 2; i++) {
        struct uffdio_api api = {.api = UFFD_API, .features = wanted[i]};
        if ((p->uffd = open_uffd()) < 0)
            return errno;
        if (ioctl(p->uffd, UFFDIO_API, &api) == 0) {
            p->poisons = i == 0;
            return 0;
        }
        close(p->uffd);
        p->uffd = -1;
    }
    return ENOSYS;
}

struct net_pager *net_pager_new(uint64_t deadline_ns) {
    struct net_pager *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->owner = getpid();
    p->deadline_ns = deadline_ns;
    p->uffd = p->wake = -1;
    p->protects = true;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->idle, NULL);
    int status = handshake(p);
    if (!status && (p->wake = eventfd(0, EFD_CLOEXEC)) < 0)
        status = errno;
    if (!status && !(p->routes = net_routes_new()))
        status = ENOMEM;
    if (!status) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        status = pthread_create(&p->thread, NULL, run, p);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (!status)
        return p;
    p->owner = -1; /* no thread to wait for */
    net_pager_free(p);
    errno = status;
    return NULL;
}

void net_pager_free(struct net_pager *p) {
    if (p->owner == getpid()) {
        const uint64_t one = 1;
        ssize_t ignored = write(p->wake, &one, sizeof one);
        (void)ignored;
        pthread_join(p->thread, NULL);
    }
    if (p->uffd >= 0)
        close(p->uffd);
    if (p->wake >= 0)
        close(p->wake);
    net_routes_free(p->routes);
    free(p->regions);
    free(p);
}
