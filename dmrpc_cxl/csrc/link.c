/*
 * link.c - the native side of the coordinator protocol (wire.h): one request at a time, blocking, with a deadline.
 *
 * Sockets are non-blocking and waited for with poll, so that a coordinator that is stopped cannot hold a thread
 * beyond its deadline. A broken connection is opened again, introduced again (HELLO, REJOIN) and the request sent once more:
 * requests are idempotent, see supply.c.
 *
 * Context: API threads hold link_lock and neither the host lock nor the GIL; the fault handler uses a link of its own.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "host.h"

static int wait_ready(const struct dm_link *l, short events, uint64_t deadline,
                      struct dm_error *e) {
    uint64_t slice_ms = l->between ? 10 : 100;
    for (;;) {
        uint64_t now = dm_now_ns();
        if (now >= deadline)
            return dm_fail(e, DM_ERR_DEADLINE,
                           "the coordinator did not answer before the deadline");
        struct pollfd p = {.fd = l->fd, .events = events};
        uint64_t ms = (deadline - now) / 1000000u + 1;
        int n = poll(&p, 1, (int)(ms > slice_ms ? slice_ms : ms));
        if (n > 0)
            return DM_OK;
        if (l->between)
            l->between(l->between_arg);
        if (n < 0 && errno != EINTR)
            return dm_fail_sys(e, "poll", 0);
        /* One that is stopped answers nothing, and does not hang up either. */
        if (l->sb && l->epoch &&
            __atomic_load_n(&l->sb->coordinator_epoch, __ATOMIC_ACQUIRE) != l->epoch) {
            if (e)
                e->sys_errno = 0;
            return dm_fail(e, DM_ERR_COORDINATOR_LOST, "another coordinator has taken over");
        }
    }
}

static int lost(struct dm_error *e, const char *what) {
    if (e)
        e->sys_errno = errno;
    return dm_fail(e, DM_ERR_COORDINATOR_LOST, "%s", what);
}

static int send_all(struct dm_link *l, const void *data, size_t length, int pass_fd,
                    uint64_t deadline, struct dm_error *e) {
    const char *p = data;
    while (length) {
        struct iovec iov = {(void *)(uintptr_t)p, length};
        union {
            struct cmsghdr align;
            char bytes[CMSG_SPACE(sizeof(int))];
        } control;
        struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
        if (pass_fd >= 0) {
            m.msg_control = control.bytes;
            m.msg_controllen = sizeof control.bytes;
            struct cmsghdr *c = CMSG_FIRSTHDR(&m);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(c), &pass_fd, sizeof(int));
        }
        ssize_t n = sendmsg(l->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            int s = wait_ready(l, POLLOUT, deadline, e);
            if (s)
                return s;
            continue;
        }
        if (n < 0)
            return lost(e, "the connection to the coordinator broke while sending");
        pass_fd = -1;
        p += n;
        length -= (size_t)n;
    }
    return DM_OK;
}

static int receive_all(struct dm_link *l, void *data, size_t length, uint64_t deadline,
                       struct dm_error *e) {
    char *p = data;
    while (length) {
        ssize_t n = recv(l->fd, p, length, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            int s = wait_ready(l, POLLIN, deadline, e);
            if (s)
                return s;
            continue;
        }
        if (n < 0)
            return lost(e, "the connection to the coordinator broke");
        if (n == 0) {
            errno = 0;
            return lost(e, "the coordinator closed the connection");
        }
        p += n;
        length -= (size_t)n;
    }
    return DM_OK;
}

