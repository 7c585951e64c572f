/*
 * device_tables.c - reading and changing the tables of a mapped device, see device.h: frame words, the coordinator's fields,
 * host entries, Refs.
 *
 * Context, unless a function says otherwise: any thread, no locks, no GIL needed; never waits for another process.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <time.h>
#include <unistd.h>

#include "device_private.h"

/* ---------------------------------------------------------------- frames */

/* Read the frame word of pfn. Returns DM_OK or DM_ERR_BAD_SIZE. */
int dm_device_frame(const struct dm_device *dev, uint64_t pfn, uint64_t *word,
                    struct dm_error *err) {
    int status = dm_device_check_frames(dev, pfn, 1, err);
    if (status == DM_OK)
        *word = __atomic_load_n(dev->frames + pfn, __ATOMIC_ACQUIRE);
    return status;
}

/*
 * List the runs of frames with refcount 0 that owner may hand out, from *cursor on, ascending, at most cap of them.
 * Returns how many and moves *cursor behind the last one; fewer than cap: there are no more.
 *
 * Frames of an owner other than the caller may change hands meanwhile: a hint, which dm_device_transfer checks.
 */
size_t dm_device_free_runs(const struct dm_device *dev, uint16_t owner, uint64_t *cursor,
                           struct dm_run *runs, size_t cap) {
    size_t nr_runs = 0;
    uint64_t pfn = *cursor;

    while (nr_runs < cap && pfn < dev->geo.nr_frames) {
        uint64_t first = pfn;
        /* Acquire: pairs with the release by which the last holder dropped its count. */
        for (; pfn < dev->geo.nr_frames; pfn++) {
            uint64_t word = __atomic_load_n(dev->frames + pfn, __ATOMIC_ACQUIRE);
            if (dm_frame_refcount(word) != 0 || dm_frame_owner(word) != owner)
                break;
        }
        if (pfn > first)
            runs[nr_runs++] = (struct dm_run){(uint32_t)first, (uint32_t)(pfn - first)};
        else
            pfn++;
    }
    *cursor = pfn;
    return nr_runs;
}

/* Count the frames that each owner has, in use or free, into counts[DM_MAX_HOSTS + 1]. */
void dm_device_owned(const struct dm_device *dev, uint64_t *counts) {
    for (uint64_t pfn = 0; pfn < dev->geo.nr_frames; pfn++) {
        uint64_t word = __atomic_load_n(dev->frames + pfn, __ATOMIC_RELAXED);
        if (dm_frame_owner(word) <= DM_MAX_HOSTS)
            counts[dm_frame_owner(word)]++;
    }
}

/*
 * Hand frames [pfn, pfn + nr) from owner `from` to owner `to`, one by one, and stop at the first that does not have
 * refcount 0 and owner `from`. *moved says how many changed hands.
 *
 * Acquire and release on each word: what the old owner did to the frame happens before what the new one does.
 * Returns DM_OK, DM_ERR_BAD_SIZE or DM_ERR_SYSTEM.
 */
int dm_device_transfer(struct dm_device *dev, uint64_t pfn, uint64_t nr, uint32_t from, uint32_t to,
                       uint64_t *moved, struct dm_error *err) {
    *moved = 0;
    int status = dm_device_check_writable(dev, err);
    if (status == DM_OK)
        status = dm_device_check_frames(dev, pfn, nr, err);
    if (status != DM_OK)
        return status;
    if (from > dev->geo.max_hosts || to > dev->geo.max_hosts)
        return dm_device_fail(err, DM_ERR_BAD_SIZE,
                              "owner %u or %u: the device has hosts 1 to %u, the pool is 0", from,
                              to, dev->geo.max_hosts);
    for (uint64_t i = 0; i < nr; i++) {
        uint64_t *at = dev->frames + pfn + i, word = __atomic_load_n(at, __ATOMIC_RELAXED), next;
        do {
            if (dm_frame_refcount(word) != 0 || dm_frame_owner(word) != from)
                return DM_OK;
            if (dm_device_fenced(dev))
                return dm_device_check_writable(dev, err);
            next = dm_frame_pack(0, (uint16_t)to, dm_frame_seq(word));
        } while (!__atomic_compare_exchange_n(at, &word, next, false, __ATOMIC_ACQ_REL,
                                              __ATOMIC_RELAXED));
        *moved = i + 1;
        DM_CRASH_POINT(transfer_worded);
    }
    return DM_OK;
}

/* ---------------------------------------------------------------- coordinator
 *
 * The coordinator's fields span many words. pid is their guard: it is zeroed first and set last, so a reader that finds
 * the same epoch and the same pid, not 0, before and after has read one coordinator's fields.
 */

