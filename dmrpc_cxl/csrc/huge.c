/*
 * huge.c - allocating the data area, in huge pages where the kernel gives them.
 *
 * Facts: shmem files are made of 4 KiB pages unless their mount says otherwise, but MADV_COLLAPSE (Linux 6.1) makes a huge page
 * of any 2 MiB of them, whatever the mount says. Page-table entries of one huge page are then changed in
 * batches (Linux 6.17): protecting, mapping and unmapping 256 pages costs a fifth of what it does with 256 separate
 * pages, and copies through the physmap, which maps whole huge pages, miss the TLB less. Collapsing a range that
 * holds one small page also costs less than allocating it page by page.
 *
 * An optimisation: where it fails the range is allocated in small pages. fallocate at the end makes sure of every byte.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "device.h"
#include "device_private.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum { HUGE_BYTES = 2 << 20, SMALL_BYTES = 4096 };

/* Collapse [off, off + HUGE_BYTES), seeded with one page: an empty range has nothing to collapse. */
static int collapse(int fd, uint64_t off, char *window) {
    if (fallocate(fd, 0, (off_t)off, SMALL_BYTES) < 0)
        return -1;
    char *at =
        mmap(window, HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)off);
    if (at == MAP_FAILED)
        return -1;
    /* A page that fallocate made is not up to date until it is read. */
    (void)*(volatile char *)at;
    return madvise(at, HUGE_BYTES, MADV_COLLAPSE);
}

/*
 * Allocate bytes [off, off + bytes) of a device file that nobody uses yet; off is a multiple of 2 MiB. Contents stay.
 * *huge_bytes counts what is in huge pages. Returns DM_OK, DM_ERR_DEVICE_FULL or DM_ERR_SYSTEM.
 */
int dm_allocate(int fd, uint64_t off, uint64_t bytes, uint64_t *huge_bytes, struct dm_error *err) {
    *huge_bytes = 0;
    char *reserved =
        mmap(NULL, 2 * HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved != MAP_FAILED) {
        char *window = (char *)(((uintptr_t)reserved + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
        for (uint64_t at = 0; at + HUGE_BYTES <= bytes; at += HUGE_BYTES) {
            if (collapse(fd, off + at, window) < 0)
                break;
            *huge_bytes += HUGE_BYTES;
        }
        munmap(reserved, 2 * HUGE_BYTES);
    }
    while (fallocate(fd, 0, (off_t)off, (off_t)bytes) < 0) {
        if (errno == EINTR)
            continue;
        int full = errno == ENOSPC || errno == EDQUOT || errno == ENOMEM;
        int status = dm_device_fail_sys(err, "fallocate", "allocate the device's frames");
        return full ? DM_ERR_DEVICE_FULL : status;
    }
    return DM_OK;
}
