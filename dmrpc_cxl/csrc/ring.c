/*
 * ring.c - two byte streams in shared memory, with bells: the transport between two processes of one machine.
 *
 * Facts, and what they force on us:
 * - The other process may write anything into the memory at any time. Our own index is never read back from it, the
 *   other's is read once per step and must lie within capacity of ours, a frame's size is taken once and kept.
 * - It can also share its bells' file descriptions in any state. The worst it can do with them is not to be woken.
 * - A frame may be larger than the ring. Both sides move what they can and publish it in steps, so a large frame
 *   streams, and a receiver always empties the ring, frame complete or not.
 * - A bell costs a system call on both sides. It is rung only for a sleeper, and once: a flag says so, and is taken
 *   by exchange.
 * - Nothing tells a sleeper on a futex that the peer has died. A blocked sender looks at peer_fd now and then.
 *
 * No wake-up is lost, by the same argument in both directions (Dekker's): one side stores its flag, then looks at the
 * index; the other stores the index, then looks at the flag; a full fence lies between the two steps of each. So at
 * least one of them sees what the other did.
 *
 *     consumer, going to sleep              producer
 *     want_bell = 1                         tail = new       (release: the bytes come before it)
 *     fence                                 fence
 *     look at tail: data? don't sleep       look at want_bell: set? take it, ring
 *
 *     producer, ring full                   consumer
 *     want_space |= how                     head = new       (release: the bytes were read before it)
 *     fence                                 fence
 *     look at head: room? don't sleep       look at want_space: set, and half is free? take it, wake
 *
 * "Half is free" spares a switch for every few bytes. The consumer's view of the free space is never below the truth,
 * for its tail may be old; so a producer that sleeps is woken by the step that frees the half.
 */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "host.h"

_Static_assert(sizeof(struct dm_ring_control) == 512, "a control block is 512 bytes");
_Static_assert(offsetof(struct dm_ring_shared, to_server) == 1024, "control 1 is at 1024");
_Static_assert(sizeof(struct dm_ring_shared) <= DM_RING_DATA,
               "data comes behind the control blocks");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "sizes and the futex are little-endian");

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#define STEP (128u << 10)           /* at most this much is copied between two publications */
#define LOOK_AT_PEER_NS 50000000ull /* how long a blocked sender trusts that its peer lives */
#define SPIN_NS 100000u             /* as long as two wake-ups cost: docs/decisions/0010 */
#define YIELD_AFTER_NS 3000u

uint32_t dm_ring_forks;

/* One writer each; others may read. */
#define COUNT(counter, n)                                                                          \
    atomic_store_explicit(&(counter),                                                              \
                          atomic_load_explicit(&(counter), memory_order_relaxed) + (n),            \
                          memory_order_relaxed)

static int corrupt(bool *broken, struct dm_error *e, const char *what) {
    *broken = true;
    return dm_fail(e, DM_ERR_PROTOCOL, "%s", what);
}

static int closed_error(struct dm_error *e) {
    return dm_fail(e, DM_ERR_RING_CLOSED, "the ring is closed");
}

/* ---------------------------------------------------------------- making */

static void count_fork(void) { dm_ring_forks++; }
static void watch_forks(void) { (void)pthread_atfork(NULL, NULL, count_fork); }

static void unmake(struct dm_ring *r) {
    int fds[] = {r->memfd, r->my_bell, r->peer_bell, r->alarm, r->epfd};
    /* A forked child has no mapping, and perhaps something else at that address. */
    if (r->shared && !dm_ring_forked(r))
        munmap(r->shared, DM_RING_DATA + 2 * r->capacity);
    for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    free(r);
}

