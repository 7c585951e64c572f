/*
 * attach.c - joining a fabric and leaving it; fork.
 *
 * Fork. A child inherits neither the windows nor the device (MADV_DONTFORK), so it cannot write to frames its
 * parent's handler protects; what it does inherit is this struct, which refuses it (fork_generation). The host
 * locks are taken around fork, so that no kernel mapping is half made at that moment.
 *
 * Context: no lock held, GIL released.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "device.h"
#include "dm.h"
#include "uffd.h"

/* ---------------------------------------------------------------- fork */

static pthread_mutex_t hosts_lock = PTHREAD_MUTEX_INITIALIZER;
static struct dm_host *all_hosts;
static _Atomic unsigned fork_generation;

static void before_fork(void) {
    pthread_mutex_lock(&hosts_lock);
    for (struct dm_host *h = all_hosts; h; h = h->next_host)
        pthread_mutex_lock(&h->lock);
}

static void after_fork_in_parent(void) {
    for (struct dm_host *h = all_hosts; h; h = h->next_host)
        pthread_mutex_unlock(&h->lock);
    pthread_mutex_unlock(&hosts_lock);
}

static void after_fork_in_child(void) {
    atomic_fetch_add(&fork_generation, 1);
    after_fork_in_parent();
}

static void hook_fork(void) {
    (void)pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

bool dm_forked(const struct dm_host *h) {
    return h->fork_generation != atomic_load_explicit(&fork_generation, memory_order_relaxed);
}

static void link_host(struct dm_host *h) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, hook_fork);
    pthread_mutex_lock(&hosts_lock);
    h->fork_generation = atomic_load(&fork_generation);
    h->next_host = all_hosts;
    all_hosts = h;
    pthread_mutex_unlock(&hosts_lock);
}

static void unlink_host(struct dm_host *h) {
    pthread_mutex_lock(&hosts_lock);
    for (struct dm_host **p = &all_hosts; *p; p = &(*p)->next_host)
        if (*p == h) {
            *p = h->next_host;
            break;
        }
    pthread_mutex_unlock(&hosts_lock);
}

/* ---------------------------------------------------------------- userfaultfd */

static int uffd_denied(struct dm_error *e, int why) {
    if (e)
        e->sys_errno = why;
    return dm_fail(
        e, DM_ERR_UFFD_DENIED,
        "this user may not use userfaultfd. Run as root, or allow it: sysctl "
        "vm.unprivileged_userfaultfd=1, or give access to /dev/userfaultfd, or CAP_SYS_PTRACE");
}

static int open_uffd(const struct dm_attach *how, struct dm_error *e) {
    int flags = O_CLOEXEC | O_NONBLOCK | (how->user_mode_only ? UFFD_USER_MODE_ONLY : 0);
    int fd = (int)syscall(SYS_userfaultfd, flags);
    if (fd >= 0 || errno == ENOSYS)
        return fd;
    int why = errno, dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (dev >= 0) {
        fd = ioctl(dev, USERFAULTFD_IOC_NEW, flags);
        why = fd < 0 ? errno : 0;
        close(dev);
    }
    if (fd < 0)
        (void)uffd_denied(e, why);
    errno = why;
    return fd;
}

