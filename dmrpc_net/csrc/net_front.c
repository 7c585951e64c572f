/*
 * net_front.c - the thread that lets clients in, and knows which processes are alive.
 *
 * A connection is a stranger until its hello has come, whole, within hello_ms. The secret in it is compared before anything else is
 * looked at, in a time that does not depend on where it differs. Whoever is refused is told why and is gone, as is whoever says more
 * than it should.
 *
 * Strangers are few (max_strangers) and processes, too: when there is no room, the strangers go that have been silent for
 * longest, and processes are told that the server is full.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net_server.h"

#define EVENTS 64
#define MAX_LISTENERS 4

enum what { LISTENER, BELL, STRANGER, CONTROL };

struct guest { /* whatever the front's loop waits for */
    enum what what;
    int fd;
    /* stranger */
    uint32_t got;
    uint64_t expires_ns;
    struct net_hello hello;
    struct guest *next, *prev; /* of strangers, the first expires first */
    /* control: a process */
    uint32_t pid;
    uint64_t token;
    struct guest *sibling; /* in its bucket */
};

struct net_front {
    struct net_server *server;
    pthread_t thread;
    bool started, accepting;
    int epoll;
    int bell;
    _Atomic bool stop;
    struct guest listeners[MAX_LISTENERS], bell_guest;
    int nr_listeners;
    struct guest strangers; /* head of the list */
    uint32_t nr_strangers;
    struct guest **processes; /* by pid; max_processes rounded up to a power of two */
    uint32_t mask;
    _Atomic uint32_t nr_processes;
    uint32_t last_pid;
    pthread_mutex_t lock;
    struct net_departure *departed;
};

void net_socket_setup(int fd, uint32_t vanished_s) {
    const int on = 1;
    /* A Unix socket knows nothing of this, and needs none of it. */
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0) {
        const int bytes = NET_SEND_BUFFER;
        (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    }
    if (!vanished_s)
        return;
    const int idle = vanished_s > 3 ? (int)vanished_s / 3 : 1, tries = 3;
    const unsigned ms = vanished_s * 1000;
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &idle, sizeof idle);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &tries, sizeof tries);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &ms, sizeof ms);
}

/* ---------------------------------------------------------------- processes */

static struct guest **bucket(struct net_front *f, uint32_t pid) {
    return &f->processes[(pid * 2654435761u >> 7) & f->mask];
}

static struct guest *process_of(struct net_front *f, uint32_t pid) {
    struct guest *g = *bucket(f, pid);
    while (g && g->pid != pid)
        g = g->sibling;
    return g;
}

static void forget_process(struct net_front *f, struct guest *g) {
    struct guest **at = bucket(f, g->pid);
    while (*at != g)
        at = &(*at)->sibling;
    *at = g->sibling;
    atomic_fetch_sub(&f->nr_processes, 1);
}

/* Its control connection ended: free what it holds, in every shard, and then close our end. */
static void process_ends(struct net_front *f, struct guest *g) {
    struct net_server *v = f->server;
    struct net_departure *d = malloc(sizeof *d);
    struct net_post post = {.what = NET_POST_GONE, .pid = g->pid, .departure = d};
    if (!d)
        return; /* no memory: tried again when the loop comes round, for the socket stays readable */
    *d = (struct net_departure){.fd = g->fd, .nr_shards = v->config.nr_shards};
    forget_process(f, g);
    (void)epoll_ctl(f->epoll, EPOLL_CTL_DEL, g->fd, NULL);
    for (uint32_t i = 0; i < v->config.nr_shards; i++)
        while (!net_loop_post(&v->loops[i], &post))
            usleep(1000); /* no memory: what it held must not stay */
    free(g);
}

void net_front_departed(struct net_server *v, struct net_departure *d) {
    struct net_front *f = v->front;
    const uint64_t one = 1;
    if (atomic_fetch_sub(&d->nr_shards, 1) > 1)
        return;
    pthread_mutex_lock(&f->lock);
    d->next = f->departed;
    f->departed = d;
    pthread_mutex_unlock(&f->lock);
    ssize_t ignored = write(f->bell, &one, sizeof one);
    (void)ignored;
}

static void close_departed(struct net_front *f) {
    uint64_t rung;
    ssize_t ignored = read(f->bell, &rung, sizeof rung);
    (void)ignored;
    pthread_mutex_lock(&f->lock);
    struct net_departure *d = f->departed;
    f->departed = NULL;
    pthread_mutex_unlock(&f->lock);
    while (d) {
        struct net_departure *next = d->next;
        close(d->fd);
        free(d);
        d = next;
    }
}

/* ---------------------------------------------------------------- strangers */

static void accept_all(struct net_front *f, bool on) {
    if (f->accepting == on)
        return;
    f->accepting = on;
    for (int i = 0; i < f->nr_listeners; i++) {
        struct epoll_event e = {.events = on ? EPOLLIN : 0, .data.ptr = &f->listeners[i]};
        (void)epoll_ctl(f->epoll, EPOLL_CTL_MOD, f->listeners[i].fd, &e);
    }
}