static struct dm_ring *blank(uint32_t max_frame) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    struct dm_ring *r = aligned_alloc(_Alignof(struct dm_ring), sizeof *r);
    if (!r)
        return NULL;
    memset(r, 0, sizeof *r);
    r->max_frame = max_frame;
    r->forks = dm_ring_forks;
    r->memfd = r->my_bell = r->peer_bell = r->epfd = -1;
    r->alarm = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    atomic_init(&r->refs, 1);
    atomic_init(&r->peer_fd, -1);
    dm_spin_init(&r->in.spin);
    dm_spin_init(&r->out.spin);
    return r;
}

/* Map the memory, which has the right size, and find the two directions. */
static int map(struct dm_ring *r, bool server, struct dm_error *e) {
    size_t size = DM_RING_DATA + 2 * r->capacity;
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, r->memfd, 0);
    if (p == MAP_FAILED)
        return dm_fail_sys(e, "mmap", 0);
    r->shared = p;
    (void)madvise(p, size, MADV_DONTFORK); /* two processes on one side would tear the streams */
    struct dm_ring_shared *s = p;
    char *to_client = (char *)p + DM_RING_DATA, *to_server = to_client + r->capacity;
    r->out.c = server ? &s->to_client : &s->to_server;
    r->out.data = server ? to_client : to_server;
    r->in.c = server ? &s->to_server : &s->to_client;
    r->in.data = server ? to_server : to_client;
    return DM_OK;
}

