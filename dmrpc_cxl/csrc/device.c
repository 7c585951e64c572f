/*
 * device.c - see device.h. Making, checking and mapping the file. What is in its tables: device_tables.c, audit.c.
 *
 * Context, unless a function says otherwise: any thread, no locks, no GIL needed; may block in the kernel for as long as
 * its system calls take, never for another process.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "device_private.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* fallocate(2) on shmem undoes the whole call when a signal arrives: small calls, repeated. */
#define FALLOCATE_STEP (16ull << 20)

/* ---------------------------------------------------------------- errors */

/* Fill in *err with a text alone and return status. */
int dm_device_fail(struct dm_error *err, int status, const char *format, ...) {
    va_list args;
    dm_error_init(err);
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return status;
}

/* The same for a system call that just set errno; text says what it was meant for. */
int dm_device_fail_sys(struct dm_error *err, const char *syscall, const char *text) {
    int number = errno;
    bool full = number == ENOSPC || number == EDQUOT;
    dm_device_fail(err, DM_OK, "%s%s", text,
                   full ? ": the file system that holds the device is full; make room, enlarge it "
                          "(mount -o remount,size=... /dev/shm) or make the device smaller"
                        : "");
    err->sys_errno = number;
    err->syscall = syscall;
    return full ? DM_ERR_DEVICE_FULL : DM_ERR_SYSTEM;
}

/* ---------------------------------------------------------------- geometry */

static uint64_t align_up(uint64_t value, uint64_t alignment) {
    return (value + alignment - 1) / alignment * alignment;
}

/*
 * Compute where everything is in a device of data_bytes (whole frames) and fill in the geometry fields of *out; the
 * others become zero.
 *
 * A host's page table covers the owned window, the shared window and the VMA area. The VMA area is rounded up so that
 * each page table is a whole number of 4 KiB blocks: a host slot can then be allocated and emptied alone.
 *
 * Returns DM_OK or DM_ERR_BAD_SIZE.
 */
int dm_device_geometry(struct dm_superblock *out, uint64_t data_bytes, uint32_t page_size,
                       uint32_t max_hosts, uint32_t max_refs, struct dm_error *err) {
    const uint64_t ptes_per_block = DM_TABLE_ALIGN / sizeof(uint32_t);

    memset(out, 0, sizeof *out);
    if (page_size != 4096 && page_size != 16384 && page_size != 65536)
        return dm_device_fail(err, DM_ERR_BAD_SIZE, "page size %u: use 4096, 16384 or 65536",
                              page_size);
    if (data_bytes == 0 || data_bytes % page_size != 0)
        return dm_device_fail(err, DM_ERR_BAD_SIZE,
                              "data size %llu is not a multiple of the page size %u",
                              (unsigned long long)data_bytes, page_size);
    uint64_t nr_frames = data_bytes / page_size;
    if (nr_frames > DM_MAX_FRAMES)
        return dm_device_fail(err, DM_ERR_BAD_SIZE, "%llu frames: at most %u fit; use larger pages",
                              (unsigned long long)nr_frames, DM_MAX_FRAMES);
    if (max_hosts < 1 || max_hosts > DM_MAX_HOSTS)
        return dm_device_fail(err, DM_ERR_BAD_SIZE, "max_hosts %u: use 1 to %u", max_hosts,
                              DM_MAX_HOSTS);
    if (max_refs < 1 || max_refs > DM_MAX_REFS)
        return dm_device_fail(err, DM_ERR_BAD_SIZE, "max_refs %u: use 1 to %u", max_refs,
                              DM_MAX_REFS);

    uint64_t vma_pages = 2 * nr_frames > DM_MIN_VMA_PAGES ? 2 * nr_frames : DM_MIN_VMA_PAGES;
    out->magic = DM_MAGIC;
    out->version = DM_LAYOUT_VERSION;
    out->page_size = page_size;
    out->nr_frames = nr_frames;
    out->max_hosts = max_hosts;
    out->max_refs = max_refs;
    out->ptes_per_host = align_up(2 * nr_frames + vma_pages, ptes_per_block);
    out->vma_pages = out->ptes_per_host - 2 * nr_frames;
    out->host_table_off = DM_SUPERBLOCK_BYTES;
    out->ref_table_off =
        align_up(out->host_table_off + max_hosts * sizeof(struct dm_host_entry), DM_TABLE_ALIGN);
    out->service_table_off =
        align_up(out->ref_table_off + max_refs * sizeof(struct dm_ref_entry), DM_TABLE_ALIGN);
    out->nr_services = (uint64_t)max_hosts * DM_SERVICES_PER_HOST;
    if (out->nr_services < DM_MIN_SERVICES)
        out->nr_services = DM_MIN_SERVICES;
    out->frame_table_off = align_up(
        out->service_table_off + out->nr_services * sizeof(struct dm_service_slot), DM_TABLE_ALIGN);
    out->page_table_off =
        align_up(out->frame_table_off + nr_frames * sizeof(uint64_t), DM_TABLE_ALIGN);
    out->data_off = align_up(
        out->page_table_off + max_hosts * out->ptes_per_host * sizeof(uint32_t), DM_DATA_ALIGN);
    out->device_bytes = out->data_off + data_bytes;
    return DM_OK;
}

