/*
 * test_device.c - the device file, from C: geometry, format, verification, frame words, hosts, audit.
 *
 * Every test gets a small device in an unnamed file of /dev/shm, so nothing is left behind.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "device.h"

#define NR_FRAMES 300u
#define MAX_HOSTS 3u
#define MAX_REFS 8u

static struct dm_error err;
static const uint32_t page_sizes[] = {4096, 16384, 65536};

static int unnamed_file(void) {
    int fd = open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) {
        printf("no unnamed files in /dev/shm: %s\n", strerror(errno));
        exit(77);
    }
    return fd;
}

static struct dm_superblock geometry(uint32_t page_size) {
    struct dm_superblock geo;
    assert(dm_device_geometry(&geo, (uint64_t)NR_FRAMES * page_size, page_size, MAX_HOSTS, MAX_REFS,
                              &err) == DM_OK);
    return geo;
}

static int formatted(uint32_t page_size) {
    struct dm_superblock geo = geometry(page_size);
    int fd = unnamed_file();
    assert(dm_device_format(fd, "test", &geo, &err) == DM_OK);
    return fd;
}

/* A device; close it with dm_device_close. */
static struct dm_device opened(uint32_t page_size) {
    struct dm_device dev;
    int fd = formatted(page_size);
    assert(dm_device_open(&dev, fd, true, &err) == DM_OK);
    close(fd);
    return dev;
}

static void activate(struct dm_device *dev, uint32_t host) {
    struct dm_host_identity who = {.pid = 1, .incarnation = 100 + host, .name = "h"};
    assert(dm_device_activate_host(dev, host, &who, &err) == DM_OK);
}

static struct dm_audit *audited(const struct dm_device *dev) {
    static struct dm_audit audit;
    assert(dm_device_audit(dev, &audit, &err) == DM_OK);
    assert(audit.pool + audit.free + audit.in_use == dev->geo.nr_frames);
    return &audit;
}

static uint64_t allocated_bytes(int fd) {
    struct stat st;
    assert(fstat(fd, &st) == 0);
    return (uint64_t)st.st_blocks * 512;
}

/* ---------------------------------------------------------------- geometry and format */

static void areas_are_aligned_and_do_not_overlap(uint32_t page_size) {
    struct dm_superblock geo = geometry(page_size);
    const uint64_t pt_bytes = geo.ptes_per_host * sizeof(uint32_t);
    assert(geo.host_table_off >= DM_SUPERBLOCK_BYTES);
    assert(geo.ref_table_off >= geo.host_table_off + MAX_HOSTS * sizeof(struct dm_host_entry));
    assert(geo.frame_table_off >= geo.ref_table_off + MAX_REFS * sizeof(struct dm_ref_entry));
    assert(geo.page_table_off >= geo.frame_table_off + NR_FRAMES * sizeof(uint64_t));
    assert(geo.data_off >= geo.page_table_off + MAX_HOSTS * pt_bytes);
    assert(geo.device_bytes == geo.data_off + (uint64_t)NR_FRAMES * page_size);
    assert(geo.host_table_off % 4096 == 0 && geo.ref_table_off % 4096 == 0);
    assert(geo.frame_table_off % 4096 == 0 && geo.page_table_off % 4096 == 0);
    assert(pt_bytes % 4096 == 0); /* host slots share no page */
    assert(geo.data_off % DM_DATA_ALIGN == 0);
    assert(geo.vma_pages >= 65536 && geo.ptes_per_host == 2 * NR_FRAMES + geo.vma_pages);
}

static void impossible_geometry_is_refused(void) {
    const struct {
        uint64_t bytes;
        uint32_t page, hosts, refs;
    } bad[] = {
        {4096, 8192, 1, 1},
        {4096, 0, 1, 1},
        {0, 4096, 1, 1},
        {4097, 4096, 1, 1},
        {4096, 4096, 0, 1},
        {4096, 4096, DM_MAX_HOSTS + 1, 1},
        {4096, 4096, 1, 0},
        {4096, 4096, 1, DM_MAX_REFS + 1},
        {((uint64_t)DM_MAX_FRAMES + 1) * 4096, 4096, 1, 1},
    };
    struct dm_superblock geo;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert(dm_device_geometry(&geo, bad[i].bytes, bad[i].page, bad[i].hosts, bad[i].refs,
                                  &err) == DM_ERR_BAD_SIZE);
        assert(err.text[0] != 0 && err.frame == DM_NO_FRAME);
    }
}