static void forget_stranger(struct net_front *f, struct guest *g) {
    g->prev->next = g->next;
    g->next->prev = g->prev;
    f->nr_strangers--;
    accept_all(f, true);
}

static void send_away(struct net_front *f, struct guest *g) {
    forget_stranger(f, g);
    close(g->fd);
    free(g);
}

/* The first few bytes of a connection: the socket takes them at once. */
static bool welcome(struct net_front *f, int fd, enum net_status status, uint32_t pid) {
    const struct net_server *v = f->server;
    struct net_welcome w = {.magic = NET_MAGIC, .version = NET_VERSION, .status = (uint16_t)status};
    if (status == NET_OK) {
        w.epoch = v->epoch;
        w.slice_bytes = v->slice_bytes;
        w.pid = pid;
        w.server = (uint16_t)v->config.server;
        w.nr_shards = (uint16_t)v->config.nr_shards;
        w.page_size = v->config.page_bytes;
        w.max_outstanding = v->config.limits.max_outstanding;
    }
    return send(fd, &w, sizeof w, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof w;
}

static void refuse(struct net_front *f, struct guest *g, enum net_status status) {
    (void)welcome(f, g->fd, status, 0);
    send_away(f, g);
}

static void let_control_in(struct net_front *f, struct guest *g) {
    const struct net_config *config = &f->server->config;
    uint32_t pid = g->hello.pid;
    if (atomic_load(&f->nr_processes) >= config->max_processes) {
        refuse(f, g, NET_FULL);
        return;
    }
    if (pid == 0) {
        if (config->server != 0) {
            refuse(f, g, NET_WRONG_SERVER);
            return;
        }
        do
            pid = ++f->last_pid;
        while (pid == 0 || process_of(f, pid));
    } else if (process_of(f, pid)) {
        refuse(f, g, NET_PID_TAKEN);
        return;
    }
    /* Known before it is told so: its data connections may be quick. */
    g->what = CONTROL;
    g->pid = pid;
    g->token = g->hello.token;
    g->sibling = *bucket(f, pid);
    *bucket(f, pid) = g;
    atomic_fetch_add(&f->nr_processes, 1);
    forget_stranger(f, g);
    memset(&g->hello, 0, sizeof g->hello);
    if (!welcome(f, g->fd, NET_OK, pid))
        process_ends(f, g);
}

static void let_data_in(struct net_front *f, struct guest *g) {
    struct net_server *v = f->server;
    const struct net_hello *h = &g->hello;
    const struct guest *process = process_of(f, h->pid);
    if (h->shard >= v->config.nr_shards || h->session >= NET_NR_SESSIONS) {
        refuse(f, g, NET_WRONG_SERVER);
        return;
    }
    if (!process || process->token != h->token) {
        refuse(f, g, NET_NO_PROCESS);
        return;
    }
    const struct net_post post = {.what = NET_POST_ADOPT,
                                  .fd = g->fd,
                                  .pid = h->pid,
                                  .token = h->token,
                                  .session = h->session};
    (void)epoll_ctl(f->epoll, EPOLL_CTL_DEL, g->fd, NULL);
    if (!net_loop_post(&v->loops[h->shard], &post)) {
        refuse(f, g, NET_FULL);
        return;
    }
    forget_stranger(f, g);
    free(g);
}

/* As long for any two secrets. */
static bool same_secret(const uint8_t *a, const uint8_t *b) {
    unsigned differ = 0;
    for (unsigned i = 0; i < NET_SECRET_BYTES; i++)
        differ |= (unsigned)(a[i] ^ b[i]);
    return differ == 0;
}

static void hear(struct net_front *f, struct guest *g) {
    ssize_t n = recv(g->fd, (char *)&g->hello + g->got, sizeof g->hello - g->got, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        send_away(f, g);
        return;
    }
    g->got += (uint32_t)n;
    if (g->got < sizeof g->hello)
        return;
    const struct net_hello *h = &g->hello;
    if (!same_secret(h->secret, f->server->config.secret))
        refuse(f, g, NET_DENIED);
    else if (h->magic != NET_MAGIC || h->version != NET_VERSION)
        refuse(f, g, NET_OTHER_VERSION);
    else if (h->kind == NET_CONTROL && h->token && !h->reserved)
        let_control_in(f, g);
    else if (h->kind == NET_DATA && h->pid && !h->reserved)
        let_data_in(f, g);
    else
        refuse(f, g, NET_BAD_REQUEST);
}

static void let_in(struct net_front *f, int listener) {
    const struct net_config *config = &f->server->config;
    while (f->nr_strangers < config->max_strangers) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            /* Out of descriptors or memory: look again when a stranger has gone, or after a while. */
            if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
                accept_all(f, false);
            return;
        }
        struct guest *g = calloc(1, sizeof *g);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = g};
        if (!g || epoll_ctl(f->epoll, EPOLL_CTL_ADD, fd, &e)) {
            free(g);
            close(fd);
            return;
        }
        net_socket_setup(fd, config->vanished_s);
        g->what = STRANGER;
        g->fd = fd;
        g->expires_ns = net_now_ns() + (uint64_t)config->hello_ms * 1000000u;
        g->prev = f->strangers.prev;
        g->next = &f->strangers;
        g->prev->next = g->next->prev = g;
        f->nr_strangers++;
    }
    accept_all(f, false);
}

