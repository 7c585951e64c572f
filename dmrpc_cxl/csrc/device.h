/*
 * device.h - making, checking, mapping and reading a G-FAM device file (layout.h says what is in it).
 *
 * Rules of this file pair:
 *   - shmem reports a full file system in two ways: fallocate(2) and write(2) fail with ENOSPC, but a page fault
 *     ends in SIGBUS. So every byte of metadata is allocated with fallocate before it is touched through the
 *     mapping, and what may be a hole (page tables, overflow frames) is found with SEEK_DATA or read with
 *     pread(2): reading a hole through a mapping would allocate a page.
 *   - Bounds come from the verified private copy of the superblock (dm_device.geo), never from shared memory: what
 *     another process scribbles there cannot send us outside the mapping.
 *   - Frame words, Ref words and host entries may change at any moment; they are read with atomic loads.
 */
#ifndef DM_DEVICE_H
#define DM_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>

#include "crash.h"
#include "layout.h"
#include "status.h"

#define DM_MAX_REFS (1u << 24)      /* 2 GiB of Ref table */
#define DM_MIN_VMA_PAGES (1u << 16) /* small devices get room for many scattered mappings, too */
#define DM_TABLE_ALIGN 4096u /* of every area before data_off, and of each host's page table */

/* An error that names nothing yet. A zeroed struct would name frame 0. */
static inline void dm_error_init(struct dm_error *err) {
    memset(err, 0, sizeof *err);
    err->frame = DM_NO_FRAME;
}

/* ---------------------------------------------------------------- making and opening */

struct dm_device {
    int fd; /* our own duplicate */
    dev_t file_dev;
    ino_t file_ino;
    bool writable;
    uint64_t fence_epoch;     /* not 0: change nothing unless this is the coordinators' epoch */
    struct dm_superblock geo; /* as verified; its coordinator fields mean nothing */
    uint8_t *base;            /* the whole file, MAP_SHARED */
    struct dm_superblock *sb;
    struct dm_host_entry *hosts; /* [max_hosts]; host h is hosts[h - 1] */
    struct dm_ref_entry *refs;   /* [max_refs] */
    struct dm_service_slot *services;
    uint64_t *frames; /* [nr_frames] */
    uint32_t *ptes;   /* [max_hosts][ptes_per_host] */
    uint8_t *data;    /* frame 0 */
};

int dm_device_geometry(struct dm_superblock *out, uint64_t data_bytes, uint32_t page_size,
                       uint32_t max_hosts, uint32_t max_refs, struct dm_error *err);
uint64_t dm_device_checksum(const struct dm_superblock *sb);
int dm_device_format(int fd, const char *name, const struct dm_superblock *geo,
                     struct dm_error *err);
int dm_allocate(int fd, uint64_t off, uint64_t bytes, uint64_t *huge_bytes, struct dm_error *err);
int dm_device_open(struct dm_device *dev, int fd, bool writable, struct dm_error *err);
void dm_device_close(struct dm_device *dev);
int dm_device_prefault(struct dm_device *dev, uint64_t first, uint64_t nr, struct dm_error *err);

/* ---------------------------------------------------------------- frames */

int dm_device_frame(const struct dm_device *dev, uint64_t pfn, uint64_t *word,
                    struct dm_error *err);
void dm_device_owned(const struct dm_device *dev, uint64_t *counts);
size_t dm_device_free_runs(const struct dm_device *dev, uint16_t owner, uint64_t *cursor,
                           struct dm_run *runs, size_t cap);
int dm_device_transfer(struct dm_device *dev, uint64_t pfn, uint64_t nr, uint32_t from, uint32_t to,
                       uint64_t *moved, struct dm_error *err);

/* ---------------------------------------------------------------- coordinator */

struct dm_coordinator {
    uint64_t epoch; /* filled in by dm_device_start_coordinator */
    uint64_t start_time;
    uint32_t pid; /* 0: none runs, and all but epoch is zero */
    uint32_t tcp_port;
    char tcp_host[sizeof((struct dm_superblock *)0)->tcp_host];
    char unix_path[sizeof((struct dm_superblock *)0)->unix_path];
};