static void largest_geometry_does_not_overflow(void) {
    struct dm_superblock geo;
    assert(dm_device_geometry(&geo, (uint64_t)DM_MAX_FRAMES * 65536, 65536, DM_MAX_HOSTS,
                              DM_MAX_REFS, &err) == DM_OK);
    assert(geo.ptes_per_host == 4ull * DM_MAX_FRAMES);
    assert(geo.device_bytes < 1ull << 46 && geo.device_bytes > (uint64_t)DM_MAX_FRAMES * 65536);
}

static void format_allocates_the_tables_and_nothing_else(uint32_t page_size) {
    int fd = formatted(page_size);
    struct dm_superblock geo = geometry(page_size);
    struct stat st;
    assert(fstat(fd, &st) == 0 && (uint64_t)st.st_size == geo.device_bytes);
    assert(allocated_bytes(fd) == geo.page_table_off);
    close(fd);
}

static void format_erases_what_tables_held_and_keeps_the_data(uint32_t page_size) {
    struct dm_device dev = opened(page_size);
    struct dm_superblock geo = geometry(page_size);
    const uint64_t old_fabric = dev.geo.fabric_id;
    activate(&dev, 2);
    dm_device_ptes(&dev, 2)[5] = DM_PTE_PRESENT | 7;
    dev.frames[7] = dm_frame_pack(1, 2, 1);
    dev.refs[3].state = dm_ref_pack(DM_REF_LIVE, 0, 2, 1);
    memset(dev.data, 0x5a, page_size);
    int fd = dup(dev.fd);
    dm_device_close(&dev);

    assert(dm_device_format(fd, "again", &geo, &err) == DM_OK);
    assert(dm_device_open(&dev, fd, true, &err) == DM_OK);
    close(fd);
    assert(dev.geo.fabric_id != old_fabric && dev.data[page_size - 1] == 0x5a);
    assert(dev.hosts[1].state == DM_HOST_FREE && dev.hosts[1].incarnation == 0);
    struct dm_audit *audit = audited(&dev);
    assert(audit->pool == NR_FRAMES && audit->live_refs == 0 && audit->nr_violations == 0);
    dm_device_close(&dev);
}

static void format_refuses_a_file_of_another_size(void) {
    struct dm_superblock geo = geometry(4096);
    int fd = unnamed_file();
    assert(ftruncate(fd, 12345) == 0);
    assert(dm_device_format(fd, "test", &geo, &err) == DM_ERR_BAD_SIZE);
    close(fd);
}

static void format_refuses_what_is_not_a_file(void) {
    struct dm_superblock geo = geometry(4096);
    int fd = open("/dev/null", O_RDWR);
    assert(dm_device_format(fd, "test", &geo, &err) == DM_ERR_NOT_A_DEVICE);
    close(fd);
}

static void format_refuses_names_that_do_not_fit(void) {
    char name[DM_NAME_BYTES + 1];
    struct dm_superblock geo = geometry(4096);
    int fd = unnamed_file();
    memset(name, 'x', sizeof name);
    name[DM_NAME_BYTES] = 0;
    assert(dm_device_format(fd, name, &geo, &err) == DM_ERR_BAD_SIZE);
    assert(dm_device_format(fd, "", &geo, &err) == DM_ERR_BAD_SIZE);
    name[DM_NAME_BYTES - 1] = 0;
    assert(dm_device_format(fd, name, &geo, &err) == DM_OK);
    close(fd);
}

/* ---------------------------------------------------------------- verification */

static int open_status(int fd) {
    struct dm_device dev;
    int status = dm_device_open(&dev, fd, true, &err);
    if (status == DM_OK)
        dm_device_close(&dev);
    return status;
}

static void any_flipped_bit_of_the_checked_part_is_refused(uint32_t page_size) {
    int fd = formatted(page_size);
    for (off_t at = 0; at < (off_t)(offsetof(struct dm_superblock, checksum) + 8); at++) {
        for (int bit = 0; bit < 8; bit++) {
            uint8_t byte, flipped;
            assert(pread(fd, &byte, 1, at) == 1);
            flipped = (uint8_t)(byte ^ 1 << bit);
            assert(pwrite(fd, &flipped, 1, at) == 1);
            int status = open_status(fd), want = DM_ERR_CORRUPT;
            if (at < 8)
                want = DM_ERR_NOT_A_DEVICE;
            else if (at < 12)
                want = DM_ERR_VERSION;
            assert(status == want && err.text[0] != 0);
            assert(pwrite(fd, &byte, 1, at) == 1);
        }
    }
    assert(open_status(fd) == DM_OK);
    close(fd);
}