/*
 * Send the overdue away; and when there is no room, those who have been silent for longest, or strangers without the secret
 * would keep everybody waiting. Milliseconds until the next one is overdue, or -1.
 */
static int expire(struct net_front *f) {
    const uint64_t now = net_now_ns();
    uint32_t most = f->server->config.max_strangers, too_many = 0;
    if (f->nr_strangers >= most)
        too_many = most / 8 + 1;
    while (f->strangers.next != &f->strangers) {
        struct guest *g = f->strangers.next;
        if (g->expires_ns > now && !too_many)
            return (int)((g->expires_ns - now) / 1000000u) + 1;
        send_away(f, g);
        too_many -= too_many > 0;
    }
    return -1;
}

/* ---------------------------------------------------------------- the thread */

static void *run(void *arg) {
    struct net_front *f = arg;
    struct epoll_event events[EVENTS];
    while (!atomic_load(&f->stop)) {
        int ms = expire(f);
        if (!f->accepting && (ms < 0 || ms > 100))
            ms = 100; /* what is short may not be so any more */
        int n = epoll_wait(f->epoll, events, EVENTS, ms);
        if (n == 0 && !f->accepting && f->nr_strangers < f->server->config.max_strangers)
            accept_all(f, true);
        /* A guest that is freed by an event is in no other event of the batch: there is one for each descriptor. */
        for (int i = 0; i < n; i++) {
            struct guest *g = events[i].data.ptr;
            if (g->what == LISTENER)
                let_in(f, g->fd);
            else if (g->what == BELL)
                close_departed(f);
            else if (g->what == STRANGER)
                hear(f, g);
            else
                process_ends(f, g); /* its end, or words where there are to be none */
        }
    }
    return NULL;
}

int net_front_open(struct net_server *v, const int *listeners, int nr_listeners,
                   struct net_failure *failure) {
    struct net_front *f = calloc(1, sizeof *f);
    uint32_t size = 16, first;
    if (!f || nr_listeners > MAX_LISTENERS)
        return NET_NO_MEMORY;
    v->front = f;
    f->server = v;
    f->accepting = true;
    f->strangers.next = f->strangers.prev = &f->strangers;
    pthread_mutex_init(&f->lock, NULL);
    while (size < v->config.max_processes)
        size *= 2;
    f->mask = size - 1;
    f->processes = calloc(size, sizeof *f->processes);
    f->epoll = epoll_create1(EPOLL_CLOEXEC);
    f->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    f->bell_guest = (struct guest){.what = BELL, .fd = f->bell};
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = &f->bell_guest};
    if (!f->processes || f->epoll < 0 || f->bell < 0 ||
        getrandom(&first, sizeof first, 0) != sizeof first ||
        epoll_ctl(f->epoll, EPOLL_CTL_ADD, f->bell, &e)) {
        *failure = (struct net_failure){"epoll", errno};
        return NET_NO_MEMORY;
    }
    /* A server that is started again should not give out pids that its clients of before still have elsewhere. */
    f->last_pid = first;
    for (int i = 0; i < nr_listeners; i++) {
        f->listeners[i] = (struct guest){.what = LISTENER, .fd = listeners[i]};
        f->nr_listeners++;
        e.data.ptr = &f->listeners[i];
        if (epoll_ctl(f->epoll, EPOLL_CTL_ADD, listeners[i], &e)) {
            *failure = (struct net_failure){"epoll_ctl", errno};
            return NET_NO_MEMORY;
        }
    }
    return NET_OK;
}

int net_front_start(struct net_server *v) {
    int error = pthread_create(&v->front->thread, NULL, run, v->front);
    v->front->started = error == 0;
    return error;
}

void net_front_stop(struct net_server *v) {
    const uint64_t one = 1;
    atomic_store(&v->front->stop, true);
    ssize_t ignored = write(v->front->bell, &one, sizeof one);
    (void)ignored;
}

void net_front_join(struct net_server *v) {
    if (v->front->started)
        pthread_join(v->front->thread, NULL);
    v->front->started = false;
}

/* Context: every thread has ended. */
void net_front_close(struct net_server *v) {
    struct net_front *f = v->front;
    while (f->strangers.next != &f->strangers)
        send_away(f, f->strangers.next);
    for (uint32_t i = 0; f->processes && i <= f->mask; i++) {
        while (f->processes[i]) {
            struct guest *g = f->processes[i];
            f->processes[i] = g->sibling;
            close(g->fd);
            free(g);
        }
    }
    close_departed(f);
    free(f->processes);
    close(f->epoll);
    close(f->bell);
    pthread_mutex_destroy(&f->lock);
    free(f);
    v->front = NULL;
}

uint32_t net_server_processes(struct net_server *v) { return atomic_load(&v->front->nr_processes); }
