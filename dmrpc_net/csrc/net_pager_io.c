/*
 * net_pager_io.c - see net_pager_io.h.
 *
 * A request is sent and its answer waited for, one at a time. It is a GET with KEEP, which changes nothing: after a connection
 * broke it is simply asked again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "net_pager_io.h"

#define PAUSE_MS 10

struct route {
    struct route *next;
    uint16_t server, shard;
    struct sockaddr_storage address;
    socklen_t length;
    struct net_hello hello;
    bool renewed; /* the socket is of another session */
    /* the pager's thread's */
    int fd;
    uint64_t last_id;
};

struct net_routes {
    pthread_mutex_t lock;
    struct route *first;
};

uint64_t net_pager_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

struct net_routes *net_routes_new(void) {
    struct net_routes *t = calloc(1, sizeof *t);
    if (t)
        pthread_mutex_init(&t->lock, NULL);
    return t;
}

void net_routes_free(struct net_routes *t) {
    if (!t)
        return;
    for (struct route *r = t->first, *next; r; r = next) {
        next = r->next;
        if (r->fd >= 0)
            close(r->fd);
        free(r);
    }
    free(t);
}

static struct route *find(struct net_routes *t, uint16_t server, uint16_t shard) {
    struct route *r = t->first;
    while (r && (r->server != server || r->shard != shard))
        r = r->next;
    return r;
}

int net_routes_set(struct net_routes *t, const struct sockaddr *address, socklen_t length,
                   const struct net_hello *hello, uint16_t server) {
    int status = 0;
    if (length > sizeof(struct sockaddr_storage))
        return EINVAL;
    pthread_mutex_lock(&t->lock);
    struct route *r = find(t, server, hello->shard);
    if (!r && (r = calloc(1, sizeof *r))) {
        r->server = server;
        r->shard = hello->shard;
        r->fd = -1;
        r->next = t->first;
        t->first = r;
    }
    if (r) {
        memcpy(&r->address, address, length);
        r->length = length;
        r->hello = *hello;
        r->renewed = true;
    } else {
        status = ENOMEM;
    }
    pthread_mutex_unlock(&t->lock);
    return status;
}

/* ---------------------------------------------------------------- one connection */

/* Have sends and receives fail when the time is over. */
static bool limit(int fd, uint64_t until_ns) {
    uint64_t now = net_pager_now();
    if (now >= until_ns)
        return false;
    struct timeval left = {(time_t)((until_ns - now) / 1000000000u),
                           (suseconds_t)((until_ns - now) % 1000000000u / 1000u + 1)};
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &left, sizeof left);
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &left, sizeof left);
    return true;
}

static bool send_all(int fd, const void *from, size_t n) {
    const char *at = from;
    while (n) {
        ssize_t sent = send(fd, at, n, MSG_NOSIGNAL);
        if (sent <= 0 && errno != EINTR)
            return false;
        if (sent > 0)
            at += sent, n -= (size_t)sent;
    }
    return true;
}

static bool receive_all(int fd, void *to, size_t n) {
    char *at = to;
    while (n) {
        ssize_t got = recv(fd, at, n, MSG_WAITALL);
        if (got == 0 || (got < 0 && errno != EINTR))
            return false;
        if (got > 0)
            at += got, n -= (size_t)got;
    }
    return true;
}

static void hang_up(struct route *r) {
    if (r->fd >= 0)
        close(r->fd);
    r->fd = -1;
}

/* 0 and r->fd; or a status of the server's that is final; or -1, and it may be tried again. */
static int dial(struct net_routes *t, struct route *r, uint64_t until_ns) {
    pthread_mutex_lock(&t->lock);
    struct sockaddr_storage address = r->address;
    struct net_hello hello = r->hello;
    socklen_t length = r->length;
    bool renewed = r->renewed;
    r->renewed = false;
    pthread_mutex_unlock(&t->lock);
    if (renewed) {
        hang_up(r);
        r->last_id = 0;
    }
    if (r->fd >= 0)
        return 0;
    struct net_welcome welcome;
    const int one = 1;
    r->fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (r->fd < 0)
        return -1;
    if (!limit(r->fd, until_ns) || connect(r->fd, (struct sockaddr *)&address, length)) {
        hang_up(r);
        return -1;
    }
    if (address.ss_family != AF_UNIX)
        (void)setsockopt(r->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!send_all(r->fd, &hello, sizeof hello) || !receive_all(r->fd, &welcome, sizeof welcome)) {
        hang_up(r);
        return -1;
    }
    if (welcome.magic != NET_MAGIC || welcome.version != NET_VERSION || welcome.status) {
        hang_up(r);
        return welcome.status ? welcome.status : NET_OTHER_VERSION;
    }
    if (welcome.last > r->last_id)
        r->last_id = welcome.last;
    return 0;
}

static int ask(struct route *r, const struct net_region *region, uint64_t offset, uint64_t bytes,
               char *into, uint64_t until_ns) {
    struct net_request q = {
        .op = NET_GET,
        .flags = NET_KEEP,
        .id = ++r->last_id,
        .oldest = r->last_id,
        .a = region->key,
        .b = region->length,
        .c = offset,
        .d = bytes,
    };
    struct net_answer answer;
    if (!limit(r->fd, until_ns) || !send_all(r->fd, &q, sizeof q) ||
        !receive_all(r->fd, &answer, sizeof answer) || answer.id != q.id)
        return -1;
    if (answer.status)
        return answer.payload ? -1 : answer.status;
    if (answer.payload != bytes || !receive_all(r->fd, into, bytes))
        return -1;
    return 0;
}

static const char *reason(int status) {
    switch (status) {
    case -1:
        return "no answer from the server in time";
    case NET_REF_CONSUMED:
    case NET_BAD_REF:
        return "the server does not have them any more";
    case NET_NO_PROCESS:
        return "the server has let this process go";
    case NET_OVER_QUOTA:
        return "this process holds as many pages as it may";
    default:
        return "the server refuses";
    }
}

int net_routes_get(struct net_routes *t, const struct net_region *region, uint64_t offset,
                   uint64_t bytes, char *into, uint64_t until_ns, const char **why) {
    pthread_mutex_lock(&t->lock);
    struct route *r = find(t, region->server, region->shard);
    pthread_mutex_unlock(&t->lock);
    int status = -1;
    while (r) {
        status = dial(t, r, until_ns);
        if (status == 0)
            status = ask(r, region, offset, bytes, into, until_ns);
        if (status >= 0)
            break;
        hang_up(r);
        if (net_pager_now() + PAUSE_MS * 1000000u >= until_ns)
            break;
        (void)poll(NULL, 0, PAUSE_MS);
    }
    if (status)
        *why = reason(status);
    return status;
}