static int make(struct dm_ring *r, uint64_t capacity, struct dm_error *e) {
    r->capacity = capacity;
    r->memfd = memfd_create("dmrpc-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (r->memfd < 0)
        return dm_fail_sys(e, "memfd_create", 0);
    r->my_bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    r->peer_bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (r->alarm < 0 || r->my_bell < 0 || r->peer_bell < 0)
        return dm_fail_sys(e, "eventfd", 0);
    if (ftruncate(r->memfd, (off_t)(DM_RING_DATA + 2 * capacity)) < 0)
        return dm_fail_sys(e, "ftruncate", 0);
    if (fcntl(r->memfd, F_ADD_SEALS, SEALS) < 0)
        return dm_fail_sys(e, "fcntl(F_ADD_SEALS)", 0);
    int s = map(r, true, e);
    if (s)
        return s;
    r->shared->magic = DM_RING_MAGIC;
    r->shared->version = DM_RING_VERSION;
    r->shared->capacity = capacity;
    return DM_OK;
}

int dm_ring_create(uint64_t capacity, uint32_t max_frame, struct dm_ring **out,
                   struct dm_error *e) {
    if (capacity < DM_RING_MIN_CAPACITY || capacity > DM_RING_MAX_CAPACITY ||
        (capacity & (capacity - 1)))
        return dm_fail(e, DM_ERR_BAD_SIZE, "the capacity must be a power of two from %u to %u",
                       DM_RING_MIN_CAPACITY, DM_RING_MAX_CAPACITY);
    struct dm_ring *r = blank(max_frame);
    if (!r)
        return DM_ERR_NO_MEMORY;
    int s = make(r, capacity, e);
    if (s)
        unmake(r);
    else
        *out = r;
    return s;
}

/* A descriptor that would block, or is no eventfd, must not become a bell. */
static int check_bell(int fd, struct dm_error *e) {
    char path[32], target[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, target, sizeof target - 1);
    target[n < 0 ? 0 : n] = 0;
    int flags = fcntl(fd, F_GETFL);
    if (strcmp(target, "anon_inode:[eventfd]") != 0 || flags < 0 || !(flags & O_NONBLOCK))
        return dm_fail(e, DM_ERR_PROTOCOL, "a bell is not an eventfd that never blocks");
    return DM_OK;
}

static int check_memory(struct dm_ring *r, struct dm_error *e) {
    struct stat st;
    int seals = fcntl(r->memfd, F_GET_SEALS);
    if (seals < 0 || (seals & SEALS) != SEALS)
        return dm_fail(e, DM_ERR_PROTOCOL, "the ring's memory is not sealed at its size");
    if (fstat(r->memfd, &st) < 0)
        return dm_fail_sys(e, "fstat", 0);
    uint64_t capacity = st.st_size > DM_RING_DATA ? ((uint64_t)st.st_size - DM_RING_DATA) / 2 : 0;
    if (capacity < DM_RING_MIN_CAPACITY || capacity > DM_RING_MAX_CAPACITY ||
        (capacity & (capacity - 1)) || (uint64_t)st.st_size != DM_RING_DATA + 2 * capacity)
        return dm_fail(e, DM_ERR_PROTOCOL, "the ring's memory has a size no ring has: %lld bytes",
                       (long long)st.st_size);
    r->capacity = capacity;
    return DM_OK;
}

static int adopt(struct dm_ring *r, const int fds[3], struct dm_error *e) {
    int *mine[] = {&r->memfd, &r->my_bell, &r->peer_bell};
    if (r->alarm < 0)
        return dm_fail_sys(e, "eventfd", 0);
    for (int i = 0; i < 3; i++)
        if ((*mine[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, 3)) < 0)
            return dm_fail_sys(e, "fcntl(F_DUPFD_CLOEXEC)", 0);
    int s;
    if ((s = check_bell(r->my_bell, e)) || (s = check_bell(r->peer_bell, e)) ||
        (s = check_memory(r, e)))
        return s;
    if (map(r, false, e))
        return dm_fail(e, DM_ERR_PROTOCOL, "the ring's memory cannot be mapped");
    if (r->shared->magic != DM_RING_MAGIC || r->shared->version != DM_RING_VERSION ||
        r->shared->capacity != r->capacity)
        return dm_fail(e, DM_ERR_PROTOCOL, "the ring's memory is not a ring of version %u",
                       DM_RING_VERSION);
    /* The server may have sent frames already; we have sent and taken nothing. */
    return DM_OK;
}

int dm_ring_attach(int memfd, int my_bell, int peer_bell, uint32_t max_frame, struct dm_ring **out,
                   struct dm_error *e) {
    struct dm_ring *r = blank(max_frame);
    if (!r)
        return DM_ERR_NO_MEMORY;
    int s = adopt(r, (const int[]){memfd, my_bell, peer_bell}, e);
    if (s)
        unmake(r);
    else
        *out = r;
    return s;
}

static void futex_wake(_Atomic uint64_t *word) {
    (void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Whoever is inside a call comes back; memory and descriptors go with the last reference. */
void dm_ring_close(struct dm_ring *r) {
    uint64_t one = 1;
    if (!atomic_exchange(&r->closed, true) && !dm_ring_forked(r)) {
        ssize_t ignored = write(r->alarm, &one, sizeof one);
        (void)ignored;
        futex_wake(&r->out.c->head);
    }
}

void dm_ring_put(struct dm_ring *r) {
    if (atomic_fetch_sub(&r->refs, 1) == 1)
        unmake(r);
}

/* ---------------------------------------------------------------- spinning */

void dm_spin_init(struct dm_spin *s) {
    s->budget_ns = SPIN_NS;
    s->wins = 128;
}

/* With one CPU, whom we wait for cannot run while we spin. Asked now and then: the answer costs a system call. */
static bool several_cpus(void) {
    static _Thread_local uint32_t asked;
    static _Thread_local bool several;
    if ((asked++ & 63) == 0) {
        cpu_set_t set;
        several = sched_getaffinity(0, sizeof set, &set) < 0 || CPU_COUNT(&set) > 1;
    }
    return several;
}

/* Spin where it pays at least once in eight; where it does not, look again once in a while. */
bool dm_spin_worth(struct dm_spin *s) {
    if (!s->budget_ns || !several_cpus())
        return false;
    if (s->wins >= 32 || ++s->skipped >= 64) {
        s->skipped = 0;
        return true;
    }
    return false;
}

/*
 * Look until it is ready or the budget is spent. Two that take turns are often put on one CPU, where spinning keeps the
 * other from running: after a moment, each block ends with a yield. That lets it run, and since both are runnable, the
 * kernel moves one of them. A yield to a third who computes may take long: what came too late is no win.
 */
bool dm_spin(struct dm_spin *s, bool (*ready)(void *), void *arg) {
    uint64_t start = dm_now_ns(), budget = s->budget_ns, spent = 0;
    bool found = false;
    while (!found && spent < budget) {
        for (int i = 0; i < 16 && !(found = ready(arg)); i++)
            dm_pause();
        if (!found && spent > YIELD_AFTER_NS)
            sched_yield();
        spent = dm_now_ns() - start;
    }
    if (!found)
        found = ready(arg); /* after the last yield */
    if (found && spent < budget) {
        s->wins += (255 - s->wins) / 8;
        COUNT(s->won, 1);
    } else {
        s->wins -= (s->wins + 7) / 8;
        COUNT(s->lost, 1);
    }
    return found;
}

/* ---------------------------------------------------------------- bells and the peer */

static void ring_bell(int bell) {
    uint64_t one = 1;
    ssize_t ignored = write(bell, &one, sizeof one); /* full: then it is readable anyway */
    (void)ignored;
}

void dm_ring_wake_self(struct dm_ring *r) { ring_bell(r->my_bell); }

void dm_ring_drain_bell(struct dm_ring *r) {
    uint64_t count;
    struct iovec v = {&count, sizeof count};
    /* The peer could have made the shared description blocking; NOWAIT does not depend on that. */
    if (preadv2(r->my_bell, &v, 1, -1, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP) {
        ssize_t ignored = read(r->my_bell, &count, sizeof count);
        (void)ignored;
    }
}

/* peer_fd: a socket connected to the peer, or its pidfd. */
static void look_at_peer(struct dm_ring *r) {
    struct pollfd p = {.fd = atomic_load(&r->peer_fd), .events = POLLIN | POLLRDHUP};
    if (p.fd < 0 || poll(&p, 1, 0) <= 0)
        return;
    char c;
    ssize_t n = recv(p.fd, &c, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n > 0)
        atomic_store(&r->peer_spoke, true);
    else if (n == 0 || (errno != EAGAIN && errno != EINTR) || (p.revents & (POLLHUP | POLLERR)))
        atomic_store(&r->peer_gone, true);
}

/* ---------------------------------------------------------------- sending */

struct cursor {
    const struct iovec *v;
    uint64_t offset, left;
};

static struct cursor cursor_at(const struct iovec *iov, uint64_t total, uint64_t skip) {
    struct cursor c = {iov, skip, total > skip ? total - skip : 0};
    while (c.left && c.offset >= c.v->iov_len)
        c.offset -= (c.v++)->iov_len;
    return c;
}

static void gather(struct cursor *c, char *to, uint64_t n) {
    c->left -= n;
    while (n) {
        uint64_t part = c->v->iov_len - c->offset;
        if (part > n)
            part = n;
        memcpy(to, (const char *)c->v->iov_base + c->offset, part);
        to += part;
        n -= part;
        c->offset += part;
        while (c->offset == c->v->iov_len && (n || c->left)) {
            c->v++;
            c->offset = 0;
        }
    }
}

/* Bytes that may be written, -1 when the consumer's index is impossible. Acquire, with the consumer's release of head:
 * it has read what we are about to overwrite. */
static int64_t room_now(struct dm_ring *r) {
    struct dm_ring_out *o = &r->out;
    uint64_t head = atomic_load_explicit(&o->c->head, memory_order_acquire);
    if (o->tail - head > r->capacity)
        return -1;
    o->head_seen = head; /* only what has been checked: what is written relies on it */
    return (int64_t)(r->capacity - (o->tail - head));
}

/* Release, with the consumer's acquire of tail; the fence is the producer's half of Dekker's handshake. */
static void publish_tail(struct dm_ring *r) {
    struct dm_ring_out *o = &r->out;
    atomic_store_explicit(&o->c->tail, o->tail, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&o->c->want_bell, memory_order_relaxed) &&
        atomic_exchange_explicit(&o->c->want_bell, 0, memory_order_acq_rel)) {
        ring_bell(r->peer_bell);
        COUNT(o->bells, 1);
    }
}

/* Write and publish what fits, in steps; negative when head is garbage. */
static int write_some(struct dm_ring *r, struct cursor *c, struct dm_error *e) {
    struct dm_ring_out *o = &r->out;
    while (c->left) {
        uint64_t room = r->capacity - (o->tail - o->head_seen);
        if (room < c->left && room < STEP) {
            int64_t now = room_now(r);
            if (now < 0)
                return corrupt(&o->broken, e, "the peer's read index is impossible");
            if (!(room = (uint64_t)now))
                return DM_OK;
        }
        uint64_t n = c->left < room ? c->left : room;
        if (n > STEP)
            n = STEP;
        uint64_t at = o->tail & (r->capacity - 1), first = r->capacity - at;
        if (first > n)
            first = n;
        gather(c, o->data + at, first);
        if (n > first)
            gather(c, o->data, n - first);
        o->tail += n;
        COUNT(o->bytes, n);
        DM_CRASH_POINT(ring_written);
        publish_tail(r);
        DM_CRASH_POINT(ring_published);
    }
    return DM_OK;
}

/* Ask to be woken, then look again: the producer's half of the handshake for space. */
static int64_t ask_for_space(struct dm_ring *r, uint32_t how) {
    atomic_fetch_or_explicit(&r->out.c->want_space, how, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return room_now(r);
}

static int can_send(struct dm_ring *r, struct dm_error *e) {
    if (atomic_load_explicit(&r->closed, memory_order_relaxed))
        return closed_error(e);
    if (r->out.broken)
        return dm_fail(e, DM_ERR_RING_CLOSED,
                       "the ring is closed for sending: the stream broke within a frame");
    return DM_OK;
}

bool dm_ring_fits(struct dm_ring *r, uint64_t total) {
    struct dm_ring_out *o = &r->out;
    return r->capacity - (o->tail - o->head_seen) >= total || room_now(r) >= (int64_t)total;
}

int64_t dm_ring_try_send(struct dm_ring *r, const struct iovec *iov, uint64_t total, uint64_t skip,
                         struct dm_error *e) {
    struct cursor c = cursor_at(iov, total, skip);
    uint64_t all = c.left;
    int s = can_send(r, e);
    while (!s && !(s = write_some(r, &c, e)) && c.left) {
        atomic_store(&r->space_owed, 1); /* before the flag: the bell may ring at once */
        int64_t room = ask_for_space(r, DM_SPACE_BELL);
        COUNT(r->out.waits, 1);
        if (room == 0)
            break;
        if (room < 0)
            s = corrupt(&r->out.broken, e, "the peer's read index is impossible");
    }
    return s ? s : (int64_t)(all - c.left);
}

static bool room_or_closed(void *arg) {
    struct dm_ring *r = arg;
    return atomic_load_explicit(&r->out.c->head, memory_order_relaxed) != r->out.head_seen ||
           atomic_load_explicit(&r->closed, memory_order_relaxed);
}

/* Sleep until the consumer wakes us, for a while. head cannot come round to the same low half: capacity is less. */
static void sleep_for_space(struct dm_ring *r, uint64_t deadline_ns) {
    uint64_t now = dm_now_ns(), ns = LOOK_AT_PEER_NS;
    if (deadline_ns <= now)
        return;
    if (deadline_ns - now < ns)
        ns = deadline_ns - now;
    struct timespec t = {.tv_nsec = (long)ns};
    (void)syscall(SYS_futex, &r->out.c->head, FUTEX_WAIT, (uint32_t)r->out.head_seen, &t, NULL, 0);
}

/* Wait for room, for a while. */
static int wait_for_room(struct dm_ring *r, uint64_t deadline_ns, struct dm_error *e) {
    if (atomic_load_explicit(&r->closed, memory_order_relaxed))
        return closed_error(e);
    if (deadline_ns && dm_spin_worth(&r->out.spin) && dm_spin(&r->out.spin, room_or_closed, r))
        return DM_OK;
    int64_t room = ask_for_space(r, DM_SPACE_FUTEX);
    COUNT(r->out.waits, 1);
    if (room > 0)
        return DM_OK;
    if (room < 0)
        return corrupt(&r->out.broken, e, "the peer's read index is impossible");
    sleep_for_space(r, deadline_ns);
    if (atomic_load(&r->closed))
        return closed_error(e);
    if (room_now(r) != 0)
        return DM_OK;
    look_at_peer(r);
    if (atomic_load(&r->peer_gone))
        return dm_fail(e, DM_ERR_PEER_GONE, "the peer went away");
    if (dm_now_ns() >= deadline_ns)
        return dm_fail(e, DM_ERR_DEADLINE, "the ring stayed full");
    return DM_RING_INTERRUPTED;
}

/* A send was given up. If a part of the frame went out, the stream is broken for good, and the text says so. */
void dm_ring_break_sending(struct dm_ring *r, uint64_t done, uint64_t total, struct dm_error *e) {
    if (!done || done == total)
        return;
    r->out.broken = true;
    size_t n = strlen(e->text);
    snprintf(e->text + n, sizeof e->text - n,
             "; %llu of %llu bytes had gone out, so the ring is closed for sending",
             (unsigned long long)done, (unsigned long long)total);
}

/*
 * Send all of it, from *done on. When it fails, either nothing went out, or part of it did: then every later send says
 * DM_ERR_RING_CLOSED. DM_RING_INTERRUPTED is no failure: *done says where to go on.
 */
int dm_ring_send(struct dm_ring *r, const struct iovec *iov, uint64_t total, uint64_t *done,
                 uint64_t deadline_ns, struct dm_error *e) {
    struct cursor c = cursor_at(iov, total, *done);
    int s = can_send(r, e);
    while (!s && !(s = write_some(r, &c, e)) && c.left)
        s = wait_for_room(r, deadline_ns, e);
    *done = total - c.left;
    if (s && s != DM_RING_INTERRUPTED)
        dm_ring_break_sending(r, *done, total, e);
    return s;
}

/* ---------------------------------------------------------------- receiving */

/* Bytes in the ring, -1 when the producer's index is impossible. Acquire, with the producer's release of tail. */
static int64_t data_now(struct dm_ring *r) {
    struct dm_ring_in *i = &r->in;
    uint64_t head = atomic_load_explicit(&i->head, memory_order_relaxed);
    uint64_t tail = atomic_load_explicit(&i->c->tail, memory_order_acquire);
    if (tail - head > r->capacity)
        return -1;
    i->tail_seen = tail; /* only what has been checked: what is copied relies on it */
    return (int64_t)(tail - head);
}

static void wake_producer(struct dm_ring *r) {
    uint32_t how = atomic_exchange_explicit(&r->in.c->want_space, 0, memory_order_acq_rel);
    if (how & DM_SPACE_BELL) {
        ring_bell(r->peer_bell);
        COUNT(r->in.bells, 1);
    }
    if (how & DM_SPACE_FUTEX)
        futex_wake(&r->in.c->head);
}

static void copy_out(struct dm_ring *r, char *to, uint64_t n) {
    uint64_t head = atomic_load_explicit(&r->in.head, memory_order_relaxed);
    uint64_t at = head & (r->capacity - 1), first = r->capacity - at;
    if (first > n)
        first = n;
    memcpy(to, r->in.data + at, first);
    if (n > first)
        memcpy(to + first, r->in.data, n - first);
    atomic_store_explicit(&r->in.head, head + n, memory_order_relaxed);
}

/* Release, with the producer's acquire of head; the fence is the consumer's half of the handshake for space. */
static void publish_head(struct dm_ring *r) {
    struct dm_ring_in *i = &r->in;
    uint64_t head = atomic_load_explicit(&i->head, memory_order_relaxed);
    atomic_store_explicit(&i->c->head, head, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&i->c->want_space, memory_order_relaxed) &&
        i->tail_seen - head <= r->capacity / 2)
        wake_producer(r);
}

/* The size of the next frame. Its 4 bytes are taken from the ring at once, so they are read once; got says how much of
 * them is here until size is known. The index is published with the rest of the frame, or when there is no more. */
int64_t dm_ring_begin(struct dm_ring *r, uint64_t *there, struct dm_error *e) {
    struct dm_ring_in *i = &r->in;
    if (i->broken)
        return dm_fail(e, DM_ERR_PROTOCOL, "the peer broke the stream before");
    uint64_t head = atomic_load_explicit(&i->head, memory_order_relaxed);
    int64_t n = (int64_t)(i->tail_seen - head);
    if (n < 4 && (n = data_now(r)) < 0)
        return corrupt(&i->broken, e, "the peer's write index is impossible");
    if (!i->size && n) {
        uint32_t take = 4 - i->got < (uint64_t)n ? 4 - i->got : (uint32_t)n;
        copy_out(r, (char *)i->size_bytes + i->got, take);
        i->got += take;
        n -= take;
        if (i->got < 4) {
            publish_head(r);
        } else {
            uint32_t size;
            memcpy(&size, i->size_bytes, 4);
            if (size < DM_RING_MIN_FRAME || size > r->max_frame) {
                i->broken = true;
                return dm_fail(e, DM_ERR_PROTOCOL, "the peer announced a frame of %u bytes", size);
            }
            i->size = size;
            if (!n) /* fill publishes otherwise */
                publish_head(r);
        }
    }
    *there = (uint64_t)n;
    return i->size;
}

/* Take what there is of the frame under way, at most want bytes, and publish in steps. */
int64_t dm_ring_fill(struct dm_ring *r, char *to, uint64_t want, struct dm_error *e) {
    struct dm_ring_in *i = &r->in;
    uint64_t done = 0;
    while (done < want) {
        uint64_t n = i->tail_seen - atomic_load_explicit(&i->head, memory_order_relaxed);
        if (n < want - done) {
            int64_t now = data_now(r);
            if (now < 0)
                return corrupt(&i->broken, e, "the peer's write index is impossible");
            if (!(n = (uint64_t)now))
                break;
        }
        if (n > want - done)
            n = want - done;
        if (n > STEP)
            n = STEP;
        copy_out(r, to + done, n);
        DM_CRASH_POINT(ring_copied);
        publish_head(r);
        DM_CRASH_POINT(ring_consumed);
        done += n;
    }
    i->got += (uint32_t)done;
    COUNT(i->bytes, done);
    return (int64_t)done;
}

/* ---------------------------------------------------------------- waiting */

/*
 * From now on a bell rings when data comes. True: there is data already, and whoever called goes on reading. The ring is
 * marked as armed for others first: of all who see data from then on, the one that takes the mark has it.
 */
bool dm_ring_arm(struct dm_ring *r) {
    atomic_store_explicit(&r->armed, 1, memory_order_seq_cst);
    atomic_store_explicit(&r->in.c->want_bell, 1, memory_order_seq_cst);
    atomic_thread_fence(memory_order_seq_cst);
    if (!dm_ring_has_data(r) || !atomic_exchange(&r->armed, 0))
        return false;
    atomic_store_explicit(&r->in.c->want_bell, 0, memory_order_relaxed);
    return true;
}

static int watch(struct dm_ring *r, int fd, uint32_t events, struct dm_error *e) {
    struct epoll_event ev = {.events = events, .data.fd = fd};
    return epoll_ctl(r->epfd, EPOLL_CTL_ADD, fd, &ev) < 0 ? dm_fail_sys(e, "epoll_ctl", 0) : DM_OK;
}

/* What dm_ring_wait sleeps on. The bell is edge-triggered: each stroke wakes once and needs no read.
 * Context: the caller keeps others from doing the same at once. */
int dm_ring_wait_open(struct dm_ring *r, struct dm_error *e) {
    if (r->epfd >= 0)
        return DM_OK;
    int s, peer = atomic_load(&r->peer_fd);
    r->epfd = epoll_create1(EPOLL_CLOEXEC);
    if (r->epfd < 0)
        return dm_fail_sys(e, "epoll_create1", 0);
    if ((s = watch(r, r->my_bell, EPOLLIN | EPOLLET, e)) || (s = watch(r, r->alarm, EPOLLIN, e)) ||
        (peer >= 0 && (s = watch(r, peer, EPOLLIN | EPOLLRDHUP, e)))) {
        close(r->epfd);
        r->epfd = -1;
    }
    return s;
}

/* Context: as dm_ring_wait_open; others may be waiting. */
int dm_ring_set_peer_fd(struct dm_ring *r, int fd, struct dm_error *e) {
    int old = atomic_load(&r->peer_fd);
    if (r->epfd >= 0 && old >= 0)
        (void)epoll_ctl(r->epfd, EPOLL_CTL_DEL, old, NULL);
    atomic_store(&r->peer_fd, fd);
    atomic_store(&r->peer_gone, false);
    atomic_store(&r->peer_spoke, false);
    return r->epfd >= 0 && fd >= 0 ? watch(r, fd, EPOLLIN | EPOLLRDHUP, e) : DM_OK;
}

static bool data_or_closed(void *arg) {
    struct dm_ring *r = arg;
    return dm_ring_has_data(r) || atomic_load_explicit(&r->closed, memory_order_relaxed);
}

int dm_wait_ms(uint64_t deadline_ns) {
    if (deadline_ns == DM_RING_NO_DEADLINE)
        return -1;
    uint64_t now = dm_now_ns();
    uint64_t ms = deadline_ns > now ? (deadline_ns - now + 999999) / 1000000 : 0;
    return ms > INT_MAX ? INT_MAX : (int)ms;
}

/* Sleep once, armed. */
static int sleep_for_data(struct dm_ring *r, uint64_t deadline_ns, struct dm_error *e) {
    struct epoll_event ev[3];
    if (dm_ring_arm(r))
        return DM_OK;
    COUNT(r->in.sleeps, 1);
    int n = epoll_wait(r->epfd, ev, 3, dm_wait_ms(deadline_ns));
    if (n < 0 && errno == EINTR)
        return DM_RING_INTERRUPTED;
    if (n < 0)
        return dm_fail_sys(e, "epoll_wait", 0);
    atomic_store(&r->armed, 0);
    atomic_store_explicit(&r->in.c->want_bell, 0, memory_order_relaxed);
    int peer = atomic_load(&r->peer_fd);
    for (int i = 0; i < n; i++)
        if (ev[i].data.fd == peer)
            look_at_peer(r);
    return DM_OK;
}

int dm_ring_wait(struct dm_ring *r, uint64_t deadline_ns, struct dm_error *e) {
    atomic_store_explicit(&r->peer_spoke, false, memory_order_relaxed);
    if (dm_ring_has_data(r))
        return 1;
    if (deadline_ns && dm_spin_worth(&r->in.spin))
        (void)dm_spin(&r->in.spin, data_or_closed, r);
    for (;;) {
        if (atomic_load(&r->closed))
            return closed_error(e);
        if (dm_ring_has_data(r))
            return 1;
        int s = sleep_for_data(r, deadline_ns, e);
        if (s)
            return s;
        /* What the peer sent before it went or spoke comes first. */
        if (dm_ring_has_data(r) && !atomic_load(&r->closed))
            return 1;
        if (atomic_load(&r->peer_gone) || atomic_load(&r->peer_spoke))
            return 0;
        if (dm_now_ns() >= deadline_ns)
            return atomic_load(&r->closed) ? closed_error(e) : 0;
    }
}
