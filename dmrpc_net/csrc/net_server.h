/*
 * net_server.h - a memory server: one front thread that lets clients in, and one thread for each shard.
 *
 *      clients                    front                          shards
 *         |  connect, hello         |                              |
 *         | ----------------------> | secret, process              |
 *         |      control            | keeps it: a process's life   |
 *         |      data               | ---- ADOPT the socket -----> | welcome, requests, answers
 *         |  end of control         | ---- GONE the process -----> | frees what it holds
 *         |  <---- end of control   | <---- done ----------------- |
 *
 * A post is a message from the front to a shard; posts are taken in order. So a shard never gets a connection of a
 * process that it was told is gone. Nothing else is shared between threads, but for what stands behind a lock here.
 */
#ifndef NET_SERVER_H
#define NET_SERVER_H

#include <pthread.h>
#include <stdatomic.h>

#include "net_conn.h"

#define NET_TURN_BYTES (1u << 20) /* of one connection, before the others have their turn */
#define NET_STEP_BYTES (8u << 10) /* what a request counts for, whatever it moves */

struct net_config {
    uint32_t server;
    uint32_t nr_shards;
    uint64_t pool_bytes; /* of all shards together */
    uint32_t page_bytes;
    uint8_t secret[NET_SECRET_BYTES];
    uint32_t max_processes;
    uint32_t max_strangers; /* connections that have not said hello */
    uint32_t hello_ms;
    uint32_t vanished_s; /* a client's machine that does not answer for so long is gone; 0: never */
    bool lock_pool;
    bool populate;
    bool eager; /* create_ref always copies */
    bool time_translation;
    struct net_limits limits;
};

struct net_post {
    enum { NET_POST_ADOPT, NET_POST_GONE } what;
    int fd;
    uint32_t pid, session;
    uint64_t token;
    struct net_departure *departure;
    struct net_post *next;
};

/* A process that ended: its control connection is closed when every shard has freed what it held. */
struct net_departure {
    int fd;
    _Atomic uint32_t nr_shards;
    struct net_departure *next;
};

struct net_peer { /* a data connection in a shard's loop */
    struct net_conn *conn;
    int fd;
    bool readable, writable, hung_up;
    bool ready; /* in the list of those that have something to do */
    struct net_peer *next_ready, *prev_ready;
    uint32_t welcome_left; /* bytes of the greeting that are not sent yet */
    struct net_welcome welcome;
};

struct net_loop { /* a shard and its thread */
    struct net_shard shard;
    struct net_server *server;
    pthread_t thread;
    bool started;
    int epoll, bell; /* an eventfd: there are posts */
    pthread_mutex_t lock;
    struct net_post *first, **last;
    struct net_peer ready; /* head of the list */
    _Atomic bool stop;
};

struct net_server {
    struct net_config config;
    uint64_t epoch;
    uint8_t *pool;
    uint64_t slice_bytes;
    uint64_t locked_bytes;
    struct net_loop *loops;
    struct net_front *front;
};

/* What went wrong with the machine, for whoever starts a server. */
struct net_failure {
    const char *what; /* static string: a system call, or what it was for */
    int error;        /* errno, or 0 */
};

int net_server_open(const struct net_config *config, const int *listeners, int nr_listeners,
                    struct net_server **out, struct net_failure *failure);
/* Until net_server_stop. */
void net_server_wait(struct net_server *v);
void net_server_stop(struct net_server *v); /* from a signal handler as well */
void net_server_close(struct net_server *v);
uint32_t net_server_processes(struct net_server *v);

/* net_loop.c */
int net_loop_open(struct net_loop *l, struct net_server *v, uint32_t index);
int net_loop_start(struct net_loop *l);
bool net_loop_post(struct net_loop *l, const struct net_post *post); /* false: no memory */
void net_loop_close(struct net_loop *l);

/* net_front.c */
int net_front_open(struct net_server *v, const int *listeners, int nr_listeners,
                   struct net_failure *failure);
int net_front_start(struct net_server *v);
void net_front_join(struct net_server *v);
void net_front_stop(struct net_server *v);
void net_front_close(struct net_server *v);
/* From a shard: it has freed what a process held. */
void net_front_departed(struct net_server *v, struct net_departure *d);
/* A socket that was accepted: no delay, and an end to silence. */
void net_socket_setup(int fd, uint32_t vanished_s);

#endif