/* One exchange on an open connection. A refusal leaves the connection usable. */
static int exchange(struct dm_link *l, uint16_t type, const void *payload, uint32_t length,
                    int pass_fd, void *reply, uint32_t reply_max, uint32_t *reply_length,
                    uint64_t deadline, struct dm_error *e) {
    struct dm_msg_header head = {.magic = DM_WIRE_MAGIC,
                                 .version = DM_WIRE_VERSION,
                                 .type = type,
                                 .length = length,
                                 .request = ++l->next_request};
    char small[512];
    int s;
    if (length <= sizeof small - sizeof head) { /* one send: one wake-up of the coordinator */
        memcpy(small, &head, sizeof head);
        if (length)
            memcpy(small + sizeof head, payload, length);
        s = send_all(l, small, sizeof head + length, pass_fd, deadline, e);
    } else {
        s = send_all(l, &head, sizeof head, pass_fd, deadline, e);
        if (!s)
            s = send_all(l, payload, length, -1, deadline, e);
    }
    if (s || (s = receive_all(l, &head, sizeof head, deadline, e)))
        return s;
    if (head.magic == DM_WIRE_MAGIC && head.version != DM_WIRE_VERSION)
        return dm_fail(e, DM_ERR_PROTOCOL,
                       "the coordinator speaks version %u of its protocol, here it is %u: the "
                       "coordinator and all hosts have to run the same release",
                       head.version, DM_WIRE_VERSION);
    if (head.magic != DM_WIRE_MAGIC || head.type != type || head.request != l->next_request ||
        head.length > DM_WIRE_MAX_PAYLOAD)
        return dm_fail(e, DM_ERR_PROTOCOL, "the coordinator's answer does not fit the request");
    if (head.status != DM_WIRE_OK) {
        char text[sizeof e->text];
        uint32_t keep = head.length < sizeof text - 1 ? head.length : (uint32_t)sizeof text - 1;
        if ((s = receive_all(l, text, keep, deadline, e)))
            return s;
        text[keep] = 0;
        for (uint32_t rest = head.length - keep; rest;) {
            uint32_t n = rest < sizeof small ? rest : (uint32_t)sizeof small;
            if ((s = receive_all(l, small, n, deadline, e)))
                return s;
            rest -= n;
        }
        if (e)
            e->wire_status = (int)head.status;
        if (head.status == DM_WIRE_FENCED)
            return dm_fail(e, DM_ERR_FENCED, "%s", text);
        return dm_fail(e, DM_ERR_COORDINATOR_REFUSED, "%s", text);
    }
    if (head.length > reply_max)
        return dm_fail(e, DM_ERR_PROTOCOL, "the coordinator's answer is too long (%u bytes)",
                       head.length);
    if (reply_length)
        *reply_length = head.length;
    return head.length ? receive_all(l, reply, head.length, deadline, e) : DM_OK;
}

static int remember(struct dm_link *l, int fd) {
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -1;
    l->fd = fd;
    l->dev = (uint64_t)st.st_dev;
    l->ino = (uint64_t)st.st_ino;
    return 0;
}

static int connect_unix(struct dm_link *l, struct dm_host *h, struct dm_error *e) {
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    memcpy(addr.sun_path, h->sb->unix_path, sizeof addr.sun_path);
    addr.sun_path[sizeof addr.sun_path - 1] = 0;
    if (!addr.sun_path[0])
        return dm_fail(e, DM_ERR_COORDINATOR_LOST, "no coordinator serves fabric %s", h->fabric);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return dm_fail_sys(e, "socket", 0);
    if (connect(fd, (struct sockaddr *)&addr, sizeof addr) < 0 || remember(l, fd) < 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        if (e)
            e->sys_errno = saved;
        return dm_fail(e, DM_ERR_COORDINATOR_LOST,
                       "cannot reach the coordinator of fabric %s at %s", h->fabric, addr.sun_path);
    }
    return DM_OK;
}

static int connect_tcp(struct dm_link *l, struct dm_host *h, struct dm_error *e) {
    char host[sizeof h->sb->tcp_host], port[16];
    memcpy(host, h->sb->tcp_host, sizeof host);
    host[sizeof host - 1] = 0;
    snprintf(port, sizeof port, "%u", h->sb->tcp_port);
    if (!host[0] || !h->sb->tcp_port)
        return dm_fail(e, DM_ERR_COORDINATOR_LOST,
                       "the coordinator of fabric %s does not listen on TCP; start it with --tcp",
                       h->fabric);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
    struct addrinfo *found = NULL;
    if (getaddrinfo(host, port, &hints, &found) != 0 || !found)
        return dm_fail(e, DM_ERR_COORDINATOR_LOST, "%s is no numeric address", host);
    int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    int bad = fd < 0 || connect(fd, found->ai_addr, found->ai_addrlen) < 0 || remember(l, fd) < 0;
    int saved = errno;
    freeaddrinfo(found);
    if (bad) {
        if (fd >= 0)
            close(fd);
        if (e)
            e->sys_errno = saved;
        return dm_fail(e, DM_ERR_COORDINATOR_LOST, "cannot reach the coordinator at %s port %s",
                       host, port);
    }
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return DM_OK;
}

void dm_link_close(struct dm_link *l) {
    if (l->fd >= 0 && dm_descriptor_check(l->fd, l->dev, l->ino) == 0)
        close(l->fd);
    l->fd = -1;
}