/* FNV-1a, 64 bits, of the superblock's bytes before its checksum field. */
uint64_t dm_device_checksum(const struct dm_superblock *sb) {
    const uint8_t *bytes = (const uint8_t *)sb;
    uint64_t hash = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < offsetof(struct dm_superblock, checksum); i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3ull;
    return hash;
}

/* ---------------------------------------------------------------- making */

/* Allocate [off, off + bytes) of the file; what is there stays. */
int dm_device_allocate(int fd, uint64_t off, uint64_t bytes, const char *what,
                       struct dm_error *err) {
    while (bytes) {
        uint64_t step = bytes < FALLOCATE_STEP ? bytes : FALLOCATE_STEP;
        if (fallocate(fd, 0, (off_t)off, (off_t)step) < 0) {
            if (errno == EINTR)
                continue;
            return dm_device_fail_sys(err, "fallocate", what);
        }
        off += step;
        bytes -= step;
    }
    return DM_OK;
}

/* Turn [off, off + bytes) into a hole: it reads as zeros and occupies nothing. */
int dm_device_punch(int fd, uint64_t off, uint64_t bytes, struct dm_error *err) {
    while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)bytes) < 0)
        if (errno != EINTR)
            return dm_device_fail_sys(err, "fallocate", "empty a part of the device");
    return DM_OK;
}

static int write_at(int fd, const void *from, size_t bytes, uint64_t off, struct dm_error *err) {
    while (bytes) {
        ssize_t n = pwrite(fd, from, bytes, (off_t)off);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return dm_device_fail_sys(err, "pwrite", "write the superblock");
        }
        from = (const char *)from + n;
        bytes -= (size_t)n;
        off += (size_t)n;
    }
    return DM_OK;
}

static int random_bytes(void *to, size_t bytes, struct dm_error *err) {
    ssize_t n;
    do
        n = getrandom(to, bytes, 0); /* up to 256 bytes come whole */
    while (n < 0 && errno == EINTR);
    return n < 0 ? dm_device_fail_sys(err, "getrandom", "make the fabric's id and secret") : DM_OK;
}

/* The file's size becomes geo->device_bytes; a file that had another one is somebody else's. */
static int set_size(int fd, const struct dm_superblock *geo, struct dm_error *err) {
    struct stat st;
    if (fstat(fd, &st) < 0)
        return dm_device_fail_sys(err, "fstat", "look at the file");
    if (!S_ISREG(st.st_mode))
        return dm_device_fail(err, DM_ERR_NOT_A_DEVICE, "not a regular file");
    if ((uint64_t)st.st_size == geo->device_bytes)
        return DM_OK;
    if (st.st_size != 0)
        return dm_device_fail(err, DM_ERR_BAD_SIZE,
                              "the file has %lld bytes; make it empty or of %llu bytes",
                              (long long)st.st_size, (unsigned long long)geo->device_bytes);
    int result;
    do
        result = ftruncate(fd, (off_t)geo->device_bytes);
    while (result < 0 && errno == EINTR);
    return result < 0 ? dm_device_fail_sys(err, "ftruncate", "set the size of the device") : DM_OK;
}

