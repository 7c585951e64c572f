/*
 * net_server.c - the pool, and starting and stopping.
 *
 * The pool is one anonymous mapping, of huge pages where the kernel has them: requests go through it at random, and small
 * pages would cost a miss in the TLB each. It is populated at the start, so that a machine that is too small says so then
 * and not later with a signal, and locked where that is allowed, so that it is never swapped out.
 */
#define _GNU_SOURCE
#include "net_server.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define HUGE (2ull << 20)

static void populate(uint8_t *pool, uint64_t bytes, uint32_t page_bytes) {
    if (madvise(pool, bytes, MADV_POPULATE_WRITE) == 0)
        return;
    for (uint64_t i = 0; i < bytes; i += page_bytes) /* before Linux 5.14 */
        ((volatile uint8_t *)pool)[i] = 0;
}

static int make_pool(struct net_server *v, struct net_failure *failure) {
    const struct net_config *g = &v->config;
    const uint64_t bytes = v->slice_bytes * g->nr_shards;
    uint8_t *area = mmap(NULL, bytes + HUGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) {
        *failure = (struct net_failure){"mmap", errno};
        return NET_NO_MEMORY;
    }
    uint8_t *pool = (uint8_t *)(((uintptr_t)area + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    if (pool > area)
        (void)munmap(area, (size_t)(pool - area));
    (void)munmap(pool + bytes, HUGE - (size_t)(pool - area));
    v->pool = pool;
    (void)madvise(pool, bytes, MADV_HUGEPAGE);
    (void)madvise(pool, bytes, MADV_DONTFORK);
    if (g->lock_pool && mlock(pool, bytes) == 0)
        v->locked_bytes = bytes;
    else if (g->lock_pool)
        *failure = (struct net_failure){"mlock", errno}; /* said, and done without */
    if (g->populate && !v->locked_bytes)
        populate(pool, bytes, g->page_bytes);
    return NET_OK;
}

int net_server_open(const struct net_config *config, const int *listeners, int nr_listeners,
                    struct net_server **out, struct net_failure *failure) {
    sigset_t all, before;
    *failure = (struct net_failure){NULL, 0};
    struct net_server *v = calloc(1, sizeof *v);
    if (!v)
        return NET_NO_MEMORY;
    v->config = *config;
    /* Whole huge pages for each shard, if there is enough. */
    const uint64_t grain =
        config->pool_bytes / config->nr_shards >= HUGE ? HUGE : config->page_bytes;
    v->slice_bytes = config->pool_bytes / config->nr_shards / grain * grain;
    if (getrandom(&v->epoch, sizeof v->epoch, 0) != sizeof v->epoch) {
        free(v);
        return NET_NO_MEMORY;
    }
    int status = make_pool(v, failure);
    if (status == NET_OK && !(v->loops = calloc(config->nr_shards, sizeof *v->loops)))
        status = NET_NO_MEMORY;
    for (uint32_t i = 0; status == NET_OK && i < config->nr_shards; i++)
        status = net_loop_open(&v->loops[i], v, i);
    if (status == NET_OK)
        status = net_front_open(v, listeners, nr_listeners, failure);
    if (status == NET_OK) {
        /* Signals are for whoever started us. */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int error = net_front_start(v);
        for (uint32_t i = 0; !error && i < config->nr_shards; i++)
            error = net_loop_start(&v->loops[i]);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (error) {
            *failure = (struct net_failure){"pthread_create", error};
            status = NET_NO_MEMORY;
        }
    }
    if (status != NET_OK) {
        net_server_close(v);
        return status;
    }
    *out = v;
    return NET_OK;
}

void net_server_stop(struct net_server *v) { net_front_stop(v); }

void net_server_wait(struct net_server *v) { net_front_join(v); }

void net_server_close(struct net_server *v) {
    if (v->front) {
        net_front_stop(v);
        net_front_join(v);
    }
    for (uint32_t i = 0; v->loops && i < v->config.nr_shards; i++)
        if (v->loops[i].server)
            net_loop_close(&v->loops[i]);
    if (v->front)
        net_front_close(v);
    free(v->loops);
    if (v->pool)
        (void)munmap(v->pool, v->slice_bytes * v->config.nr_shards);
    free(v);
}
