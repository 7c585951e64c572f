/*
 * crash_points.c - the operations of the DM layer, over and over, for crash_points.py: built with crash points and without.
 *
 * For each line that it reads it does a block of each operation, and prints what each took, in nanoseconds of CPU time. Needs no
 * coordinator: the device is in memory (tests/c/by_hand.h). Those operations are measured that pass most points, and make no
 * system calls, which would hide them.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <string.h>
#include <time.h>

#include "by_hand.h"
#include "check.h"

#define PAGES 256u
#define FRAMES (4 * PAGES)

static struct dm_device dev;
static struct dm_host *h;
static struct dm_error err;

static uint64_t cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ralloc, create_ref(move), map_ref, rfree of nr pages. */
static void circulate(uint32_t nr) {
    struct dm_ref_wire w;
    uint32_t id;
    EXPECT_OK(dm_ralloc(h, (uint64_t)nr * BY_HAND_PAGE, 0, false, &id, &err), &err);
    EXPECT_OK(dm_move_ref(h, id, false, &w, &err), &err);
    EXPECT_OK(dm_map_ref(h, &w, 0, false, &id, &err), &err);
    EXPECT_OK(dm_rfree(h, id, &err), &err);
}

static struct dm_ref_wire kept;

/* clone and drop: a count up and a count down for each page, with progress. */
static void clone_and_drop(uint32_t nr) {
    struct dm_ref_wire w;
    (void)nr;
    EXPECT_OK(dm_ref_clone(h, &kept, false, &w, &err), &err);
    EXPECT_OK(dm_ref_drop(h, &w, &err), &err);
}

static const struct {
    const char *name;
    void (*operate)(uint32_t nr);
    uint32_t nr, times;
} operations[] = {
    {"circulate 1 page", circulate, 1, 4000},
    {"circulate 8 pages", circulate, 8, 3000},
    {"circulate 256 pages", circulate, PAGES, 400},
    {"clone and drop 256 pages", clone_and_drop, PAGES, 100},
};
#define NR_OPERATIONS (sizeof operations / sizeof operations[0])

int main(void) {
    char line[16];
    uint32_t id;
    by_hand_device(&dev, FRAMES, 1, 64);
    by_hand_activate(&dev, 1);
    h = by_hand_host(&dev, 1);
    dm_lock(h);
    by_hand_grant(h, 0, FRAMES);
    EXPECT_OK(dm_ralloc(h, PAGES * BY_HAND_PAGE, 0, false, &id, &err), &err);
    EXPECT_OK(dm_move_ref(h, id, false, &kept, &err), &err);
    while (fgets(line, sizeof line, stdin)) {
        for (unsigned i = 0; i < NR_OPERATIONS; i++) {
            uint64_t begin = cpu_ns();
            for (uint32_t n = 0; n < operations[i].times; n++)
                operations[i].operate(operations[i].nr);
            printf("%s%s=%.1f", i ? "," : "", operations[i].name,
                   (double)(cpu_ns() - begin) / operations[i].times);
        }
        printf("\n");
        fflush(stdout);
    }
    return 0;
}
