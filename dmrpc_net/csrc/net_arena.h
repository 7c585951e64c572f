/*
 * net_arena.h - memory for the buffers of a process: one file in memory, which is mapped twice.
 *
 * Buffers are runs of pages of the front. The back shows the same pages to the pager, which fills them there before the front has
 * them, so nothing is copied in between. What is given back stays for the next, up to NET_ARENA_KEPT bytes: memory that is in
 * the caches, and that the kernel need not find and clear anew.
 *
 * The file is four times as large as the machine's memory, or what of that the address space allows; what nobody wrote to takes no
 * memory. Runs come in sizes of powers of two
 * of pages, of which only what is used is ever touched. Forked children have neither mapping.
 */
#ifndef NET_ARENA_H
#define NET_ARENA_H

#include <stdbool.h>
#include <stdint.h>

#define NET_PAGE 4096u /* of this machine */
#define NET_ARENA_KEPT (64u << 20)

struct net_arena;

struct net_run { /* of pages */
    char *front, *back;
    uint64_t nr_pages;
    uint64_t
        nr_touched; /* of its first pages, memory of before; what is behind is zeros. For the arena. */
};

struct net_arena *net_arena_new(void); /* NULL, with errno */
void net_arena_free(struct net_arena *a);

/* Take a run. zero: clear it; otherwise its bytes are any that this process wrote. False: there is no memory. */
bool net_arena_take(struct net_arena *a, uint64_t nr_pages, bool zero, struct net_run *run);

/* Give back a run that nobody watches. broken: it has pages that cannot be touched. */
void net_arena_give(struct net_arena *a, const struct net_run *run, bool broken);

/* Unmap a run from the front; false: it cannot be. Its bytes stay, at the back. */
bool net_arena_hide(const struct net_run *run);

uint64_t net_arena_kept(struct net_arena *a); /* bytes */

#endif
