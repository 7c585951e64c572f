/*
 * net_loop.c - the thread of a shard: sockets on one side, net_conn on the other.
 *
 * Edge-triggered: the kernel says once that a socket became readable or writable, and we remember it until a call says that it
 * is not so any more. A receive that fills less than it was offered has emptied the socket, so the common case, one request and
 * one answer, is three system calls: wait, receive, send.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net_server.h"

#define EVENTS 64

/* ---------------------------------------------------------------- who has something to do */

static void make_ready(struct net_loop *l, struct net_peer *p) {
    if (p->ready)
        return;
    p->ready = true;
    p->prev_ready = l->ready.prev_ready;
    p->next_ready = &l->ready;
    p->prev_ready->next_ready = p;
    l->ready.prev_ready = p;
}

static void make_idle(struct net_peer *p) {
    if (!p->ready)
        return;
    p->ready = false;
    p->prev_ready->next_ready = p->next_ready;
    p->next_ready->prev_ready = p->prev_ready;
}

static void end_peer(struct net_peer *p) {
    struct net_session *ses = p->conn->session;
    make_idle(p);
    if (ses->connection == p)
        ses->connection = NULL;
    net_conn_close(p->conn);
    close(p->fd); /* leaves the epoll set as well */
    free(p);
}

/* ---------------------------------------------------------------- bytes */

enum verdict { GO_ON, WAIT, END };

static enum verdict send_some(struct net_loop *l, struct net_peer *p, uint64_t *budget) {
    struct iovec iov[NET_MAX_IOV];
    struct msghdr m = {.msg_iov = iov};
    uint64_t bytes;
    if (!p->writable)
        return WAIT;
    if (p->welcome_left) {
        iov[0] = (struct iovec){(char *)&p->welcome + sizeof p->welcome - p->welcome_left,
                                p->welcome_left};
        m.msg_iovlen = 1;
        bytes = p->welcome_left;
    } else {
        m.msg_iovlen = (size_t)net_conn_have(p->conn, iov, NET_MAX_IOV, &bytes);
    }
    ssize_t n = sendmsg(p->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    NET_COUNT(&l->shard, system_calls, 1);
    if (n < 0) {
        if (errno == EINTR)
            return GO_ON;
        p->writable = false;
        return errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM ? WAIT : END;
    }
    if (p->welcome_left)
        p->welcome_left -= (uint32_t)n;
    else
        net_conn_sent(p->conn, (uint64_t)n);
    *budget -= (uint64_t)n < *budget ? (uint64_t)n : *budget;
    return GO_ON;
}

static enum verdict receive_some(struct net_loop *l, struct net_peer *p, uint64_t *budget) {
    struct iovec iov[NET_MAX_IOV];
    struct msghdr m = {.msg_iov = iov};
    uint64_t offered = 0;
    if (!p->readable)
        return WAIT;
    m.msg_iovlen = (size_t)net_conn_want(p->conn, iov, NET_MAX_IOV);
    for (size_t i = 0; i < m.msg_iovlen; i++)
        offered += iov[i].iov_len;
    ssize_t n = recvmsg(p->fd, &m, MSG_DONTWAIT);
    NET_COUNT(&l->shard, system_calls, 1);
    if (n == 0)
        return END;
    if (n < 0) {
        if (errno == EINTR)
            return GO_ON;
        p->readable = false;
        return errno == EAGAIN ? WAIT : END;
    }
    /* Empty now; but not if its end has come, which is reported only once. */
    p->readable = (uint64_t)n == offered || p->hung_up;
    net_conn_got(p->conn, (uint64_t)n);
    *budget -= (uint64_t)n < *budget ? (uint64_t)n : *budget;
    return GO_ON;
}

static void serve(struct net_loop *l, struct net_peer *p) {
    uint64_t budget = NET_TURN_BYTES;
    enum verdict next = GO_ON;
    while (next == GO_ON) {
        if (budget == 0)
            return; /* still ready: at the end of the list */
        if (p->welcome_left) {
            next = send_some(l, p, &budget);
            continue;
        }
        while (budget && net_conn_step(p->conn))
            budget -= NET_STEP_BYTES < budget ? NET_STEP_BYTES : budget;
        if (net_conn_has_output(p->conn))
            next = send_some(l, p, &budget);
        else if (p->conn->broken)
            next = END;
        else
            next = receive_some(l, p, &budget);
    }
    if (next == WAIT)
        make_idle(p);
    else
        end_peer(p);
}

/* ---------------------------------------------------------------- posts */

static void adopt(struct net_loop *l, const struct net_post *post) {
    struct net_session *ses = net_session_find(&l->shard, post->pid);
    struct net_peer *p = calloc(1, sizeof *p);
    if (!ses)
        ses = net_session_open(&l->shard, post->pid, post->token, post->session);
    struct net_conn *c = p && ses ? net_conn_open(&l->shard, ses) : NULL;
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = p};
    if (!c || epoll_ctl(l->epoll, EPOLL_CTL_ADD, post->fd, &e)) {
        free(c);
        free(p);
        close(post->fd);
        return;
    }
    if (ses->connection) /* the process thinks that it is broken */
        end_peer(ses->connection);
    ses->connection = p;
    p->conn = c;
    p->fd = post->fd;
    p->welcome = (struct net_welcome){.magic = NET_MAGIC,
                                      .version = NET_VERSION,
                                      .status = NET_OK,
                                      .epoch = l->server->epoch,
                                      .slice_bytes = l->server->slice_bytes,
                                      .last = ses->last_id,
                                      .pid = ses->pid,
                                      .server = (uint16_t)l->server->config.server,
                                      .nr_shards = (uint16_t)l->server->config.nr_shards,
                                      .page_size = l->server->config.page_bytes,
                                      .max_outstanding = l->shard.limits.max_outstanding};
    p->welcome_left = sizeof p->welcome;
}

