/*
 * memory.h - a memory server's threads and its clients' links, in one process and over real sockets, for C unit tests.
 */
#ifndef DM_TEST_MEMORY_H
#define DM_TEST_MEMORY_H

#include <netinet/in.h>
#include <stdint.h>

#include "net_link.h"

#define PAGE 4096u
#define SHARDS 2u

extern struct sockaddr_in memory_place;
extern uint8_t memory_secret[NET_SECRET_BYTES];

struct process {
    uint32_t pid;
    int control;
    struct net_link *links[SHARDS];
};

void memory_start(void);
void memory_stop(void);

/* Connect and say hello; returns the descriptor. */
int memory_greeted(const struct net_hello *hello, struct net_welcome *welcome);

void memory_join(struct process *p);
void memory_leave(struct process *p);

/* A call, and its outcome; a broken connection is made again. */
int memory_call(struct process *p, uint32_t shard, struct net_call *c);

/* A call that must succeed, and what it gave. */
uint64_t memory_asked(struct process *p, uint32_t shard, struct net_request q);
void memory_write(struct process *p, uint32_t shard, uint64_t address, const void *from,
                  uint32_t n);
void memory_read(struct process *p, uint32_t shard, uint64_t address, void *into, uint32_t n);
struct net_audit memory_audit(struct process *p, uint32_t shard);
void memory_expect_all_free(void);

#endif
