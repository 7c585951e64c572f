/*
 * net_arena.c - see net_arena.h.
 *
 * Runs that were given back are kept, the newest last. The oldest go when there are too many or too much of them: their pages
 * return to the kernel, and their place in the file is used again when no run of its size is kept.
 */
#define _GNU_SOURCE
#include "net_arena.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define MOST_BYTES (1ull << 40)
#define LEAST_BYTES (1ull << 24)
#define CLASSES 32u
#define NOEXEC_SEAL 8u /* vm.memfd_noexec may insist on it */
#define MAX_KEPT 256u

struct kept {
    uint64_t page, nr_touched;
    uint32_t class;
};

struct places { /* without memory */
    uint64_t *pages;
    uint32_t nr, capacity;
};

struct net_arena {
    pthread_mutex_t lock;
    int fd;
    char *front, *back;
    uint64_t nr_pages, next_page; /* from next_page on nothing was ever used */
    uint64_t kept_pages;
    uint32_t nr_kept, nr_in_use;
    struct kept kept[MAX_KEPT];
    struct places places[CLASSES];
};

static char *map(int fd, uint64_t bytes) {
    char *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (base == MAP_FAILED)
        return NULL;
    (void)madvise(base, bytes, MADV_DONTFORK);
    (void)madvise(base, bytes, MADV_DONTDUMP); /* a dump would fill all of the file */
    return base;
}

static bool map_both(struct net_arena *a, uint64_t bytes) {
    if (ftruncate(a->fd, (off_t)bytes))
        return false;
    if (!(a->front = map(a->fd, bytes)))
        return false;
    if (!(a->back = map(a->fd, bytes))) {
        (void)munmap(a->front, bytes);
        return false;
    }
    a->nr_pages = bytes / NET_PAGE;
    return true;
}

/* Four times the machine's memory, for powers of two and what is not touched; of few addresses a quarter. */
static uint64_t wanted(void) {
    uint64_t bytes = MOST_BYTES, memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * NET_PAGE;
    struct rlimit addresses;
    while (bytes / 2 >= 4 * memory && bytes > LEAST_BYTES)
        bytes /= 2;
    if (getrlimit(RLIMIT_AS, &addresses) == 0 && addresses.rlim_cur != RLIM_INFINITY) {
        while (2 * bytes > addresses.rlim_cur / 4 && bytes > LEAST_BYTES)
            bytes /= 2;
    }
    return bytes;
}

struct net_arena *net_arena_new(void) {
    struct net_arena *a = calloc(1, sizeof *a);
    if (!a)
        return NULL;
    pthread_mutex_init(&a->lock, NULL);
    a->fd = memfd_create("dmrpc-buffers", MFD_CLOEXEC | NOEXEC_SEAL);
    if (a->fd < 0 && errno == EINVAL) /* before Linux 6.3 */
        a->fd = memfd_create("dmrpc-buffers", MFD_CLOEXEC);
    uint64_t bytes = wanted(); /* or as much as there is */
    while (a->fd >= 0 && bytes >= LEAST_BYTES && !map_both(a, bytes))
        bytes /= 2;
    if (a->nr_pages) { /* forked children would keep what is in it */
        close(a->fd);
        a->fd = -1;
        return a;
    }
    int why = errno;
    net_arena_free(a);
    errno = why;
    return NULL;
}

void net_arena_free(struct net_arena *a) {
    if (a->nr_pages) {
        (void)munmap(a->front, a->nr_pages * NET_PAGE);
        (void)munmap(a->back, a->nr_pages * NET_PAGE);
    }
    if (a->fd >= 0)
        close(a->fd);
    for (uint32_t i = 0; i < CLASSES; i++)
        free(a->places[i].pages);
    free(a);
}

static uint32_t class_of(uint64_t nr_pages) {
    return nr_pages < 2 ? 0 : 64 - (uint32_t)__builtin_clzll(nr_pages - 1);
}

/* ---------------------------------------------------------------- under the lock */

static void forget(struct net_arena *a, uint32_t i) {
    a->kept_pages -= a->kept[i].nr_touched;
    memmove(&a->kept[i], &a->kept[i + 1], (--a->nr_kept - i) * sizeof a->kept[0]);
}

/* A place without memory for later. When even its number cannot be noted, it is never used again. */
static void add_place(struct net_arena *a, uint32_t class, uint64_t page) {
    struct places *p = &a->places[class];
    if (p->nr == p->capacity) {
        uint32_t capacity = p->capacity ? 2 * p->capacity : 16;
        uint64_t *grown = realloc(p->pages, capacity * sizeof *grown);
        if (!grown)
            return;
        p->pages = grown;
        p->capacity = capacity;
    }
    p->pages[p->nr++] = page;
}