static int start_uffd(struct dm_host *h, const struct dm_attach *how, struct dm_error *e) {
    int fd = open_uffd(how, e);
    if (fd < 0)
        return errno == ENOSYS ? dm_fail(e, DM_ERR_UFFD_FEATURE, "this kernel has no userfaultfd")
                               : uffd_denied(e, errno);
    /* Features can only be asked for once per descriptor: this one tells what there is. */
    struct uffdio_api api = {.api = UFFD_API};
    int bad = ioctl(fd, UFFDIO_API, &api);
    uint64_t have = api.features;
    close(fd);
    if (bad || (have & DM_UFFD_REQUIRED) != DM_UFFD_REQUIRED)
        return dm_fail(
            e, DM_ERR_UFFD_FEATURE,
            "this kernel's userfaultfd cannot write-protect shared memory; Linux 5.19 or later "
            "can");
    uint64_t want = DM_UFFD_REQUIRED | (have & UFFD_FEATURE_THREAD_ID);
    h->reads_allocate = how->reads_allocate || !(have & UFFD_FEATURE_WP_UNPOPULATED);
    if (!h->reads_allocate)
        want |= UFFD_FEATURE_WP_UNPOPULATED;
    struct stat st;
    h->uffd = open_uffd(how, e);
    api = (struct uffdio_api){.api = UFFD_API, .features = want};
    if (h->uffd < 0 || ioctl(h->uffd, UFFDIO_API, &api) < 0 || fstat(h->uffd, &st) < 0)
        return dm_fail_sys(e, "UFFDIO_API", 0);
    if ((api.features & DM_UFFD_REQUIRED) != DM_UFFD_REQUIRED)
        return dm_fail(e, DM_ERR_UFFD_FEATURE, "the kernel did not grant write protection");
    h->uffd_ino = (uint64_t)st.st_ino;
    h->uffd_dev = (uint64_t)st.st_dev;
    return DM_OK;
}

/* ---------------------------------------------------------------- the views */

