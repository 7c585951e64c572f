/* net_pager_io.h - how the pager's thread reaches shards: connections of its own, made anew when they break. */
#ifndef NET_PAGER_IO_H
#define NET_PAGER_IO_H

#include "net_pager.h"

struct net_routes;

struct net_routes *net_routes_new(void);
void net_routes_free(struct net_routes *t);
int net_routes_set(struct net_routes *t, const struct sockaddr *address, socklen_t length,
                   const struct net_hello *hello, uint16_t server);

/* Get bytes of the Ref that a region shows. 0, or a nonzero status and why. */
int net_routes_get(struct net_routes *t, const struct net_region *r, uint64_t offset,
                   uint64_t bytes, char *into, uint64_t until_ns, const char **why);

uint64_t net_pager_now(void);

#endif