static void gone(struct net_loop *l, const struct net_post *post) {
    struct net_session *ses = net_session_find(&l->shard, post->pid);
    if (ses) {
        if (ses->connection)
            end_peer(ses->connection);
        net_session_close(&l->shard, ses);
    }
    net_front_departed(l->server, post->departure);
}

bool net_loop_post(struct net_loop *l, const struct net_post *post) {
    const uint64_t one = 1;
    struct net_post *copy = malloc(sizeof *copy);
    if (!copy)
        return false;
    *copy = *post;
    copy->next = NULL;
    pthread_mutex_lock(&l->lock);
    *l->last = copy;
    l->last = &copy->next;
    pthread_mutex_unlock(&l->lock);
    ssize_t ignored = write(l->bell, &one, sizeof one);
    (void)ignored;
    return true;
}

static void take_posts(struct net_loop *l) {
    uint64_t rung;
    ssize_t ignored = read(l->bell, &rung, sizeof rung);
    (void)ignored;
    pthread_mutex_lock(&l->lock);
    struct net_post *post = l->first;
    l->first = NULL;
    l->last = &l->first;
    pthread_mutex_unlock(&l->lock);
    while (post) {
        struct net_post *next = post->next;
        if (post->what == NET_POST_ADOPT)
            adopt(l, post);
        else
            gone(l, post);
        free(post);
        post = next;
    }
}

/* ---------------------------------------------------------------- the thread */

static int patience(struct net_loop *l) {
    uint64_t now = net_now_ns(), next = net_deliveries_expire(&l->shard, now);
    if (l->ready.next_ready != &l->ready)
        return 0;
    return next ? (int)((next - now) / 1000000u) + 1 : -1;
}

static void *run(void *arg) {
    struct net_loop *l = arg;
    struct epoll_event events[EVENTS];
    while (!atomic_load(&l->stop)) {
        const bool idle =
            l->ready.next_ready == &l->ready && l->shard.deliveries.next == &l->shard.deliveries;
        int n = epoll_wait(l->epoll, events, EVENTS, idle ? -1 : patience(l));
        bool posts = false;
        NET_COUNT(&l->shard, system_calls, 1);
        for (int i = 0; i < n; i++) {
            struct net_peer *p = events[i].data.ptr;
            const uint32_t what = events[i].events;
            if (!p) {
                posts = true;
                continue;
            }
            p->readable |= (what & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
            p->writable |= (what & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0;
            p->hung_up |= (what & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
            make_ready(l, p);
        }
        /* One turn for each that is ready now; who is not through by then is at the end of the list. */
        struct net_peer *last = l->ready.prev_ready;
        while (last != &l->ready) {
            struct net_peer *p = l->ready.next_ready;
            const bool was_last = p == last;
            make_idle(p);
            make_ready(l, p);
            serve(l, p);
            if (was_last)
                break;
        }
        if (posts) /* last: they may end peers */
            take_posts(l);
    }
    return NULL;
}

int net_loop_open(struct net_loop *l, struct net_server *v, uint32_t index) {
    struct epoll_event e = {.events = EPOLLIN};
    l->server = v;
    l->last = &l->first;
    l->ready.next_ready = l->ready.prev_ready = &l->ready;
    l->epoll = epoll_create1(EPOLL_CLOEXEC);
    l->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&l->lock, NULL);
    if (l->epoll < 0 || l->bell < 0 || epoll_ctl(l->epoll, EPOLL_CTL_ADD, l->bell, &e))
        return NET_NO_MEMORY;
    const struct net_config *g = &v->config;
    int status = net_shard_open(&l->shard, g->server, index, v->pool + index * v->slice_bytes,
                                v->slice_bytes, (uint32_t)__builtin_ctz(g->page_bytes), &g->limits);
    l->shard.eager = g->eager;
    l->shard.counters[NET_COUNTER_nr_locked] = v->locked_bytes ? l->shard.pool.nr_pages - 1 : 0;
    if (g->time_translation)
        net_shard_time_translation(&l->shard);
    return status;
}

int net_loop_start(struct net_loop *l) {
    int error = pthread_create(&l->thread, NULL, run, l);
    l->started = error == 0;
    return error;
}

void net_loop_close(struct net_loop *l) {
    const uint64_t one = 1;
    if (l->started) {
        atomic_store(&l->stop, true);
        ssize_t ignored = write(l->bell, &one, sizeof one);
        (void)ignored;
        pthread_join(l->thread, NULL);
    }
    for (struct net_session *ses = l->shard.sessions; ses; ses = ses->next)
        if (ses->connection)
            end_peer(ses->connection);
    for (struct net_post *post = l->first, *next; post; post = next) {
        next = post->next;
        if (post->what == NET_POST_ADOPT)
            close(post->fd);
        free(post);
    }
    if (l->shard.pool.counts)
        net_shard_close(&l->shard);
    close(l->epoll);
    close(l->bell);
    pthread_mutex_destroy(&l->lock);
}