static void *reserve_bytes(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

/* A page of its own kind: registered for missing pages, see dm_handler_stop. */
static int map_bell(struct dm_host *h, struct dm_error *e) {
    h->bell = reserve_bytes(DM_BELL_BYTES);
    if (!h->bell)
        return dm_fail_sys(e, "mmap", 0);
    struct uffdio_register reg = {.range = {(uintptr_t)h->bell, DM_BELL_BYTES},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (madvise(h->bell, DM_BELL_BYTES, MADV_DONTFORK) < 0 ||
        ioctl(h->uffd, UFFDIO_REGISTER, &reg) < 0)
        return dm_fail_sys(e, "UFFDIO_REGISTER", reg.range.start);
    return DM_OK;
}

/*
 * Populate the page-table entries of both windows while they are not registered yet: a read then maps the 64 KiB around
 * it, and the entries are writable; afterwards every page would cost a minor fault of its own at its first use.
 * Only where the device has all its frames (touching a hole would allocate it), and for a limited time: attaching
 * must stay cheap on devices made of small pages, where this takes ten times as long. What is left faults later.
 */
static void populate_windows(struct dm_host *h) {
    struct stat st;
    if (fstat(h->device_fd, &st) < 0 ||
        (uint64_t)st.st_blocks * 512 < ((uint64_t)h->nr_frames << h->page_shift))
        return;
    const uint64_t around = 65536;
    uint64_t bytes = 2ull * h->nr_frames << h->page_shift;
    uint64_t until = dm_now_ns() + (bytes >> 30) * 12000000ull + 6000000ull;
    for (uint64_t at = 0; at < bytes; at += around) {
        (void)*(volatile char *)(h->base + at);
        if (at % (around * 32) == 0 && dm_now_ns() > until)
            break;
    }
}

static int map_views(struct dm_host *h, struct dm_error *e) {
    size_t window = (size_t)h->nr_frames << h->page_shift,
           all = (size_t)h->nr_ptes << h->page_shift;
    /* 64 KiB off the boundary of huge pages: the windows are protected page by page, and an entry that maps 2 MiB
     * would first be taken down and then fault page by page. */
    const size_t huge = 2u << 20, skew = 65536;
    char *reserved =
        mmap(NULL, all + 2 * huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return dm_fail_sys(e, "mmap", 0);
    char *base = (char *)(((uintptr_t)reserved + huge - 1) / huge * huge + skew);
    munmap(reserved, (size_t)(base - reserved));
    munmap(base + all, (size_t)(reserved + 2 * huge - base));
    h->base = base;
    for (int i = 0; i < 2; i++)
        if (mmap(base + i * window, window, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                 h->device_fd, (off_t)h->data_off) == MAP_FAILED)
            return dm_fail_sys(e, "mmap", (uint64_t)(uintptr_t)base);
    if (madvise(base, all, MADV_DONTFORK) < 0)
        return dm_fail_sys(e, "madvise(MADV_DONTFORK)", (uint64_t)(uintptr_t)base);
    populate_windows(h);
    struct uffdio_register reg = {.range = {(uintptr_t)base, 2 * window},
                                  .mode = UFFDIO_REGISTER_MODE_WP};
    if (ioctl(h->uffd, UFFDIO_REGISTER, &reg) < 0)
        return dm_fail_sys(e, "UFFDIO_REGISTER", reg.range.start);
    struct uffdio_writeprotect wp = {.range = {(uintptr_t)base + window, window},
                                     .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    if (ioctl(h->uffd, UFFDIO_WRITEPROTECT, &wp) < 0)
        return dm_fail_sys(e, "UFFDIO_WRITEPROTECT", wp.range.start);
    return map_bell(h, e);
}

static uint32_t half_of_max_map_count(void) {
    char text[32] = "";
    int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    long limit = n > 0 ? strtol(text, NULL, 10) : 0;
    return (uint32_t)(limit > 1024 ? limit / 2 : 32765);
}

static int make_tables(struct dm_host *h, struct dm_error *e) {
    h->nr_vma_slots = h->nr_frames + 65536 < h->nr_ptes ? h->nr_frames + 65536 : h->nr_ptes;
    h->max_extents = (h->nr_ptes - 2 * h->nr_frames) / 2 + 2;
    h->kstate = reserve_bytes(h->nr_ptes);
    h->shown = reserve_bytes((size_t)h->nr_ptes * sizeof *h->shown);
    h->vma_of = reserve_bytes((size_t)h->nr_ptes * sizeof *h->vma_of);
    h->vmas = reserve_bytes((size_t)h->nr_vma_slots * sizeof *h->vmas);
    h->extents = reserve_bytes((size_t)h->max_extents * sizeof *h->extents);
    if (!h->kstate || !h->shown || !h->vma_of || !h->vmas || !h->extents ||
        dm_freelist_init(&h->free, h->nr_frames))
        return dm_fail(e, DM_ERR_NO_MEMORY, "no memory for this host's tables");
    memset(h->kstate + h->nr_frames, DM_KS_PROTECTED, h->nr_frames);
    h->extents[0] = (struct dm_extent){2 * h->nr_frames, h->nr_ptes - 2 * h->nr_frames};
    h->nr_extents = 1;
    h->vm_piece_limit = half_of_max_map_count();
    h->vm_pieces = 3;
    if (getrandom(h->nonce_key, sizeof h->nonce_key, 0) != (ssize_t)sizeof h->nonce_key)
        return dm_fail_sys(e, "getrandom", 0);
    return DM_OK;
}

/* ---------------------------------------------------------------- the coordinator */

static uint64_t process_start_time(void) {
    char text[1024];
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return 0;
    text[n] = 0;
    char *p = strrchr(text, ')');
    for (int field = 2; p && field < 22; field++)
        p = strchr(p + 1, ' ');
    return p ? strtoull(p + 1, NULL, 10) : 0;
}

static int register_host(struct dm_host *h, const struct dm_attach *how, struct dm_error *e) {
    struct dm_msg_register ask = {.start_time = process_start_time(),
                                  .pid = (uint32_t)getpid(),
                                  .low = how->low,
                                  .high = how->high,
                                  .batch = how->batch};
    struct dm_msg_registered got;
    uint32_t length = 0;
    if (getrandom(&ask.token, sizeof ask.token, 0) != (ssize_t)sizeof ask.token)
        return dm_fail_sys(e, "getrandom", 0);
    memcpy(ask.name, h->name, sizeof ask.name);
    int s = dm_link_request(&h->link, h, DM_MSG_REGISTER, &ask, sizeof ask, &got, sizeof got,
                            &length, dm_now_ns() + h->deadline_ns, e);
    if (s)
        return s;
    if (length != sizeof got || got.host == 0 || got.host > h->sb->max_hosts)
        return dm_fail(e, DM_ERR_PROTOCOL, "the coordinator registered host %u, which cannot be",
                       length == sizeof got ? got.host : 0);
    h->id = (uint16_t)got.host;
    h->incarnation = got.incarnation;
    h->low = got.low;
    h->high = got.high;
    h->batch = h->batch_min = got.batch ? got.batch : 1;
    h->batch_max = got.batch_max > h->batch ? got.batch_max : h->batch;
    return DM_OK;
}

/* The coordinator may have died since it answered REGISTER: its successor knows us, and is waited for. */
static int be_guarded(struct dm_host *h, struct dm_error *e) {
    uint64_t give_up = dm_now_ns() + h->deadline_ns;
    unsigned pause_ms = 2;
    int s;
    while ((s = dm_guard_open(h, e)) == DM_ERR_COORDINATOR_LOST &&
           dm_now_ns() + pause_ms * 1000000ull < give_up) {
        (void)poll(NULL, 0, (int)pause_ms);
        pause_ms = pause_ms < 100 ? pause_ms * 2 : 100;
    }
    return s;
}

/* ---------------------------------------------------------------- attach and detach */

static void release(struct dm_host *h) {
    size_t all = (size_t)h->nr_ptes << h->page_shift;
    if (h->base)
        munmap(h->base, all);
    if (h->kstate)
        munmap(h->kstate, h->nr_ptes);
    if (h->shown)
        munmap(h->shown, (size_t)h->nr_ptes * sizeof *h->shown);
    if (h->vma_of)
        munmap(h->vma_of, (size_t)h->nr_ptes * sizeof *h->vma_of);
    if (h->vmas)
        munmap(h->vmas, (size_t)h->nr_vma_slots * sizeof *h->vmas);
    if (h->extents)
        munmap(h->extents, (size_t)h->max_extents * sizeof *h->extents);
    dm_freelist_destroy(&h->free);
    dm_link_close(&h->link);
    if (h->bell)
        munmap(h->bell, DM_BELL_BYTES);
    if (h->uffd >= 0 && dm_descriptor_check(h->uffd, h->uffd_dev, h->uffd_ino) == 0)
        close(h->uffd);
    if (h->device.base)
        dm_device_close(&h->device);
    pthread_mutex_destroy(&h->lock);
    pthread_mutex_destroy(&h->link_lock);
    pthread_cond_destroy(&h->work);
    free(h);
}

static void close_guard(struct dm_host *h) {
    /* The handler has its own copy; this one would keep the connection open after the handler drops it. */
    if (h->guard_fd >= 0)
        close(h->guard_fd);
}

static int set_up(struct dm_host *h, const struct dm_attach *how, struct dm_error *e) {
    int s = dm_device_open(&h->device, how->device_fd, true, e);
    if (s)
        return s;
    struct stat st;
    if (madvise(h->device.base, (size_t)h->device.geo.device_bytes, MADV_DONTFORK) < 0 ||
        fstat(h->device.fd, &st) < 0)
        return dm_fail_sys(e, "madvise(MADV_DONTFORK)", 0);
    h->device_fd = h->device.fd;
    h->device_dev = (uint64_t)st.st_dev;
    h->device_ino = (uint64_t)st.st_ino;
    h->sb = h->device.sb;
    h->refs = h->device.refs;
    h->frames = h->device.frames;
    h->physmap = (char *)h->device.data;
    h->page_shift = (uint32_t)__builtin_ctz(h->device.geo.page_size);
    h->nr_frames = (uint32_t)h->device.geo.nr_frames;
    h->nr_ptes = (uint32_t)h->device.geo.ptes_per_host;
    h->max_refs = h->device.geo.max_refs;
    h->data_off = h->device.geo.data_off;
    h->fabric_id = h->device.geo.fabric_id;
    if ((s = start_uffd(h, how, e)) || (s = register_host(h, how, e)))
        return s;
    DM_CRASH_POINT(attach_registered);
    h->entry = &h->device.hosts[h->id - 1];
    h->pt = dm_device_ptes(&h->device, h->id);
    h->ref_cursor = (uint32_t)((uint64_t)(h->id - 1) * h->max_refs / h->device.geo.max_hosts);
    for (unsigned i = 0; i < DM_REF_RING; i++)
        h->ref_ring[i] = h->ref_cursor;
    if ((s = make_tables(h, e)) || (s = map_views(h, e)) || (s = be_guarded(h, e)))
        return s;
    DM_CRASH_POINT(attach_guarded);
    s = dm_handler_start(h, e);
    close_guard(h);
    return s;
}

int dm_attach(const struct dm_attach *how, struct dm_host **out, struct dm_error *e) {
    dm_crash_read_environment();
    struct dm_host *h = calloc(1, sizeof *h);
    if (!h)
        return dm_fail(e, DM_ERR_NO_MEMORY, "no memory for a host");
    h->uffd = h->guard_fd = h->link.fd = -1;
    h->copy_around = how->copy_around ? how->copy_around : 1;
    h->use_tcp = how->use_tcp;
    h->ask_ahead = how->low > 0;
    h->strict = how->strict;
    h->deadline_ns = how->deadline_ns;
    snprintf(h->name, sizeof h->name, "%s", how->name);
    snprintf(h->fabric, sizeof h->fabric, "%s", how->fabric);
    pthread_mutex_init(&h->lock, NULL);
    pthread_mutex_init(&h->link_lock, NULL);
    pthread_cond_init(&h->work, NULL);
    dm_latency_init(&h->latency);
    int s = set_up(h, how, e);
    if (s) {
        if (h->id) /* the coordinator reclaims what is left of the registration */
            (void)dm_link_request(&h->link, h, DM_MSG_LEAVE, NULL, 0, NULL, 0, NULL,
                                  dm_now_ns() + h->deadline_ns, NULL);
        release(h);
        return s;
    }
    link_host(h);
    *out = h;
    return DM_OK;
}

static void drop_held_refs(struct dm_host *h) {
    for (uint32_t i = 0; i < h->max_refs; i++) {
        uint64_t word = __atomic_load_n(&h->refs[i].state, __ATOMIC_ACQUIRE);
        if (dm_ref_state(word) != DM_REF_LIVE || dm_ref_holder(word) != h->id)
            continue;
        uint64_t mine = dm_ref_pack(DM_REF_DROPPING, 0, h->id, dm_ref_gen(word));
        /* Somebody may accept it at this very moment: then it is theirs. */
        if (__atomic_compare_exchange_n(&h->refs[i].state, &word, mine, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
            DM_CRASH_POINT(detach_dropping);
            dm_ref_release(h, i);
        }
    }
}

/* Leave in order. No mapping may be viewed any more. Whatever cannot be undone here, the coordinator reclaims as after
 * a crash: the path is the same. */
int dm_detach(struct dm_host *h, struct dm_error *e) {
    dm_lock(h);
    for (uint32_t id = 1; id <= h->nr_vmas; id++)
        if (h->vmas[id].flags & DM_VMA_USED)
            (void)dm_rfree(h, id, e);
    DM_CRASH_POINT(detach_unmapped);
    drop_held_refs(h);
    (void)dm_give_back(h, &h->link, 0, e);
    DM_CRASH_POINT(detach_returned);
    h->closed = true;
    dm_unlock(h);
    dm_handler_stop(h);
    unlink_host(h);
    /* Nothing is mapped when the last descriptor goes. */
    munmap(h->base, (size_t)h->nr_ptes << h->page_shift);
    h->base = NULL;
    pthread_mutex_lock(&h->link_lock);
    int s = dm_link_request(&h->link, h, DM_MSG_LEAVE, NULL, 0, NULL, 0, NULL,
                            dm_now_ns() + h->deadline_ns, e);
    pthread_mutex_unlock(&h->link_lock);
    if (s == DM_ERR_FENCED)
        s = DM_OK; /* the answer to a LEAVE was lost, and it was carried out */
    DM_CRASH_POINT(detach_left);
    release(h);
    return s;
}

/* One request on the API threads' connection. Context: no lock, GIL released. */
int dm_request(struct dm_host *h, uint16_t type, const void *payload, uint32_t length, void *reply,
               uint32_t reply_max, uint32_t *reply_length, uint64_t wait_ns, struct dm_error *e) {
    pthread_mutex_lock(&h->link_lock);
    int s = dm_link_request(&h->link, h, type, payload, length, reply, reply_max, reply_length,
                            dm_now_ns() + wait_ns, e);
    pthread_mutex_unlock(&h->link_lock);
    return s;
}