static int hello(struct dm_link *l, struct dm_host *h, uint64_t deadline, struct dm_error *e) {
    struct dm_msg_hello hello = {.fabric_id = h->fabric_id};
    struct dm_msg_hello_reply answer;
    uint32_t length = 0;
    memcpy(hello.secret, h->sb->secret, sizeof hello.secret);
    int s = exchange(l, DM_MSG_HELLO, &hello, sizeof hello, -1, &answer, sizeof answer, &length,
                     deadline, e);
    if (!s && length != sizeof answer)
        s = dm_fail(e, DM_ERR_PROTOCOL, "the coordinator's HELLO has the wrong size");
    if (!s)
        l->epoch = answer.epoch;
    return s;
}

/* Connect and introduce ourselves; a registered host says which one it is. */
int dm_link_open(struct dm_link *l, struct dm_host *h, bool unix_only, uint64_t deadline,
                 struct dm_error *e) {
    l->fd = -1;
    l->epoch = 0;
    l->sb = h->sb;
    int s = h->use_tcp && !unix_only ? connect_tcp(l, h, e) : connect_unix(l, h, e);
    if (!s)
        s = hello(l, h, deadline, e);
    if (!s && h->id && !unix_only) {
        struct dm_msg_rejoin rejoin = {.incarnation = h->incarnation, .host = h->id};
        struct dm_msg_registered answer;
        s = exchange(l, DM_MSG_REJOIN, &rejoin, sizeof rejoin, -1, &answer, sizeof answer, NULL,
                     deadline, e);
    }
    if (s)
        dm_link_close(l);
    return s;
}

/* Of a name that was to be withdrawn nothing is there, after the request has been sent before: that one was carried out, and
 * its answer lost. Answered as the first would have been. */
static bool withdrawn_before(uint16_t type, bool sent, const struct dm_error *e, void *reply,
                             uint32_t reply_max, uint32_t *reply_length) {
    static const char nothing[] = "{}";
    if (type != DM_MSG_WITHDRAW || !sent || !e || e->wire_status != DM_WIRE_NOT_FOUND ||
        !reply_length || reply_max < sizeof nothing - 1)
        return false;
    memcpy(reply, nothing, *reply_length = sizeof nothing - 1);
    return true;
}

static void pause_ms(unsigned ms) { (void)poll(NULL, 0, (int)ms); }

int dm_link_request(struct dm_link *l, struct dm_host *h, uint16_t type, const void *payload,
                    uint32_t length, void *reply, uint32_t reply_max, uint32_t *reply_length,
                    uint64_t deadline, struct dm_error *e) {
    unsigned back_off = 2;
    bool sent = false;
    for (;;) {
        int s = DM_OK;
        if (l->fd >= 0 && dm_descriptor_check(l->fd, l->dev, l->ino) < 0)
            l->fd = -1;
        if (l->fd < 0) {
            bool again = l->next_request > 0;
            s = dm_link_open(l, h, false, deadline, e);
            l->reopened |= again && !s;
            /* It may have been carried out, and the answer lost: look before asking for the same again. */
            if (!s && sent && type == DM_MSG_GRANT)
                return DM_AGAIN_LOOK;
        }
        if (!s)
            s = exchange(l, type, payload, length, -1, reply, reply_max, reply_length, deadline, e);
        if (s == DM_ERR_COORDINATOR_REFUSED &&
            withdrawn_before(type, sent, e, reply, reply_max, reply_length))
            return DM_OK;
        if (!s || s == DM_ERR_COORDINATOR_REFUSED)
            return s;
        sent = sent || l->fd >= 0;
        dm_link_close(l);
        if (s == DM_ERR_FENCED)
            atomic_store(&h->fenced, true);
        if (s != DM_ERR_COORDINATOR_LOST || dm_now_ns() + back_off * 1000000ull > deadline)
            return s;
        pause_ms(back_off);
        back_off = back_off < 100 ? back_off * 2 : 100;
    }
}

/* The guard connection: the coordinator keeps a duplicate of our userfaultfd, so that protection outlives us. */
int dm_guard_open(struct dm_host *h, struct dm_error *e) {
    struct dm_link l = {.fd = -1};
    uint64_t deadline = dm_now_ns() + h->deadline_ns;
    int s = dm_link_open(&l, h, true, deadline, e);
    if (s)
        return s;
    struct dm_msg_rejoin who = {.incarnation = h->incarnation, .host = h->id};
    s = exchange(&l, DM_MSG_GUARD, &who, sizeof who, h->uffd, NULL, 0, NULL, deadline, e);
    if (s) {
        dm_link_close(&l);
        return s;
    }
    h->guard_fd = l.fd;
    return DM_OK;
}