/* Has a later coordinator taken over from the one that opened the device so? Asked right before each change. */
static inline bool dm_device_fenced(const struct dm_device *dev) {
    return dev->fence_epoch != 0 &&
           __atomic_load_n(&dev->sb->coordinator_epoch, __ATOMIC_ACQUIRE) != dev->fence_epoch;
}

/* Of what a coordinator is in the midst of: the epoch in the upper bits, see dm_device_begin_change. */
#define DM_MARK_SHIFT 16
int dm_device_begin_change(struct dm_device *dev, uint64_t *mark, uint32_t what,
                           struct dm_error *err);
void dm_device_end_change(struct dm_device *dev, uint64_t *mark, uint32_t what);
void dm_device_changing(const struct dm_device *dev, uint32_t *host, bool *services);

int dm_device_start_coordinator(struct dm_device *dev, struct dm_coordinator *who,
                                struct dm_error *err);
bool dm_device_stop_coordinator(struct dm_device *dev, uint64_t epoch);
void dm_device_coordinator(const struct dm_device *dev, struct dm_coordinator *out);

/* ---------------------------------------------------------------- hosts and Refs */

struct dm_host_identity {
    uint32_t pid;
    uint32_t frame_limit;
    uint64_t start_time;
    uint64_t incarnation;
    const char *name;
};

/* First page-table entry of host, which is 1 .. max_hosts. */
static inline uint32_t *dm_device_ptes(const struct dm_device *dev, uint32_t host) {
    return dev->ptes + (uint64_t)(host - 1) * dev->geo.ptes_per_host;
}

int dm_device_activate_host(struct dm_device *dev, uint32_t host,
                            const struct dm_host_identity *who, struct dm_error *err);
int dm_device_set_host_state(struct dm_device *dev, uint32_t host, uint32_t expect, uint32_t state,
                             bool *changed, struct dm_error *err);
int dm_device_host(const struct dm_device *dev, uint32_t host, struct dm_host_entry *out,
                   struct dm_error *err);
bool dm_device_ref(const struct dm_device *dev, uint32_t entry, struct dm_ref_entry *out);

struct dm_counter_info {
    const char *name;
    const char *text;
};
extern const struct dm_counter_info dm_device_counters[DM_NR_COUNTERS];

/* ---------------------------------------------------------------- services: services.c */

struct dm_service {
    uint32_t slot;
    uint32_t host;
    uint64_t incarnation;
    uint64_t serial;
    uint32_t name_bytes;
    uint32_t endpoint_bytes;
    char text[DM_MAX_SERVICE_NAME + DM_MAX_SERVICE_ENDPOINT]; /* name, endpoint */
};

int dm_device_service(const struct dm_device *dev, uint32_t slot, struct dm_service *out);
int dm_device_publish(struct dm_device *dev, const struct dm_service *what, struct dm_error *err);
int dm_device_withdraw(struct dm_device *dev, uint32_t slot, uint64_t serial, struct dm_error *err);

/* ---------------------------------------------------------------- audit */

#define DM_AUDIT_MAX_VIOLATIONS 64u

struct dm_violation {
    uint32_t pfn; /* DM_NO_FRAME: not about one frame */
    char text[188];
};

struct dm_audit {
    uint64_t pool; /* frames by state: pool + free + in_use == nr_frames */
    uint64_t free;
    uint64_t in_use;
    uint64_t mapped_pages; /* present PTEs of all hosts that are not FREE */
    uint64_t hole_pages;
    uint64_t live_refs;
    uint64_t ref_pages; /* pages with a frame that Refs cover, counted once per Ref */
    uint64_t overflow_frames;
    uint64_t in_flight;     /* intents and Refs in transition: unless 0 the rest may be transient */
    uint64_t nr_violations; /* all of them; the list holds the first ones */
    uint64_t free_of[DM_MAX_HOSTS + 1];   /* by owner; [DM_OWNER_POOL] stays 0 */
    uint64_t coming_to[DM_MAX_HOSTS + 1]; /* of these, handed over and not taken in */
    struct dm_violation violations[DM_AUDIT_MAX_VIOLATIONS];
};

int dm_device_audit(const struct dm_device *dev, struct dm_audit *out, struct dm_error *err);

#endif
