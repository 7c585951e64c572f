/* by_hand.c - see by_hand.h. What dm_attach does is repeated here as far as it needs no coordinator. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "by_hand.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "uffd.h"

static struct dm_error err;

/* ---------------------------------------------------------------- device */

void by_hand_device(struct dm_device *dev, uint32_t nr_frames, uint32_t max_hosts,
                    uint32_t max_refs) {
    struct dm_superblock geo;
    int fd = memfd_create("dmrpc-test", MFD_CLOEXEC);
    EXPECT(fd >= 0);
    EXPECT_OK(dm_device_geometry(&geo, (uint64_t)nr_frames * BY_HAND_PAGE, BY_HAND_PAGE, max_hosts,
                                 max_refs, &err),
              &err);
    EXPECT_OK(dm_device_format(fd, "test", &geo, &err), &err);
    EXPECT_OK(dm_device_open(dev, fd, true, &err), &err);
    close(fd);
    /* All who look at page tables go by this private copy: shorter ones are as good as long ones. */
    uint64_t per_block = DM_TABLE_ALIGN / sizeof(uint32_t);
    uint64_t ptes = 2 * nr_frames + BY_HAND_AREA_PAGES;
    dev->geo.ptes_per_host = (ptes + per_block - 1) / per_block * per_block;
    dev->geo.vma_pages = dev->geo.ptes_per_host - 2 * nr_frames;
}

void by_hand_activate(struct dm_device *dev, uint32_t host) {
    struct dm_host_identity who = {.pid = 1, .incarnation = 100 + host, .name = "by hand"};
    EXPECT_OK(dm_device_activate_host(dev, host, &who, &err), &err);
}

const struct dm_audit *by_hand_audit(const struct dm_device *dev) {
    static struct dm_audit audit;
    EXPECT_OK(dm_device_audit(dev, &audit, &err), &err);
    EXPECT_EQ(audit.pool + audit.free + audit.in_use, dev->geo.nr_frames);
    return &audit;
}

const struct dm_audit *by_hand_exact(const struct dm_device *dev) {
    const struct dm_audit *audit = by_hand_audit(dev);
    if (audit->nr_violations)
        FAIL("expected: no violation, but the audit found %llu, the first: %s",
             (unsigned long long)audit->nr_violations, audit->violations[0].text);
    EXPECT_EQ(audit->in_flight, 0);
    return audit;
}

/* ---------------------------------------------------------------- userfaultfd */