/*
 * Make a device of the file fd, which is empty or has geo->device_bytes bytes: allocate all tables but the page tables,
 * and write the superblock, its magic last. Zero is the first state of everything else: all frames in the pool, no hosts, no
 * Refs. What the file held in its tables is erased; its data area is left as it is (frames are zeroed when handed out).
 *
 * geo comes from dm_device_geometry. Returns DM_OK, DM_ERR_BAD_SIZE, DM_ERR_NOT_A_DEVICE, DM_ERR_DEVICE_FULL or
 * DM_ERR_SYSTEM; after a failure the file is no device.
 * Context: nobody else uses the file.
 */
int dm_device_format(int fd, const char *name, const struct dm_superblock *geo,
                     struct dm_error *err) {
    struct dm_superblock sb = *geo;
    struct timespec now;
    size_t name_bytes = strlen(name);

    if (name_bytes == 0 || name_bytes >= sizeof sb.name)
        return dm_device_fail(err, DM_ERR_BAD_SIZE, "a fabric's name has 1 to %zu bytes, not %zu",
                              sizeof sb.name - 1, name_bytes);
    memcpy(sb.name, name, name_bytes);
    clock_gettime(CLOCK_REALTIME, &now);
    sb.created_ns = (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;

    int status = set_size(fd, geo, err);
    if (status == DM_OK)
        status = dm_device_punch(fd, 0, geo->data_off, err);
    if (status == DM_OK)
        status =
            dm_device_allocate(fd, 0, geo->page_table_off, "allocate the device's tables", err);
    while (status == DM_OK && sb.fabric_id == 0)
        status = random_bytes(&sb.fabric_id, sizeof sb.fabric_id, err);
    if (status == DM_OK)
        status = random_bytes(sb.secret, sizeof sb.secret, err);
    if (status != DM_OK)
        return status;

    sb.checksum = dm_device_checksum(&sb);
    const size_t magic_bytes = sizeof sb.magic;
    status =
        write_at(fd, (const char *)&sb + magic_bytes, sizeof sb - magic_bytes, magic_bytes, err);
    if (status == DM_OK)
        status = write_at(fd, &sb.magic, magic_bytes, 0, err);
    return status;
}

/* ---------------------------------------------------------------- opening */

/* Read what there is of the superblock; the rest of *sb is zero. */
static int read_superblock(int fd, struct dm_superblock *sb, uint64_t *file_bytes,
                           struct dm_error *err) {
    struct stat st;
    size_t done = 0;

    memset(sb, 0, sizeof *sb);
    if (fstat(fd, &st) < 0)
        return dm_device_fail_sys(err, "fstat", "look at the device");
    if (!S_ISREG(st.st_mode))
        return dm_device_fail(err, DM_ERR_NOT_A_DEVICE, "not a regular file");
    *file_bytes = (uint64_t)st.st_size;
    while (done < sizeof *sb) {
        ssize_t n = pread(fd, (char *)sb + done, sizeof *sb - done, (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return dm_device_fail_sys(err, "pread", "read the superblock");
        if (n == 0)
            break;
        done += (size_t)n;
    }
    return DM_OK;
}

/* Every geometry field must be what this library computes from the four that a user chooses. */
static int check_geometry(const struct dm_superblock *sb, struct dm_error *err) {
    struct dm_superblock want;
    struct dm_error why;

    if (sb->nr_frames > DM_MAX_FRAMES)
        return dm_device_fail(err, DM_ERR_CORRUPT,
                              "superblock: nr_frames is %llu, at most %u are possible",
                              (unsigned long long)sb->nr_frames, DM_MAX_FRAMES);
    if (dm_device_geometry(&want, sb->nr_frames * sb->page_size, sb->page_size, sb->max_hosts,
                           sb->max_refs, &why) != DM_OK)
        return dm_device_fail(err, DM_ERR_CORRUPT, "superblock: %.150s", why.text);
#define CHECK(field)                                                                               \
    if (sb->field != want.field)                                                                   \
    return dm_device_fail(err, DM_ERR_CORRUPT,                                                     \
                          "superblock: " #field " is %llu, but must be %llu here",                 \
                          (unsigned long long)sb->field, (unsigned long long)want.field)
    CHECK(host_table_off);
    CHECK(ref_table_off);
    CHECK(service_table_off);
    CHECK(nr_services);
    CHECK(frame_table_off);
    CHECK(page_table_off);
    CHECK(ptes_per_host);
    CHECK(vma_pages);
    CHECK(data_off);
    CHECK(device_bytes);
#undef CHECK
    if (sb->fabric_id == 0)
        return dm_device_fail(err, DM_ERR_CORRUPT, "superblock: fabric_id is 0");
    if (sb->name[0] == 0 || memchr(sb->name, 0, sizeof sb->name) == NULL)
        return dm_device_fail(err, DM_ERR_CORRUPT, "superblock: name is empty or does not end");
    return DM_OK;
}

/* Is this the superblock of an intact device in a file of file_bytes? */
static int check_superblock(const struct dm_superblock *sb, uint64_t file_bytes,
                            struct dm_error *err) {
    if (sb->magic == 0)
        return dm_device_fail(err, DM_ERR_NOT_A_DEVICE,
                              "the file (%llu bytes) begins with zeros: not a G-FAM device, or one "
                              "whose creation was "
                              "interrupted or is still going on",
                              (unsigned long long)file_bytes);
    if (sb->magic != DM_MAGIC)
        return dm_device_fail(err, DM_ERR_NOT_A_DEVICE,
                              "magic is %#018llx, not %#018llx: not a G-FAM device",
                              (unsigned long long)sb->magic, (unsigned long long)DM_MAGIC);
    if (file_bytes < DM_SUPERBLOCK_BYTES)
        return dm_device_fail(
            err, DM_ERR_TRUNCATED,
            "the file has %llu bytes, less than a superblock: remove and create it again",
            (unsigned long long)file_bytes);
    if (sb->version != DM_LAYOUT_VERSION)
        return dm_device_fail(
            err, DM_ERR_VERSION,
            "layout version is %u, this library reads %u: use the library that made the "
            "device, or remove and create it again",
            sb->version, DM_LAYOUT_VERSION);
    uint64_t checksum = dm_device_checksum(sb);
    if (sb->checksum != checksum)
        return dm_device_fail(
            err, DM_ERR_CORRUPT,
            "superblock: checksum is %#018llx, its fields give %#018llx: something wrote over "
            "it; remove and create the device again",
            (unsigned long long)sb->checksum, (unsigned long long)checksum);
    int status = check_geometry(sb, err);
    if (status != DM_OK)
        return status;
    if (file_bytes < sb->device_bytes)
        return dm_device_fail(
            err, DM_ERR_TRUNCATED,
            "the file has %llu bytes, its superblock says %llu: something cut it; remove and "
            "create the device again",
            (unsigned long long)file_bytes, (unsigned long long)sb->device_bytes);
    if (file_bytes > sb->device_bytes)
        return dm_device_fail(
            err, DM_ERR_CORRUPT,
            "the file has %llu bytes, its superblock says %llu: something was appended; "
            "remove and create the device again",
            (unsigned long long)file_bytes, (unsigned long long)sb->device_bytes);
    return DM_OK;
}

/* Map the file so that its data area, which starts on a multiple of 2 MiB, does so in memory too: then huge pages can be
 * mapped as such. */
static void *map_aligned(const struct dm_device *dev, int prot) {
    size_t bytes = dev->geo.device_bytes;
    char *reserved = mmap(NULL, bytes + DM_DATA_ALIGN, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return MAP_FAILED;
    char *base =
        (char *)(((uintptr_t)reserved + DM_DATA_ALIGN - 1) / DM_DATA_ALIGN * DM_DATA_ALIGN);
    size_t before = (size_t)(base - reserved), after = DM_DATA_ALIGN - before;
    void *at = mmap(base, bytes, prot, MAP_SHARED | MAP_FIXED, dev->fd, 0);
    if (at == MAP_FAILED) {
        munmap(reserved, bytes + DM_DATA_ALIGN);
        return MAP_FAILED;
    }
    size_t page = 4096, mapped = (bytes + page - 1) / page * page;
    if (before)
        munmap(reserved, before);
    if (bytes + after > mapped)
        munmap(base + mapped, bytes + after - mapped);
    return at;
}

/*
 * Verify the device in fd and map all of it. The descriptor is duplicated; the caller keeps its own.
 *
 * Returns DM_OK, DM_ERR_NOT_A_DEVICE, DM_ERR_TRUNCATED, DM_ERR_VERSION, DM_ERR_CORRUPT or DM_ERR_SYSTEM; after a
 * failure *dev needs no close.
 */
int dm_device_open(struct dm_device *dev, int fd, bool writable, struct dm_error *err) {
    dm_crash_read_environment();
    uint64_t file_bytes = 0;

    memset(dev, 0, sizeof *dev);
    dev->fd = -1;
    int status = read_superblock(fd, &dev->geo, &file_bytes, err);
    if (status == DM_OK)
        status = check_superblock(&dev->geo, file_bytes, err);
    if (status != DM_OK)
        return status;
    dev->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (dev->fd < 0)
        return dm_device_fail_sys(err, "fcntl", "duplicate the device's descriptor");
    int prot = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    void *base = map_aligned(dev, prot);
    if (base == MAP_FAILED) {
        status = dm_device_fail_sys(err, "mmap", "map the device");
        close(dev->fd);
        dev->fd = -1;
        return status;
    }
    struct stat st;
    if (fstat(dev->fd, &st) == 0) {
        dev->file_dev = st.st_dev;
        dev->file_ino = st.st_ino;
    }
    dev->writable = writable;
    dev->base = base;
    dev->sb = base;
    dev->hosts = (struct dm_host_entry *)(dev->base + dev->geo.host_table_off);
    dev->refs = (struct dm_ref_entry *)(dev->base + dev->geo.ref_table_off);
    dev->services = (struct dm_service_slot *)(dev->base + dev->geo.service_table_off);
    dev->frames = (uint64_t *)(dev->base + dev->geo.frame_table_off);
    dev->ptes = (uint32_t *)(dev->base + dev->geo.page_table_off);
    dev->data = dev->base + dev->geo.data_off;
    return DM_OK;
}

/* Unmap and close; does nothing the second time. */
void dm_device_close(struct dm_device *dev) {
    if (dev->base)
        munmap(dev->base, dev->geo.device_bytes);
    /* The number may be another file's by now, if somebody closed ours behind our back. */
    struct stat st;
    if (dev->fd >= 0 && fstat(dev->fd, &st) == 0 && st.st_dev == dev->file_dev &&
        st.st_ino == dev->file_ino)
        close(dev->fd);
    memset(dev, 0, sizeof *dev);
    dev->fd = -1;
}

/* Refuse [first, first + nr) unless it lies in the data area. */
int dm_device_check_frames(const struct dm_device *dev, uint64_t first, uint64_t nr,
                           struct dm_error *err) {
    if (first > dev->geo.nr_frames || nr > dev->geo.nr_frames - first)
        return dm_device_fail(err, DM_ERR_BAD_SIZE, "frames %llu to %llu: the device has %llu",
                              (unsigned long long)first, (unsigned long long)(first + nr),
                              (unsigned long long)dev->geo.nr_frames);
    return DM_OK;
}

/* The device was opened to be read only, or by a coordinator that another one has replaced. */
int dm_device_check_writable(const struct dm_device *dev, struct dm_error *err) {
    if (dm_device_fenced(dev))
        return dm_device_fail(err, DM_ERR_REPLACED,
                              "epoch %llu is over, coordinator %u has taken over",
                              (unsigned long long)dev->fence_epoch, dev->sb->coordinator_pid);
    if (dev->writable)
        return DM_OK;
    dm_device_fail(err, DM_OK, "the device was opened read-only");
    err->sys_errno = EROFS;
    return DM_ERR_SYSTEM;
}

/*
 * Allocate and zero frames [first, first + nr) now, so that their first use does not pay for it. Contents stay.
 * Returns DM_OK, DM_ERR_BAD_SIZE, DM_ERR_DEVICE_FULL or DM_ERR_SYSTEM.
 */
int dm_device_prefault(struct dm_device *dev, uint64_t first, uint64_t nr, struct dm_error *err) {
    uint64_t off = first * dev->geo.page_size, bytes = nr * dev->geo.page_size;
    int status = dm_device_check_writable(dev, err);
    if (status == DM_OK)
        status = dm_device_check_frames(dev, first, nr, err);
    if (status == DM_OK)
        status =
            dm_device_allocate(dev->fd, dev->geo.data_off + off, bytes, "allocate frames", err);
    if (status != DM_OK || nr == 0)
        return status;
    while (madvise(dev->data + off, bytes, MADV_POPULATE_WRITE) < 0)
        if (errno != EINTR && errno != EAGAIN)
            return dm_device_fail_sys(err, "madvise", "touch frames");
    return DM_OK;
}