static void let_go_of_the_oldest(struct net_arena *a) {
    const struct kept oldest = a->kept[0];
    forget(a, 0);
    if (madvise(a->back + oldest.page * NET_PAGE, oldest.nr_touched * NET_PAGE, MADV_REMOVE) == 0)
        add_place(a, oldest.class, oldest.page);
    else
        a->nr_in_use++; /* for ever: its bytes are still there */
}

/* There is nothing that was never used: cut up a larger place, or begin anew if nothing is in use. */
static bool take_part(struct net_arena *a, uint32_t class, struct kept *found) {
    uint32_t larger = class;
    while (a->nr_kept)
        let_go_of_the_oldest(a);
    if (!a->nr_in_use) {
        for (uint32_t i = 0; i < CLASSES; i++)
            a->places[i].nr = 0;
        a->next_page = 0;
        if (a->nr_pages < 1ull << class)
            return false;
        a->next_page = 1ull << class;
        found->page = 0;
        return true;
    }
    while (larger < CLASSES && !a->places[larger].nr)
        larger++;
    if (larger == CLASSES)
        return false;
    found->page = a->places[larger].pages[--a->places[larger].nr];
    while (larger-- > class)
        add_place(a, larger, found->page + (1ull << larger));
    return true;
}

static bool take(struct net_arena *a, uint32_t class, struct kept *found) {
    for (uint32_t i = a->nr_kept; i-- > 0;) {
        if (a->kept[i].class == class) {
            *found = a->kept[i];
            forget(a, i);
            return true;
        }
    }
    *found = (struct kept){.class = class};
    if (a->places[class].nr) {
        found->page = a->places[class].pages[--a->places[class].nr];
        return true;
    }
    if (a->nr_pages - a->next_page < 1ull << class)
        return take_part(a, class, found);
    found->page = a->next_page;
    a->next_page += 1ull << class;
    return true;
}

/* ---------------------------------------------------------------- for all */

bool net_arena_take(struct net_arena *a, uint64_t nr_pages, bool zero, struct net_run *run) {
    const uint32_t class = class_of(nr_pages);
    struct kept found;
    if (class >= CLASSES || !nr_pages)
        return false;
    pthread_mutex_lock(&a->lock);
    bool there = take(a, class, &found);
    a->nr_in_use += there;
    pthread_mutex_unlock(&a->lock);
    if (!there)
        return false;
    *run = (struct net_run){
        .front = a->front + found.page * NET_PAGE,
        .back = a->back + found.page * NET_PAGE,
        .nr_pages = nr_pages,
        .nr_touched = found.nr_touched,
    };
    if (zero) {
        uint64_t dirty = found.nr_touched < nr_pages ? found.nr_touched : nr_pages;
        memset(run->front, 0, dirty * NET_PAGE);
    }
    return true;
}

bool net_arena_hide(const struct net_run *run) {
    const uint64_t bytes = run->nr_pages * NET_PAGE;
    if (madvise(run->front, bytes, MADV_DONTNEED) == 0)
        return true;
    /* somebody locked it */
    return munlock(run->front, bytes) == 0 && madvise(run->front, bytes, MADV_DONTNEED) == 0;
}

void net_arena_give(struct net_arena *a, const struct net_run *run, bool broken) {
    const struct kept back = {
        .page = (uint64_t)(run->front - a->front) / NET_PAGE,
        .nr_touched = run->nr_pages > run->nr_touched ? run->nr_pages : run->nr_touched,
        .class = class_of(run->nr_pages),
    };
    if (broken) { /* what makes them so goes with the mapping */
        const uint64_t bytes = run->nr_pages * NET_PAGE;
        if (mremap(run->back, 0, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, run->front) == MAP_FAILED) {
            (void)madvise(run->back, back.nr_touched * NET_PAGE, MADV_REMOVE);
            return; /* never used again */
        }
    }
    pthread_mutex_lock(&a->lock);
    a->nr_in_use--;
    if (a->nr_kept == MAX_KEPT)
        let_go_of_the_oldest(a);
    a->kept[a->nr_kept++] = back;
    a->kept_pages += back.nr_touched;
    while (a->kept_pages > NET_ARENA_KEPT / NET_PAGE)
        let_go_of_the_oldest(a);
    pthread_mutex_unlock(&a->lock);
}

uint64_t net_arena_kept(struct net_arena *a) {
    pthread_mutex_lock(&a->lock);
    uint64_t bytes = a->kept_pages * NET_PAGE;
    pthread_mutex_unlock(&a->lock);
    return bytes;
}