/* A descriptor with write protection of shared memory, or -1 and errno. *unpopulated: of what is not there, too. */
static int open_uffd(bool *unpopulated) {
    const uint64_t wants[] = {DM_UFFD_REQUIRED | UFFD_FEATURE_WP_UNPOPULATED, DM_UFFD_REQUIRED};
    for (int i = 0; i < 2; i++) {
        int flags = O_CLOEXEC | O_NONBLOCK, fd = (int)syscall(SYS_userfaultfd, flags);
        if (fd < 0)
            fd = (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
        if (fd < 0)
            return -1;
        struct uffdio_api api = {.api = UFFD_API, .features = wants[i]};
        if (ioctl(fd, UFFDIO_API, &api) == 0) {
            *unpopulated = i == 0;
            return fd;
        }
        int saved = errno;
        close(fd);
        errno = saved;
    }
    return -1;
}

bool by_hand_has_uffd(const char **why) {
    bool unpopulated;
    int fd = open_uffd(&unpopulated);
    if (fd >= 0) {
        close(fd);
        return true;
    }
    *why = errno == EPERM    ? "this user may not use userfaultfd (root, or "
                               "vm.unprivileged_userfaultfd=1)"
           : errno == ENOSYS ? "this kernel has no userfaultfd"
                             : "this kernel's userfaultfd cannot write-protect shared memory";
    return false;
}

/* ---------------------------------------------------------------- hosts */

static void identify(int fd, uint64_t *dev, uint64_t *ino) {
    struct stat st;
    EXPECT(fstat(fd, &st) == 0);
    *dev = (uint64_t)st.st_dev;
    *ino = (uint64_t)st.st_ino;
}

static void map_windows(struct dm_host *h, bool has_uffd) {
    size_t window = (size_t)h->nr_frames << h->page_shift;
    h->base = mmap(NULL, (size_t)h->nr_ptes << h->page_shift, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    EXPECT(h->base != MAP_FAILED);
    for (int i = 0; i < 2; i++)
        EXPECT(mmap(h->base + i * window, window, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                    h->device_fd, (off_t)h->data_off) != MAP_FAILED);
    if (!has_uffd)
        return;
    struct uffdio_register reg = {.range = {(uintptr_t)h->base, 2 * window},
                                  .mode = UFFDIO_REGISTER_MODE_WP};
    struct uffdio_writeprotect wp = {.range = {(uintptr_t)h->base + window, window},
                                     .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    EXPECT(ioctl(h->uffd, UFFDIO_REGISTER, &reg) == 0);
    EXPECT(ioctl(h->uffd, UFFDIO_WRITEPROTECT, &wp) == 0);
}

static void *table(size_t entries, size_t entry_bytes) {
    void *p = calloc(entries, entry_bytes);
    EXPECT(p);
    return p;
}

static void make_tables(struct dm_host *h) {
    h->nr_vma_slots = h->nr_ptes;
    h->max_extents = (h->nr_ptes - 2 * h->nr_frames) / 2 + 2;
    h->kstate = table(h->nr_ptes, sizeof *h->kstate);
    h->shown = table(h->nr_ptes, sizeof *h->shown);
    h->vma_of = table(h->nr_ptes, sizeof *h->vma_of);
    h->vmas = table(h->nr_vma_slots, sizeof *h->vmas);
    h->extents = table(h->max_extents, sizeof *h->extents);
    EXPECT_EQ(dm_freelist_init(&h->free, h->nr_frames), 0);
    memset(h->kstate + h->nr_frames, DM_KS_PROTECTED, h->nr_frames);
    h->extents[0] = (struct dm_extent){2 * h->nr_frames, h->nr_ptes - 2 * h->nr_frames};
    h->nr_extents = 1;
    h->vm_piece_limit = 32765;
    h->vm_pieces = 3;
}

struct dm_host *by_hand_host(struct dm_device *dev, uint16_t id) {
    struct dm_host *h = table(1, sizeof *h);
    bool unpopulated = false;
    h->device = *dev;
    h->sb = dev->sb;
    h->entry = &dev->hosts[id - 1];
    h->refs = dev->refs;
    h->frames = dev->frames;
    h->pt = dm_device_ptes(dev, id);
    h->physmap = (char *)dev->data;
    h->page_shift = (uint32_t)__builtin_ctz(dev->geo.page_size);
    h->nr_frames = (uint32_t)dev->geo.nr_frames;
    h->nr_ptes = (uint32_t)dev->geo.ptes_per_host;
    h->max_refs = dev->geo.max_refs;
    h->id = id;
    h->fabric_id = dev->geo.fabric_id;
    h->data_off = dev->geo.data_off;
    h->batch = h->batch_min = h->batch_max = 1;
    h->high = h->nr_frames;
    h->guard_fd = h->link.fd = -1;
    h->copy_around = 64;
    h->device_fd = dev->fd;
    identify(h->device_fd, &h->device_dev, &h->device_ino);
    h->uffd = open_uffd(&unpopulated);
    bool has_uffd = h->uffd >= 0;
    if (!has_uffd)
        h->uffd = dup(dev->fd); /* passes for a descriptor that nobody closed; ioctls fail */
    identify(h->uffd, &h->uffd_dev, &h->uffd_ino);
    h->reads_allocate = !unpopulated;
    h->ref_cursor = (uint32_t)(id - 1) * h->max_refs / dev->geo.max_hosts;
    for (unsigned i = 0; i < DM_REF_RING; i++)
        h->ref_ring[i] = h->ref_cursor;
    h->nonce_key[0] = 0x1234567890abcdefull * id;
    h->nonce_key[1] = ~h->nonce_key[0];
    snprintf(h->name, sizeof h->name, "host %u", id);
    snprintf(h->fabric, sizeof h->fabric, "test");
    pthread_mutex_init(&h->lock, NULL);
    pthread_mutex_init(&h->link_lock, NULL);
    make_tables(h);
    map_windows(h, has_uffd);
    return h;
}

void by_hand_host_free(struct dm_host *h) {
    munmap(h->base, (size_t)h->nr_ptes << h->page_shift);
    close(h->uffd);
    free(h->kstate);
    free(h->shown);
    free(h->vma_of);
    free(h->vmas);
    free(h->extents);
    dm_freelist_destroy(&h->free);
    pthread_mutex_destroy(&h->lock);
    pthread_mutex_destroy(&h->link_lock);
    free(h);
}

void by_hand_grant(struct dm_host *h, uint32_t pfn, uint32_t nr) {
    uint64_t moved;
    EXPECT_OK(dm_device_transfer(&h->device, pfn, nr, DM_OWNER_POOL, h->id, &moved, &err), &err);
    EXPECT_EQ(moved, nr);
    dm_freelist_put_cold(&h->free, pfn, nr);
    h->entry->nr_free = h->free.nr_free;
}