static void write_coordinator(struct dm_superblock *sb, const struct dm_coordinator *who) {
    __atomic_store_n(&sb->coordinator_pid, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(
        __ATOMIC_RELEASE); /* pid 0 before the rest; pairs with the reader's fence */
    __atomic_store_n(&sb->coordinator_start_time, who->start_time, __ATOMIC_RELAXED);
    __atomic_store_n(&sb->tcp_port, who->tcp_port, __ATOMIC_RELAXED);
    memcpy(sb->tcp_host, who->tcp_host, sizeof sb->tcp_host);
    memcpy(sb->unix_path, who->unix_path, sizeof sb->unix_path);
}

/*
 * Enter a starting coordinator in the superblock and give it the next epoch, in who->epoch.
 * Returns DM_OK or DM_ERR_SYSTEM.
 * Context: the caller makes sure that no other coordinator of the fabric runs or starts.
 */
int dm_device_start_coordinator(struct dm_device *dev, struct dm_coordinator *who,
                                struct dm_error *err) {
    int status = dm_device_check_writable(dev, err);
    if (status != DM_OK)
        return status;
    write_coordinator(dev->sb, who);
    DM_CRASH_POINT(epoch_begun);
    who->epoch = __atomic_add_fetch(&dev->sb->coordinator_epoch, 1, __ATOMIC_ACQ_REL);
    DM_CRASH_POINT(epoch_raised);
    __atomic_store_n(&dev->sb->coordinator_pid, who->pid, __ATOMIC_RELEASE);
    DM_CRASH_POINT(epoch_entered);
    return DM_OK;
}

/* Take the coordinator of that epoch out of the superblock. False: a later one has taken over, nothing was changed. */
bool dm_device_stop_coordinator(struct dm_device *dev, uint64_t epoch) {
    const struct dm_coordinator nobody = {0};
    if (!dev->writable || __atomic_load_n(&dev->sb->coordinator_epoch, __ATOMIC_ACQUIRE) != epoch)
        return false;
    write_coordinator(dev->sb, &nobody);
    DM_CRASH_POINT(epoch_left);
    return true;
}

/* Read the coordinator's fields as one of them wrote them. pid 0: none runs, or one is just starting. */
void dm_device_coordinator(const struct dm_device *dev, struct dm_coordinator *out) {
    const struct dm_superblock *sb = dev->sb;

    for (int tries = 0; tries < 1000; tries++) {
        memset(out, 0, sizeof *out);
        uint32_t pid = __atomic_load_n(&sb->coordinator_pid, __ATOMIC_ACQUIRE);
        out->epoch = __atomic_load_n(&sb->coordinator_epoch, __ATOMIC_ACQUIRE);
        if (pid == 0)
            return;
        out->start_time = __atomic_load_n(&sb->coordinator_start_time, __ATOMIC_RELAXED);
        out->tcp_port = __atomic_load_n(&sb->tcp_port, __ATOMIC_RELAXED);
        memcpy(out->tcp_host, sb->tcp_host, sizeof out->tcp_host - 1);
        memcpy(out->unix_path, sb->unix_path, sizeof out->unix_path - 1);
        __atomic_thread_fence(__ATOMIC_ACQUIRE); /* the rest before the second look at pid */
        if (__atomic_load_n(&sb->coordinator_pid, __ATOMIC_RELAXED) == pid &&
            __atomic_load_n(&sb->coordinator_epoch, __ATOMIC_RELAXED) == out->epoch) {
            out->pid = pid;
            return;
        }
    }
    memset(out, 0, sizeof *out);
    out->epoch = __atomic_load_n(&sb->coordinator_epoch, __ATOMIC_ACQUIRE);
}

/*
 * Where a change takes several stores, a coordinator that was stopped between two of them and replaced would make the rest
 * in what its successor uses by then. So it says beforehand what it is about to change, and looks once more whether it was
 * replaced: either it sees the new epoch, or its successor, which raises the epoch and then looks here, sees what is not
 * to be touched before the other one is gone. Returns DM_OK or DM_ERR_REPLACED, and then nothing may be changed.
 */
int dm_device_begin_change(struct dm_device *dev, uint64_t *mark, uint32_t what,
                           struct dm_error *err) {
    uint64_t mine = dev->fence_epoch << DM_MARK_SHIFT | what;
    uint64_t there = __atomic_load_n(mark, __ATOMIC_RELAXED);
    do {
        if (dev->fence_epoch && there >> DM_MARK_SHIFT > dev->fence_epoch) /* a successor's */
            return dm_device_check_writable(dev, err);
    } while (!__atomic_compare_exchange_n(mark, &there, mine, false, __ATOMIC_SEQ_CST,
                                          __ATOMIC_RELAXED));
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* pairs with the one in dm_device_changing */
    int status = dm_device_check_writable(dev, err);
    if (status != DM_OK)
        dm_device_end_change(dev, mark, what);
    return status;
}

/* By compare-and-swap: the mark may be a successor's by now. */
void dm_device_end_change(struct dm_device *dev, uint64_t *mark, uint32_t what) {
    uint64_t mine = dev->fence_epoch << DM_MARK_SHIFT | what;
    (void)__atomic_compare_exchange_n(mark, &mine, 0, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

/* What the coordinator before this one was in the midst of when this one's epoch began: the host entry that it may still
 * bring to life, 0 for none, and whether it may still change the service table. */
void dm_device_changing(const struct dm_device *dev, uint32_t *host, bool *services) {
    const uint64_t mask = (1u << DM_MARK_SHIFT) - 1;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint64_t one = __atomic_load_n(&dev->sb->changing_host, __ATOMIC_SEQ_CST);
    uint64_t other = __atomic_load_n(&dev->sb->changing_services, __ATOMIC_SEQ_CST);
    *host = one && one >> DM_MARK_SHIFT != dev->fence_epoch ? (uint32_t)(one & mask) : 0;
    *services = other && other >> DM_MARK_SHIFT != dev->fence_epoch;
}

/* ---------------------------------------------------------------- hosts and Refs */

const struct dm_counter_info dm_device_counters[DM_NR_COUNTERS] = {
#define COUNTER_INFO(name, text) {#name, text},
    DM_COUNTERS(COUNTER_INFO)
#undef COUNTER_INFO
};

static int check_host(const struct dm_device *dev, uint32_t host, struct dm_error *err) {
    if (host < 1 || host > dev->geo.max_hosts)
        return dm_device_fail(err, DM_ERR_BAD_SIZE, "host %u: the device has hosts 1 to %u", host,
                              dev->geo.max_hosts);
    return DM_OK;
}

/*
 * Make every word of a page table that was used before zero. Only the blocks that were ever touched are looked at
 * (SEEK_DATA), and only those that hold something are written. Punching a hole and allocating it afresh would do as well,
 * but costs 3 to 10 times as much, and the next host pays again when it touches the pages (docs/device-layout.md).
 */
static int clear_page_table(struct dm_device *dev, uint64_t off, uint64_t bytes,
                            struct dm_error *err) {
    static const uint8_t zeros[DM_TABLE_ALIGN];
    const uint64_t end = off + bytes;

    while (off < end) {
        off_t data = lseek(dev->fd, (off_t)off, SEEK_DATA);
        if (data < 0 && errno == ENXIO) /* no data from here to the end of the file */
            break;
        off_t hole = data < 0 ? -1 : lseek(dev->fd, data, SEEK_HOLE);
        if (hole < 0)
            return dm_device_fail_sys(err, "lseek", "look for used parts of a page table");
        off = (uint64_t)hole < end ? (uint64_t)hole : end;
        for (uint64_t at = (uint64_t)data; at < off; at += DM_TABLE_ALIGN)
            if (memcmp(dev->base + at, zeros, DM_TABLE_ALIGN) != 0)
                memset(dev->base + at, 0, DM_TABLE_ALIGN);
    }
    return DM_OK;
}

/*
 * Make the page table of host entry `host` empty and allocated to its last byte: its host must never meet SIGBUS there.
 * An entry that once had a host is known by its incarnation, and has kept its allocation.
 */
static int prepare_page_table(struct dm_device *dev, uint32_t host, struct dm_error *err) {
    const uint64_t bytes = dev->geo.ptes_per_host * sizeof(uint32_t);
    const uint64_t off = dev->geo.page_table_off + (uint64_t)(host - 1) * bytes;

    int status = clear_page_table(dev, off, bytes, err);
    if (status != DM_OK ||
        __atomic_load_n(&dev->hosts[host - 1].incarnation, __ATOMIC_RELAXED) != 0)
        return status;
    status = dm_device_allocate(dev->fd, off, bytes, "allocate a host's page table", err);
    if (status != DM_OK) { /* give back what there was of it */
        struct dm_error ignored;
        dm_device_punch(dev->fd, off, bytes, &ignored);
    }
    return status;
}

static int fill_in_host(struct dm_device *dev, uint32_t host, const struct dm_host_identity *who,
                        struct dm_error *err) {
    struct dm_host_entry *entry = dev->hosts + host - 1;
    struct timespec now;
    int status = prepare_page_table(dev, host, err);
    if (status != DM_OK)
        return status;
    DM_CRASH_POINT(host_cleared);
    clock_gettime(CLOCK_REALTIME, &now);
    memset(entry, 0, sizeof *entry); /* state stays FREE, which is 0 */
    entry->pid = who->pid;
    entry->start_time = who->start_time;
    entry->incarnation = who->incarnation;
    entry->frame_limit = who->frame_limit;
    entry->registered_ns = (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
    memcpy(entry->name, who->name, strnlen(who->name, sizeof entry->name - 1));
    /* Release: whoever sees ACTIVE sees the entry and the empty page table. */
    DM_CRASH_POINT(host_entered);
    status = dm_device_check_writable(
        dev, err); /* once more: nobody goes by what was stored before this */
    if (status != DM_OK)
        return status;
    __atomic_store_n(&entry->state, DM_HOST_ACTIVE, __ATOMIC_RELEASE);
    DM_CRASH_POINT(host_active);
    return DM_OK;
}

/*
 * Bring host entry `host`, which is FREE, to life: empty its page table, intent, gauges and counters, enter who it is, and
 * make it ACTIVE, last. Returns DM_OK, DM_ERR_BAD_SIZE, DM_ERR_BUSY (not FREE), DM_ERR_DEVICE_FULL or DM_ERR_SYSTEM;
 * after a failure the entry is FREE as before.
 * Context: the coordinator; it alone takes entries out of FREE.
 */
int dm_device_activate_host(struct dm_device *dev, uint32_t host,
                            const struct dm_host_identity *who, struct dm_error *err) {
    int status = dm_device_check_writable(dev, err);
    if (status == DM_OK)
        status = check_host(dev, host, err);
    if (status != DM_OK)
        return status;
    struct dm_host_entry *entry = dev->hosts + host - 1;
    uint32_t state = __atomic_load_n(&entry->state, __ATOMIC_ACQUIRE);
    if (state != DM_HOST_FREE)
        return dm_device_fail(err, DM_ERR_BUSY, "host entry %u is in state %u, not free", host,
                              state);

    status = dm_device_begin_change(dev, &dev->sb->changing_host, host, err);
    if (status != DM_OK)
        return status;
    status = fill_in_host(dev, host, who, err);
    dm_device_end_change(dev, &dev->sb->changing_host, host);
    return status;
}

/*
 * Change the state of a host entry from expect to state; *changed is false when it was in another one.
 * Returns DM_OK, DM_ERR_BAD_SIZE or DM_ERR_SYSTEM.
 */
int dm_device_set_host_state(struct dm_device *dev, uint32_t host, uint32_t expect, uint32_t state,
                             bool *changed, struct dm_error *err) {
    int status = dm_device_check_writable(dev, err);
    if (status == DM_OK)
        status = check_host(dev, host, err);
    if (status == DM_OK)
        *changed = __atomic_compare_exchange_n(&dev->hosts[host - 1].state, &expect, state, false,
                                               __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    if (status == DM_OK && *changed)
        DM_CRASH_POINT(host_state_set);
    return status;
}

/* Copy shared memory, 8 bytes at a time, each read whole. */
static void copy_words(void *to, const void *from, size_t bytes) {
    uint64_t *out = to;
    const uint64_t *in = from;
    for (size_t i = 0; i < bytes / sizeof *out; i++)
        out[i] = __atomic_load_n(in + i, __ATOMIC_RELAXED);
}

/* Copy a host entry; fields that change meanwhile are each old or new. Returns DM_OK or DM_ERR_BAD_SIZE. */
int dm_device_host(const struct dm_device *dev, uint32_t host, struct dm_host_entry *out,
                   struct dm_error *err) {
    int status = check_host(dev, host, err);
    if (status != DM_OK)
        return status;
    copy_words(out, dev->hosts + host - 1, sizeof *out);
    out->name[sizeof out->name - 1] = 0;
    return DM_OK;
}

/*
 * Copy Ref entry `entry`, which is below max_refs. False when its state word changed in each of several tries: somebody
 * is at work on it.
 */
bool dm_device_ref(const struct dm_device *dev, uint32_t entry, struct dm_ref_entry *out) {
    const struct dm_ref_entry *ref = dev->refs + entry;
    for (int tries = 0; tries < 100; tries++) {
        uint64_t before = __atomic_load_n(&ref->state, __ATOMIC_ACQUIRE);
        copy_words(out, ref, sizeof *out);
        __atomic_thread_fence(__ATOMIC_ACQUIRE); /* the fields before the second look at the word */
        if (__atomic_load_n(&ref->state, __ATOMIC_RELAXED) == before && out->state == before)
            return true;
    }
    return false;
}
