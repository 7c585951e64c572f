/* memory.c - see memory.h. */
#include "memory.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>

#include "check.h"
#include "net_server.h"

#define POOL (8u << 20)

static struct net_server *server;
static int listener;
struct sockaddr_in memory_place;
uint8_t memory_secret[NET_SECRET_BYTES] = "a secret of thirty-two bytes ...";

void memory_start(void) {
    struct net_failure failure;
    struct net_config g = {.nr_shards = SHARDS,
                           .pool_bytes = POOL,
                           .page_bytes = PAGE,
                           .max_processes = 64,
                           .max_strangers = 16,
                           .hello_ms = 5000,
                           .vanished_s = 30,
                           .populate = true,
                           .limits = {.max_pages = UINT64_MAX,
                                      .max_virtual = 1 << 20,
                                      .max_ranges = 1 << 16,
                                      .max_refs = 1 << 16,
                                      .max_outstanding = 256,
                                      .max_ref_slots = 1 << 16,
                                      .keep_ms = 50}};
    memcpy(g.secret, memory_secret, sizeof memory_secret);
    memory_place =
        (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof memory_place;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    EXPECT(listener >= 0);
    EXPECT_EQ(bind(listener, (struct sockaddr *)&memory_place, size), 0);
    EXPECT_EQ(listen(listener, 64), 0);
    EXPECT_EQ(getsockname(listener, (struct sockaddr *)&memory_place, &size), 0);
    EXPECT_EQ(net_server_open(&g, &listener, 1, &server, &failure), NET_OK);
}

void memory_stop(void) {
    net_server_close(server);
    close(listener);
}

int memory_greeted(const struct net_hello *hello, struct net_welcome *welcome) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int on = 1;
    EXPECT_EQ(connect(fd, (struct sockaddr *)&memory_place, sizeof memory_place), 0);
    EXPECT_EQ(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), 0);
    EXPECT_EQ(send(fd, hello, sizeof *hello, MSG_NOSIGNAL), sizeof *hello);
    EXPECT_EQ(recv(fd, welcome, sizeof *welcome, MSG_WAITALL), sizeof *welcome);
    EXPECT_EQ(welcome->magic, NET_MAGIC);
    return fd;
}

static int data_connection(const struct process *p, uint32_t shard) {
    struct net_welcome w;
    struct net_hello h = {.magic = NET_MAGIC,
                          .version = NET_VERSION,
                          .kind = NET_DATA,
                          .token = 99,
                          .pid = p->pid,
                          .shard = (uint16_t)shard};
    memcpy(h.secret, memory_secret, sizeof memory_secret);
    int fd = memory_greeted(&h, &w);
    EXPECT_EQ(w.status, NET_OK);
    return fd;
}

void memory_join(struct process *p) {
    struct net_welcome w;
    struct net_hello h = {
        .magic = NET_MAGIC, .version = NET_VERSION, .kind = NET_CONTROL, .token = 99};
    memcpy(h.secret, memory_secret, sizeof memory_secret);
    p->control = memory_greeted(&h, &w);
    EXPECT_EQ(w.status, NET_OK);
    EXPECT_EQ(w.nr_shards, SHARDS);
    p->pid = w.pid;
    for (uint32_t i = 0; i < SHARDS; i++) {
        p->links[i] = net_link_new(w.max_outstanding);
        EXPECT_EQ(net_link_resume(p->links[i], data_connection(p, i)), 0);
    }
}

void memory_leave(struct process *p) {
    char end;
    for (uint32_t i = 0; i < SHARDS; i++) {
        net_link_fail(p->links[i], NET_CLOSED);
        net_link_free(p->links[i]);
    }
    (void)shutdown(p->control, SHUT_WR);
    EXPECT_EQ(recv(p->control, &end, 1, 0), 0); /* when everything is freed */
    close(p->control);
}

/* One thread at a time: of two connections to a shard the server keeps the newer. */
static void mend(struct process *p, uint32_t shard) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    if (!net_link_healthy(p->links[shard]))
        EXPECT_EQ(net_link_resume(p->links[shard], data_connection(p, shard)), 0);
    pthread_mutex_unlock(&lock);
}

/* A call, and its outcome; a broken connection is made again. */
int memory_call(struct process *p, uint32_t shard, struct net_call *c) {
    int status = net_link_submit(p->links[shard], c, false);
    while (status == 0 && (status = net_link_wait(p->links[shard], c, 0)) < 0) {
        if (status == NET_BROKEN)
            mend(p, shard);
        else
            EXPECT_EQ(status, NET_INTERRUPTED);
        status = 0;
        if (net_call_done(c))
            return c->outcome;
    }
    return status;
}

uint64_t memory_asked(struct process *p, uint32_t shard, struct net_request q) {
    struct net_call c = {.request = q};
    EXPECT_EQ(memory_call(p, shard, &c), NET_OK);
    return c.a;
}

void memory_write(struct process *p, uint32_t shard, uint64_t address, const void *from,
                  uint32_t n) {
    struct net_call c = {.request = {.op = NET_RWRITE, .payload = n, .a = address},
                         .payload = from};
    EXPECT_EQ(memory_call(p, shard, &c), NET_OK);
}

void memory_read(struct process *p, uint32_t shard, uint64_t address, void *into, uint32_t n) {
    struct net_call c = {
        .request = {.op = NET_RREAD, .a = address, .b = n}, .into = into, .into_bytes = n};
    EXPECT_EQ(memory_call(p, shard, &c), NET_OK);
}

struct net_audit memory_audit(struct process *p, uint32_t shard) {
    struct net_audit found;
    struct net_call c = {.request = {.op = NET_AUDIT}, .into = &found, .into_bytes = sizeof found};
    EXPECT_EQ(memory_call(p, shard, &c), NET_OK);
    EXPECT_EQ(found.nr_violations, 0);
    return found;
}

void memory_expect_all_free(void) {
    struct process p;
    memory_join(&p);
    for (uint32_t i = 0; i < SHARDS; i++) {
        struct net_audit found = memory_audit(&p, i);
        EXPECT_EQ(found.nr_free, found.nr_pages);
        EXPECT_EQ(found.nr_refs, 0);
        EXPECT_EQ(found.nr_processes, 1);
    }
    memory_leave(&p);
}