/* A superblock whose checksum is right, but whose field is not what this library would compute. */
static void wrong_geometry_is_refused_by_the_name_of_its_field(uint32_t page_size) {
    int fd = formatted(page_size);
    struct dm_superblock good, bad;
    assert(pread(fd, &good, sizeof good, 0) == sizeof good);
#define TRY(field, value)                                                                          \
    do {                                                                                           \
        bad = good;                                                                                \
        bad.field = (value);                                                                       \
        bad.checksum = dm_device_checksum(&bad);                                                   \
        assert(pwrite(fd, &bad, sizeof bad, 0) == sizeof bad);                                     \
        assert(open_status(fd) == DM_ERR_CORRUPT);                                                 \
        assert(strstr(err.text, #field) != NULL);                                                  \
    } while (0)
    TRY(host_table_off, good.host_table_off + 4096);
    TRY(ref_table_off, 0);
    TRY(service_table_off, 0);
    TRY(nr_services, good.nr_services + 1);
    TRY(frame_table_off, good.device_bytes);
    TRY(page_table_off, UINT64_MAX);
    TRY(ptes_per_host, good.ptes_per_host - 1024);
    TRY(vma_pages, 0);
    TRY(data_off, good.data_off + DM_DATA_ALIGN);
    TRY(device_bytes, good.device_bytes + 1);
    TRY(nr_frames, UINT64_MAX);
    TRY(max_hosts, 0);
    TRY(max_refs, UINT32_MAX);
    TRY(fabric_id, 0);
#undef TRY
    bad = good;
    bad.page_size = 1000;
    bad.checksum = dm_device_checksum(&bad);
    assert(pwrite(fd, &bad, sizeof bad, 0) == sizeof bad);
    assert(open_status(fd) == DM_ERR_CORRUPT);
    assert(strstr(err.text, "page size") || strstr(err.text, "data size"));
    bad = good;
    bad.name[0] = 0;
    bad.checksum = dm_device_checksum(&bad);
    assert(pwrite(fd, &bad, sizeof bad, 0) == sizeof bad);
    assert(open_status(fd) == DM_ERR_CORRUPT && strstr(err.text, "name"));
    bad = good;
    memset(bad.name, 'x', sizeof bad.name);
    bad.checksum = dm_device_checksum(&bad);
    assert(pwrite(fd, &bad, sizeof bad, 0) == sizeof bad);
    assert(open_status(fd) == DM_ERR_CORRUPT && strstr(err.text, "name"));
    close(fd);
}

static void file_of_another_size_is_refused(uint32_t page_size) {
    int fd = formatted(page_size);
    struct dm_superblock geo = geometry(page_size);
    assert(ftruncate(fd, (off_t)geo.device_bytes + 1) == 0);
    assert(open_status(fd) == DM_ERR_CORRUPT);
    assert(ftruncate(fd, (off_t)geo.device_bytes) == 0);
    assert(open_status(fd) == DM_OK);
    assert(ftruncate(fd, (off_t)geo.device_bytes - 1) == 0);
    assert(open_status(fd) == DM_ERR_TRUNCATED);
    assert(ftruncate(fd, 4095) == 0);
    assert(open_status(fd) == DM_ERR_TRUNCATED);
    assert(ftruncate(fd, 8) == 0);
    assert(open_status(fd) == DM_ERR_TRUNCATED);
    assert(ftruncate(fd, 7) == 0);
    assert(open_status(fd) == DM_ERR_NOT_A_DEVICE);
    assert(ftruncate(fd, 0) == 0);
    assert(open_status(fd) == DM_ERR_NOT_A_DEVICE);
    close(fd);
}

static void closed_descriptor_is_a_system_error(void) {
    int fd = unnamed_file();
    close(fd);
    assert(open_status(fd) == DM_ERR_SYSTEM);
    assert(err.sys_errno == EBADF && strcmp(err.syscall, "fstat") == 0);
}

static void closing_twice_does_nothing(void) {
    struct dm_device dev = opened(4096);
    dm_device_close(&dev);
    dm_device_close(&dev);
}

static void read_only_device_refuses_every_change(void) {
    int fd = formatted(4096);
    struct dm_device dev;
    struct dm_host_identity who = {.incarnation = 1, .name = "h"};
    struct dm_coordinator coordinator = {.pid = 1};
    uint64_t moved;
    bool changed;
    assert(dm_device_open(&dev, fd, false, &err) == DM_OK);
    assert(dm_device_transfer(&dev, 0, 1, 0, 1, &moved, &err) == DM_ERR_SYSTEM);
    assert(err.sys_errno == EROFS);
    assert(dm_device_activate_host(&dev, 1, &who, &err) == DM_ERR_SYSTEM);
    assert(dm_device_set_host_state(&dev, 1, 0, 1, &changed, &err) == DM_ERR_SYSTEM);
    assert(dm_device_start_coordinator(&dev, &coordinator, &err) == DM_ERR_SYSTEM);
    assert(!dm_device_stop_coordinator(&dev, 0));
    assert(dm_device_prefault(&dev, 0, 1, &err) == DM_ERR_SYSTEM);
    assert(audited(&dev)->pool == NR_FRAMES);
    dm_device_close(&dev);
    close(fd);
}

/* ---------------------------------------------------------------- frames */

static void transfer_stops_at_the_first_frame_that_is_not_the_givers(uint32_t page_size) {
    struct dm_device dev = opened(page_size);
    uint64_t moved, word, cursor = 0;
    struct dm_run runs[4];
    dev.frames[10] = dm_frame_pack(1, 0, 9); /* in use */
    dev.frames[20] = dm_frame_pack(0, 2, 9); /* another's */
    dev.frames[5] = dm_frame_pack(0, 0, 77);
    assert(dm_device_transfer(&dev, 0, 30, 0, 1, &moved, &err) == DM_OK && moved == 10);
    assert(dm_device_frame(&dev, 5, &word, &err) == DM_OK && word == dm_frame_pack(0, 1, 77));
    assert(dm_device_transfer(&dev, 10, 1, 0, 1, &moved, &err) == DM_OK && moved == 0);
    assert(dm_device_transfer(&dev, 11, 30, 0, 1, &moved, &err) == DM_OK && moved == 9);
    assert(dm_device_free_runs(&dev, 1, &cursor, runs, 4) == 2);
    assert(runs[0].pfn == 0 && runs[0].count == 10 && runs[1].pfn == 11 && runs[1].count == 9);
    assert(dm_device_transfer(&dev, 0, 10, 1, 0, &moved, &err) == DM_OK && moved == 10);
    dm_device_close(&dev);
}

static void frames_beyond_the_device_are_refused(void) {
    struct dm_device dev = opened(4096);
    uint64_t moved, word;
    assert(dm_device_frame(&dev, NR_FRAMES, &word, &err) == DM_ERR_BAD_SIZE);
    assert(dm_device_transfer(&dev, NR_FRAMES, 1, 0, 1, &moved, &err) == DM_ERR_BAD_SIZE);
    assert(dm_device_transfer(&dev, 1, NR_FRAMES, 0, 1, &moved, &err) == DM_ERR_BAD_SIZE);
    assert(dm_device_transfer(&dev, 1, UINT64_MAX, 0, 1, &moved, &err) == DM_ERR_BAD_SIZE);
    assert(dm_device_transfer(&dev, 0, 1, 0, MAX_HOSTS + 1, &moved, &err) == DM_ERR_BAD_SIZE);
    assert(dm_device_prefault(&dev, UINT64_MAX, 2, &err) == DM_ERR_BAD_SIZE);
    assert(dm_device_transfer(&dev, NR_FRAMES, 0, 0, 1, &moved, &err) == DM_OK && moved == 0);
    dm_device_close(&dev);
}

static void free_runs_continue_where_the_last_call_stopped(void) {
    struct dm_device dev = opened(4096);
    uint64_t cursor = 0, total = 0;
    struct dm_run run;
    for (uint32_t pfn = 0; pfn < NR_FRAMES; pfn += 3)
        dev.frames[pfn] = dm_frame_pack(1, 0, 0);
    size_t calls = 0;
    while (dm_device_free_runs(&dev, 0, &cursor, &run, 1) == 1) {
        assert(run.pfn % 3 == 1 && run.count == 2);
        total += run.count;
        calls++;
    }
    assert(calls == 100 && total == 200);
    dm_device_close(&dev);
}

static void prefault_allocates_and_keeps_contents(uint32_t page_size) {
    struct dm_device dev = opened(page_size);
    const uint64_t before = allocated_bytes(dev.fd);
    memset(dev.data + 4 * page_size, 0x77, page_size);
    assert(dm_device_prefault(&dev, 3, 5, &err) == DM_OK);
    assert(allocated_bytes(dev.fd) == before + 5 * page_size);
    assert(dev.data[5 * page_size - 1] == 0x77 && dev.data[5 * page_size] == 0);
    dm_device_close(&dev);
}

#define NR_RACERS 4
struct racer {
    struct dm_device *dev;
    uint32_t host;
    uint64_t won;
};

static void *race(void *arg) {
    struct racer *me = arg;
    for (uint64_t pfn = 0; pfn < NR_FRAMES; pfn++) {
        uint64_t moved;
        assert(dm_device_transfer(me->dev, pfn, 1, 0, me->host, &moved, &(struct dm_error){0}) ==
               DM_OK);
        me->won += moved;
    }
    return NULL;
}

static void each_frame_is_won_by_exactly_one_of_racing_takers(void) {
    struct dm_superblock geo;
    struct dm_device dev;
    int fd = unnamed_file();
    assert(dm_device_geometry(&geo, NR_FRAMES * 4096, 4096, NR_RACERS, 1, &err) == DM_OK);
    assert(dm_device_format(fd, "race", &geo, &err) == DM_OK);
    assert(dm_device_open(&dev, fd, true, &err) == DM_OK);
    close(fd);
    struct racer racers[NR_RACERS];
    pthread_t threads[NR_RACERS];
    for (uint32_t i = 0; i < NR_RACERS; i++) {
        activate(&dev, i + 1);
        racers[i] = (struct racer){&dev, i + 1, 0};
        assert(pthread_create(&threads[i], NULL, race, &racers[i]) == 0);
    }
    uint64_t total = 0;
    for (uint32_t i = 0; i < NR_RACERS; i++) {
        assert(pthread_join(threads[i], NULL) == 0);
        total += racers[i].won;
    }
    struct dm_audit *audit = audited(&dev);
    assert(total == NR_FRAMES && audit->pool == 0 && audit->nr_violations == 0);
    for (uint32_t i = 0; i < NR_RACERS; i++)
        assert(audit->free_of[i + 1] == racers[i].won);
    dm_device_close(&dev);
}

/* ---------------------------------------------------------------- coordinator */

static void every_start_of_a_coordinator_gets_a_new_epoch(void) {
    struct dm_device dev = opened(4096);
    struct dm_coordinator who = {.pid = 11, .start_time = 12, .tcp_port = 13, .unix_path = "/a/b"};
    struct dm_coordinator seen;
    dm_device_coordinator(&dev, &seen);
    assert(seen.pid == 0 && seen.epoch == 0);
    assert(dm_device_start_coordinator(&dev, &who, &err) == DM_OK && who.epoch == 1);
    dm_device_coordinator(&dev, &seen);
    assert(seen.pid == 11 && seen.start_time == 12 && seen.tcp_port == 13 && seen.epoch == 1);
    assert(strcmp(seen.unix_path, "/a/b") == 0 && seen.tcp_host[0] == 0);
    assert(dm_device_start_coordinator(&dev, &who, &err) == DM_OK && who.epoch == 2);
    assert(!dm_device_stop_coordinator(&dev, 1)); /* not the current one */
    dm_device_coordinator(&dev, &seen);
    assert(seen.pid == 11);
    assert(dm_device_stop_coordinator(&dev, 2));
    dm_device_coordinator(&dev, &seen);
    assert(seen.pid == 0 && seen.epoch == 2 && seen.unix_path[0] == 0);
    dm_device_close(&dev);
}

/* ---------------------------------------------------------------- hosts */

static void activation_allocates_the_whole_page_table(uint32_t page_size) {
    struct dm_device dev = opened(page_size);
    const uint64_t before = allocated_bytes(dev.fd);
    activate(&dev, 2);
    assert(allocated_bytes(dev.fd) == before + dev.geo.ptes_per_host * sizeof(uint32_t));
    dm_device_close(&dev);
}

static void activation_leaves_nothing_of_the_last_host(uint32_t page_size) {
    struct dm_device dev = opened(page_size);
    bool changed;
    uint32_t *ptes = dm_device_ptes(&dev, 2);
    const uint64_t last = dev.geo.ptes_per_host - 1;
    activate(&dev, 1);
    activate(&dev, 2);
    activate(&dev, 3);
    dm_device_ptes(&dev, 1)[last] = 1;
    ptes[0] = ptes[5000] = ptes[last] = DM_PTE_PRESENT | 3;
    dm_device_ptes(&dev, 3)[0] = 1;
    dev.hosts[1].intent.op = DM_INTENT_COW;
    dev.hosts[1].counters[DM_CNT_syscalls] = 9;
    dev.hosts[1].nr_free = 4;
    assert(dm_device_set_host_state(&dev, 2, DM_HOST_ACTIVE, DM_HOST_FREE, &changed, &err) ==
           DM_OK);
    assert(changed);
    activate(&dev, 2);
    for (uint64_t i = 0; i <= last; i++)
        assert(ptes[i] == 0);
    assert(dm_device_ptes(&dev, 1)[last] == 1 && dm_device_ptes(&dev, 3)[0] == 1); /* neighbours */
    assert(dev.hosts[1].intent.op == 0 && dev.hosts[1].nr_free == 0);
    assert(dev.hosts[1].counters[DM_CNT_syscalls] == 0 && dev.hosts[1].incarnation == 102);
    dm_device_close(&dev);
}

static void entry_that_is_not_free_is_not_activated(void) {
    struct dm_device dev = opened(4096);
    struct dm_host_identity who = {.incarnation = 1, .name = "other"};
    activate(&dev, 1);
    assert(dm_device_activate_host(&dev, 1, &who, &err) == DM_ERR_BUSY);
    assert(dm_device_activate_host(&dev, 0, &who, &err) == DM_ERR_BAD_SIZE);
    assert(dm_device_activate_host(&dev, MAX_HOSTS + 1, &who, &err) == DM_ERR_BAD_SIZE);
    assert(strcmp(dev.hosts[0].name, "h") == 0);
    dm_device_close(&dev);
}

static void state_changes_only_from_the_expected_one(void) {
    struct dm_device dev = opened(4096);
    bool changed;
    activate(&dev, 1);
    assert(dm_device_set_host_state(&dev, 1, DM_HOST_DEAD, DM_HOST_FREE, &changed, &err) == DM_OK);
    assert(!changed && dev.hosts[0].state == DM_HOST_ACTIVE);
    assert(dm_device_set_host_state(&dev, 1, DM_HOST_ACTIVE, DM_HOST_DEAD, &changed, &err) ==
           DM_OK);
    assert(changed && dev.hosts[0].state == DM_HOST_DEAD);
    assert(dm_device_set_host_state(&dev, 9, 0, 1, &changed, &err) == DM_ERR_BAD_SIZE);
    dm_device_close(&dev);
}

/* ---------------------------------------------------------------- audit */

static void hold(struct dm_device *dev, uint32_t pfn, uint32_t refcount) {
    dev->frames[pfn] = dm_frame_pack(refcount, 1, 1);
}

static void audit_accepts_a_fabric_whose_counts_add_up(uint32_t page_size) {
    struct dm_device dev = opened(page_size);
    activate(&dev, 1);
    activate(&dev, 3);
    uint32_t *first = dm_device_ptes(&dev, 1), *third = dm_device_ptes(&dev, 3);
    first[10] = DM_PTE_PRESENT | DM_PTE_HEAD | 10;
    first[11] = DM_PTE_PRESENT | 11;
    first[dev.geo.ptes_per_host - 1] = DM_PTE_HOLE | DM_PTE_HEAD;
    third[NR_FRAMES + 11] = DM_PTE_PRESENT | DM_PTE_HEAD | 11;
    hold(&dev, 10, 2);
    hold(&dev, 11, 3);
    hold(&dev, 12, 1);
    dev.frames[13] = dm_frame_pack(0, 3, 0);
    dev.refs[7] = (struct dm_ref_entry){
        .state = dm_ref_pack(DM_REF_LIVE, 0, 3, 5),
        .nr_pages = 5,
        .nr_runs = 2,
        .runs = {{10, 3}, {DM_NO_FRAME, 2}},
    };
    struct dm_audit *audit = audited(&dev);
    for (uint64_t i = 0; i < audit->nr_violations; i++)
        printf("%s\n", audit->violations[i].text);
    assert(audit->nr_violations == 0 && audit->in_flight == 0);
    assert(audit->in_use == 3 && audit->free == 1 && audit->free_of[3] == 1);
    assert(audit->pool == NR_FRAMES - 4 && audit->mapped_pages == 3 && audit->hole_pages == 1);
    assert(audit->live_refs == 1 && audit->ref_pages == 3);
    dm_device_close(&dev);
}

static void audit_counts_overflow_frames_and_what_they_list(uint32_t page_size) {
    struct dm_device dev = opened(page_size);
    struct dm_ref_overflow *a = (void *)(dev.data + 200 * page_size),
                           *b = (void *)(dev.data + 201 * page_size);
    activate(&dev, 1);
    dev.refs[0] = (struct dm_ref_entry){
        .state = dm_ref_pack(DM_REF_LIVE, 0, 1, 1),
        .nr_pages = 12,
        .nr_runs = 12,
        .overflow = 200 + 1,
        .nr_overflow = 2,
    };
    a->next = 201 + 1;
    a->nr_runs = 2;
    b->next = 0;
    b->nr_runs = 1;
    for (uint32_t i = 0; i < 12; i++) {
        struct dm_run run = {2 * i, 1};
        hold(&dev, 2 * i, 1);
        if (i < DM_REF_INLINE_RUNS)
            dev.refs[0].runs[i] = run;
        else if (i < 11)
            a->runs[i - DM_REF_INLINE_RUNS] = run;
        else
            b->runs[0] = run;
    }
    hold(&dev, 200, 1);
    hold(&dev, 201, 1);
    struct dm_audit *audit = audited(&dev);
    assert(audit->nr_violations == 0 && audit->overflow_frames == 2 && audit->ref_pages == 12);

    b->next = 200 + 1; /* a cycle */
    assert(audited(&dev)->nr_violations == 1);
    b->next = 5000; /* beyond nr_overflow: not even looked at */
    assert(audited(&dev)->nr_violations == 1);
    a->next = 5000;
    assert(audited(&dev)->nr_violations > 0);
    a->next = 201 + 1;
    b->next = 0;
    a->nr_runs = UINT32_MAX;
    assert(audited(&dev)->nr_violations > 0);
    dm_device_close(&dev);
}

/* One thing wrong at a time: exactly one violation, about that frame. */
static void expect_one(struct dm_device *dev, uint32_t pfn, const char *text) {
    struct dm_audit *audit = audited(dev);
    if (audit->nr_violations != 1 || audit->violations[0].pfn != pfn ||
        !strstr(audit->violations[0].text, text)) {
        printf("%llu violations, wanted one with '%s'; first: %s\n",
               (unsigned long long)audit->nr_violations, text, audit->violations[0].text);
        abort();
    }
}

static void audit_names_each_kind_of_damage(void) {
    struct dm_device dev = opened(4096);
    activate(&dev, 1);
    uint32_t *ptes = dm_device_ptes(&dev, 1);

    hold(&dev, 5, 1); /* nobody holds it */
    expect_one(&dev, 5, "leaked");
    ptes[5] = DM_PTE_PRESENT | 5;
    assert(audited(&dev)->nr_violations == 0);
    ptes[NR_FRAMES + 5] = DM_PTE_PRESENT | 5; /* a mapping without a count */
    expect_one(&dev, 5, "mappings and Refs hold 2");
    ptes[NR_FRAMES + 5] = 0;
    dev.frames[5] = dm_frame_pack(0, 1, 1); /* free and mapped */
    expect_one(&dev, 5, "refcount of frame 5 is 0");
    hold(&dev, 5, 1);

    dev.frames[6] = dm_frame_pack(0, 2, 0); /* host 2 is not attached */
    expect_one(&dev, 6, "not attached");
    dev.frames[6] = dm_frame_pack(0, 60000, 0);
    expect_one(&dev, 6, "cannot exist");
    dev.frames[6] = 0;

    ptes[9] = DM_PTE_PRESENT | NR_FRAMES;
    expect_one(&dev, DM_NO_FRAME, "does not exist");
    ptes[9] = DM_PTE_HOLE | DM_PTE_PRESENT;
    expect_one(&dev, DM_NO_FRAME, "no page-table entry");
    ptes[9] = 0x10000000u | DM_PTE_PRESENT | 5;
    expect_one(&dev, DM_NO_FRAME, "no page-table entry");
    ptes[9] = DM_PTE_HEAD;
    expect_one(&dev, DM_NO_FRAME, "no page-table entry");
    ptes[9] = 0;

    dev.refs[2] = (struct dm_ref_entry){.state = dm_ref_pack(DM_REF_LIVE, 0, 1, 1),
                                        .nr_pages = 2,
                                        .nr_runs = 1,
                                        .runs = {{NR_FRAMES - 1, 2}}};
    expect_one(&dev, DM_NO_FRAME, "Ref entry 2 covers frames");
    dev.refs[2].runs[0] = (struct dm_run){DM_NO_FRAME, 1};
    expect_one(&dev, DM_NO_FRAME, "it says 2");
    for (uint32_t i = 0; i < DM_REF_INLINE_RUNS; i++)
        dev.refs[2].runs[i] = (struct dm_run){DM_NO_FRAME, 1};
    dev.refs[2].nr_pages = DM_REF_INLINE_RUNS;
    dev.refs[2].nr_runs = DM_REF_INLINE_RUNS + 1; /* the last one is nowhere */
    expect_one(&dev, DM_NO_FRAME, "overflow frames end");
    dev.refs[2].state = dm_ref_pack(200, 0, 1, 1);
    expect_one(&dev, DM_NO_FRAME, "state 200 is none");
    dev.refs[2].state = 0;

    dev.hosts[1].state = 77;
    expect_one(&dev, DM_NO_FRAME, "state 77 is none");
    dev.hosts[1].state = DM_HOST_FREE;
    assert(audited(&dev)->nr_violations == 0);
    dm_device_close(&dev);
}

static void audit_bounds_its_list_but_not_its_count(void) {
    struct dm_device dev = opened(4096);
    for (uint32_t pfn = 0; pfn < NR_FRAMES; pfn++)
        hold(&dev, pfn, 1);
    struct dm_audit *audit = audited(&dev);
    assert(audit->nr_violations == NR_FRAMES && audit->in_use == NR_FRAMES);
    assert(audit->violations[DM_AUDIT_MAX_VIOLATIONS - 1].pfn == DM_AUDIT_MAX_VIOLATIONS - 1);
    dm_device_close(&dev);
}

static void audit_tells_of_operations_in_flight(void) {
    struct dm_device dev = opened(4096);
    activate(&dev, 1);
    dev.hosts[0].intent.op = DM_INTENT_ALLOC;
    dev.refs[1].state = dm_ref_pack(DM_REF_BUILDING, 0, 1, 1);
    dev.refs[1].nr_runs = 12345; /* half written: not looked at */
    struct dm_audit *audit = audited(&dev);
    assert(audit->in_flight == 2 && audit->live_refs == 0 && audit->nr_violations == 0);
    dm_device_close(&dev);
}

static void audit_allocates_nothing_in_the_device(uint32_t page_size) {
    struct dm_device dev = opened(page_size);
    activate(&dev, 1);
    hold(&dev, 100, 1); /* an overflow frame that nobody ever touched */
    dev.refs[0] = (struct dm_ref_entry){
        .state = dm_ref_pack(DM_REF_LIVE, 0, 1, 1), .overflow = 100, .nr_overflow = 1};
    const uint64_t before = allocated_bytes(dev.fd);
    audited(&dev);
    assert(allocated_bytes(dev.fd) == before);
    dm_device_close(&dev);
}

#define ONCE(test) (test(), printf("%s\n", #test))
#define PER_PAGE_SIZE(test)                                                                        \
    for (size_t i = 0; i < sizeof page_sizes / sizeof *page_sizes; i++)                            \
    (test(page_sizes[i]), printf("%s %u\n", #test, page_sizes[i]))

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    PER_PAGE_SIZE(areas_are_aligned_and_do_not_overlap);
    ONCE(impossible_geometry_is_refused);
    ONCE(largest_geometry_does_not_overflow);
    PER_PAGE_SIZE(format_allocates_the_tables_and_nothing_else);
    PER_PAGE_SIZE(format_erases_what_tables_held_and_keeps_the_data);
    ONCE(format_refuses_a_file_of_another_size);
    ONCE(format_refuses_what_is_not_a_file);
    ONCE(format_refuses_names_that_do_not_fit);
    PER_PAGE_SIZE(any_flipped_bit_of_the_checked_part_is_refused);
    PER_PAGE_SIZE(wrong_geometry_is_refused_by_the_name_of_its_field);
    PER_PAGE_SIZE(file_of_another_size_is_refused);
    ONCE(closed_descriptor_is_a_system_error);
    ONCE(closing_twice_does_nothing);
    ONCE(read_only_device_refuses_every_change);
    PER_PAGE_SIZE(transfer_stops_at_the_first_frame_that_is_not_the_givers);
    ONCE(frames_beyond_the_device_are_refused);
    ONCE(free_runs_continue_where_the_last_call_stopped);
    PER_PAGE_SIZE(prefault_allocates_and_keeps_contents);
    ONCE(each_frame_is_won_by_exactly_one_of_racing_takers);
    ONCE(every_start_of_a_coordinator_gets_a_new_epoch);
    PER_PAGE_SIZE(activation_allocates_the_whole_page_table);
    PER_PAGE_SIZE(activation_leaves_nothing_of_the_last_host);
    ONCE(entry_that_is_not_free_is_not_activated);
    ONCE(state_changes_only_from_the_expected_one);
    PER_PAGE_SIZE(audit_accepts_a_fabric_whose_counts_add_up);
    PER_PAGE_SIZE(audit_counts_overflow_frames_and_what_they_list);
    ONCE(audit_names_each_kind_of_damage);
    ONCE(audit_bounds_its_list_but_not_its_count);
    ONCE(audit_tells_of_operations_in_flight);
    PER_PAGE_SIZE(audit_allocates_nothing_in_the_device);
    return 0;
}
