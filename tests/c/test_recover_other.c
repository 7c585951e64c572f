/*
 * test_recover_other.c - what a host does is right although another host dies and is recovered in the midst of it.
 *
 * The situations are those of test_recover.c. Here `other` dies, and is recovered at once, behind the first store of h's
 * operation to the device's tables, behind the second, and so on (stores.h). Then h goes on to the end. Expect:
 *     - the operation ends as it would have, or it says that the Ref it wanted is gone, or it finds room that the dead
 *       host has left;
 *     - the audit is exact, with nothing in flight;
 *     - once h has died as well and is recovered, all frames are the pool's.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <string.h>
#include <sys/wait.h>

#include "by_hand.h"
#include "check.h"
#include "recover.h"
#include "scenes.h"
#include "stores.h"

static struct dm_error err;
static struct dm_device dev;
static struct rng rng;
static char *before; /* nothing held by anybody */

struct dying {
    uint32_t at, nr_stores;
    struct scene scene;
};

static size_t tables_bytes(void) {
    return dev.geo.page_table_off + 2 * dev.geo.ptes_per_host * sizeof(uint32_t);
}

static void bury(uint32_t host) {
    struct dm_recovery report;
    bool changed;
    EXPECT_OK(dm_device_set_host_state(&dev, host, DM_HOST_ACTIVE, DM_HOST_DEAD, &changed, &err),
              &err);
    EXPECT(changed);
    EXPECT_OK(dm_recover_host(&dev, host, &report, &err), &err);
    EXPECT_EQ(report.refs_damaged, 0);
    EXPECT_OK(dm_device_set_host_state(&dev, host, DM_HOST_DEAD, DM_HOST_FREE, &changed, &err),
              &err);
}

static void die_in_time(void *arg) {
    struct dying *d = arg;
    if (d->nr_stores++ != d->at)
        return;
    stores_unwatch();
    bury(SCENE_OTHER);
}

/* In a child, for the operation leaves things behind in its process. Exits with 1 if there were fewer stores. */
__attribute__((noreturn)) static void operate(const struct scenario *what, uint32_t at) {
    struct dying d = {.at = at};
    scene_prepare(&d.scene, &dev, what);
    stores_watch(dev.base, tables_bytes(), die_in_time, &d);
    int status = what->operate(&d.scene);
    bool in_time = d.nr_stores > at;
    if (!in_time) {
        stores_unwatch();
        bury(SCENE_OTHER);
    }
    if (status != what->status && status != DM_OK)
        EXPECT_EQ(status, DM_ERR_REF_CONSUMED);
    if (d.scene.crowded != DM_NO_FRAME)
        dev.frames[d.scene.crowded] -= d.scene.crowd;
    by_hand_exact(&dev);
    bury(SCENE_DEAD);
    const struct dm_audit *audit = by_hand_exact(&dev);
    EXPECT_EQ(audit->pool, SCENE_FRAMES);
    _exit(in_time ? 0 : 77);
}

/* Returns how many stores there are to die behind, or a few more. */
static uint32_t try_all(const struct scenario *what) {
    for (uint32_t at = 0;; at += what->flags & SCENE_LONG ? 1 + rng_below(&rng, 16) : 1) {
        snprintf(check_doing, sizeof check_doing, "%s, other dies behind store %u", what->name,
                 at + 1);
        memcpy(dev.base, before, tables_bytes());
        fflush(NULL);
        pid_t pid = fork();
        EXPECT(pid >= 0);
        if (pid == 0)
            operate(what, at);
        int status;
        EXPECT(waitpid(pid, &status, 0) == pid);
        if (status != 0 && (!WIFEXITED(status) || WEXITSTATUS(status) != 77))
            FAIL("expected: status 0, but %#x", status);
        if (status != 0)
            return at;
    }
}

int main(void) {
    const char *why;
    if (!stores_can_be_watched()) {
        printf("a program can stop itself at every store on x86-64 only\n");
        return 77;
    }
    if (CHECK_TSAN) {
        printf(
            "only one thread at a time stores to the device: nothing to see for this sanitizer\n");
        return 77;
    }
    bool has_uffd = by_hand_has_uffd(&why);
    rng = rng_start();
    scene_device(&dev);
    before = malloc(tables_bytes());
    EXPECT(before);
    memcpy(before, dev.base, tables_bytes());
    for (unsigned i = 0; i < nr_scenarios; i++) {
        const struct scenario *what = &scenarios[i];
        if ((what->flags & SCENE_UFFD && !has_uffd) || what->meanwhile)
            continue;
        if (CHECK_ASAN && what->flags & SCENE_LONG)
            continue; /* a fork takes ten times as long */
        uint32_t nr_stores = try_all(what);
        printf("%s: other died behind %s %u stores\n", what->name,
               what->flags & SCENE_LONG ? "some of" : "each of", nr_stores);
    }
    free(before);
    dm_device_close(&dev);
    if (has_uffd)
        return 0;
    printf("what needs no userfaultfd holds; the rest was not tried: %s\n", why);
    return 77;
}
