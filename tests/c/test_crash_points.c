/*
 * test_crash_points.c - behind every step that others can see there is a label.
 *
 * Each operation of scenes.c is done by a forked child that stops at each of its stores to the device's tables (stores.h),
 * and so is each recovery, and what the coordinator writes by itself. Expect: whenever a store has changed what others go
 * by (crash.h says what that is), a crash point is passed before the next such store. So tests/crash, which kills at every
 * label, meets every state that a death can leave.
 *
 * And which labels were passed: all of those of the DM layer but the few that scenes have no occasion for.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "by_hand.h"
#include "check.h"
#include "crash.h"
#include "recover.h"
#include "scenes.h"
#include "scrub.h"
#include "stores.h"

static struct dm_device dev;
static struct dm_error err;
static char *before;
static struct dm_crash_record *record; /* of all processes */

/* What others go by. */
struct essence {
    uint64_t frames[SCENE_FRAMES];
    uint64_t refs[SCENE_REFS];
    uint32_t chains[SCENE_REFS];
    struct {
        uint32_t state, op;
        uint64_t progress, dropping;
    } hosts[2];
    uint32_t services[8];
    uint64_t epoch;
    uint32_t pid;
    uint32_t ptes[2 * 4096];
};

static struct {
    struct essence then, now;
    uint64_t passes;
    bool unlabelled;
    int last; /* label that was passed last */
    uint64_t seen[DM_CRASH_SLOTS];
} watch;

static void look(struct essence *e) {
    memcpy(e->frames, dev.frames, sizeof e->frames);
    for (uint32_t i = 0; i < SCENE_REFS; i++) {
        e->refs[i] = dev.refs[i].state;
        e->chains[i] = dev.refs[i].overflow;
    }
    for (uint32_t i = 0; i < 2; i++) {
        const struct dm_host_entry *entry = &dev.hosts[i];
        e->hosts[i].state = entry->state;
        e->hosts[i].op = entry->intent.op;
        e->hosts[i].progress = entry->intent.op ? entry->intent.progress : 0;
        e->hosts[i].dropping = entry->dropping;
        memcpy(e->ptes + 4096 * i, dm_device_ptes(&dev, i + 1),
               dev.geo.ptes_per_host * sizeof e->ptes[0]);
    }
    for (uint32_t i = 0; i < 8; i++)
        e->services[i] = dev.services[i].state;
    e->epoch = dev.sb->coordinator_epoch;
    e->pid = dev.sb->coordinator_pid;
}

/* Was a label passed since the last time? */
static bool labelled(void) {
    uint64_t passes = 0;
    for (int i = 1; i < DM_CRASH_NR; i++) {
        passes += record->passes[i];
        if (record->passes[i] != watch.seen[i])
            watch.last = i;
        watch.seen[i] = record->passes[i];
    }
    bool some = passes != watch.passes;
    watch.passes = passes;
    return some;
}

static const char *last_label(void) {
    return watch.last ? dm_crash_labels[watch.last].name : "no label";
}

static void expect_a_label(void) {
    if (watch.unlabelled)
        FAIL("expected: a label between the store before this one and it; the last was %s",
             last_label());
}

static void after_store(void *arg) {
    (void)arg;
    if (labelled())
        watch.unlabelled = false;
    look(&watch.now);
    if (!memcmp(&watch.now, &watch.then, sizeof watch.now))
        return;
    expect_a_label();
    watch.unlabelled = true;
    watch.then = watch.now;
}

static size_t tables_bytes(void) {
    return dev.geo.page_table_off + 2 * dev.geo.ptes_per_host * sizeof(uint32_t);
}

static void begin_watching(void) {
    look(&watch.then);
    (void)labelled();
    watch.unlabelled = false;
    stores_watch(dev.base, tables_bytes(), after_store, NULL);
}

static void end_watching(void) {
    stores_unwatch();
    if (labelled())
        watch.unlabelled = false;
    expect_a_label();
}

/* ---------------------------------------------------------------- what is watched */

static void operate(const struct scenario *what) {
    struct scene s;
    scene_prepare(&s, &dev, what);
    begin_watching();
    int status = what->operate(&s);
    end_watching();
    EXPECT_EQ(status, what->status);
}

/* The same, stopped in the midst of it, and what recovery makes of it. */
static uint32_t nr_stores, dies_at;

static void stop_in_time(void *arg) {
    (void)arg;
    if (++nr_stores == dies_at)
        kill(getpid(), SIGKILL);
}

static void operate_and_die(const struct scenario *what) {
    struct scene s;
    scene_prepare(&s, &dev, what);
    nr_stores = 0;
    stores_watch(dev.base, tables_bytes(), stop_in_time, NULL);
    (void)what->operate(&s);
    stores_unwatch();
}

static void recover(void) {
    struct dm_recovery report;
    bool changed;
    begin_watching();
    EXPECT_OK(
        dm_device_set_host_state(&dev, SCENE_DEAD, DM_HOST_ACTIVE, DM_HOST_DEAD, &changed, &err),
        &err);
    EXPECT_OK(dm_recover_host(&dev, SCENE_DEAD, &report, &err), &err);
    EXPECT_OK(
        dm_device_set_host_state(&dev, SCENE_DEAD, DM_HOST_DEAD, DM_HOST_FREE, &changed, &err),
        &err);
    end_watching();
}

/* Run in a child: true when it came to its end, false when it was killed. */
static bool in_child(void (*what)(const struct scenario *), const struct scenario *arg) {
    memcpy(dev.base, before, tables_bytes());
    fflush(NULL);
    pid_t pid = fork();
    EXPECT(pid >= 0);
    if (pid == 0) {
        what(arg);
        _exit(0);
    }
    int status;
    EXPECT(waitpid(pid, &status, 0) == pid);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
        return false;
    EXPECT_EQ(status, 0);
    return true;
}

static void every_step_of_an_operation_has_its_label(void) {
    const char *why;
    bool has_uffd = by_hand_has_uffd(&why);
    for (unsigned i = 0; i < nr_scenarios; i++) {
        if (scenarios[i].flags & SCENE_UFFD && !has_uffd)
            continue;
        snprintf(check_doing, sizeof check_doing, "%s", scenarios[i].name);
        EXPECT(in_child(operate, &scenarios[i]));
    }
    check_doing[0] = 0;
}

static void every_step_of_a_recovery_has_its_label(void) {
    const char *why;
    bool has_uffd = by_hand_has_uffd(&why);
    struct rng rng = rng_start();
    for (unsigned i = 0; i < nr_scenarios; i++) {
        const struct scenario *what = &scenarios[i];
        if (what->flags & SCENE_UFFD && !has_uffd)
            continue;
        /* Labels that a few steps alone lead to are not left to chance. */
        bool each = strstr(what->name, "received") || strstr(what->name, "home");
        bool killed = true;
        for (dies_at = 1; killed && dies_at < 400; dies_at += each ? 1 : 1 + rng_below(&rng, 24)) {
            snprintf(check_doing, sizeof check_doing, "%s, killed behind store %u", what->name,
                     dies_at);
            killed = !in_child(operate_and_die, what);
            recover();
        }
    }
    check_doing[0] = 0;
}

/* Home dies as soon as the first word says that its frame is coming. */
static void lose_home(void *arg) {
    (void)arg;
    for (uint32_t pfn = 0; pfn < SCENE_FRAMES; pfn++)
        if (dm_frame_coming(dev.frames[pfn])) {
            stores_unwatch();
            dev.hosts[SCENE_OTHER - 1].state = DM_HOST_DEAD;
            return;
        }
}

static void operate_without_home(const struct scenario *what) {
    struct scene s;
    scene_prepare(&s, &dev, what);
    stores_watch(dev.base, tables_bytes(), lose_home, NULL);
    EXPECT_EQ(what->operate(&s), what->status);
    EXPECT_EQ(dev.hosts[SCENE_OTHER - 1].state, DM_HOST_DEAD);
}

static void frames_are_taken_back_when_home_dies(void) {
    uint64_t back = record->passes[DM_CRASH_home_taken_back];
    for (unsigned i = 0; i < nr_scenarios; i++)
        if (!strcmp(scenarios[i].name, "rfree, exclusive, received"))
            EXPECT(in_child(operate_without_home, &scenarios[i]));
    EXPECT(record->passes[DM_CRASH_home_taken_back] > back);
}

/* Home dies, and at once the host that was handing over. */
static void lose_both(void *arg) {
    lose_home(arg);
    if (dev.hosts[SCENE_OTHER - 1].state == DM_HOST_DEAD)
        kill(getpid(), SIGKILL);
}

static void operate_until_both_die(const struct scenario *what) {
    struct scene s;
    scene_prepare(&s, &dev, what);
    stores_watch(dev.base, tables_bytes(), lose_both, NULL);
    (void)what->operate(&s);
}

/* recover() wants a label behind each store. */
static void recovery_takes_back_what_was_sent_to_a_home_that_is_dead(void) {
    for (unsigned i = 0; i < nr_scenarios; i++)
        if (!strcmp(scenarios[i].name, "rfree, exclusive, received")) {
            EXPECT(!in_child(operate_until_both_die, &scenarios[i]));
            EXPECT_EQ(dev.hosts[SCENE_DEAD - 1].intent.op, DM_INTENT_HOME);
            recover();
            for (uint32_t pfn = 0; pfn < SCENE_FRAMES; pfn++)
                EXPECT(!dm_frame_coming(dev.frames[pfn]));
        }
}

static void every_step_of_a_service_has_its_label(void) {
    struct dm_service what = {
        .host = SCENE_OTHER, .incarnation = 7, .name_bytes = 4, .endpoint_bytes = 900};
    memcpy(dev.base, before, tables_bytes());
    memset(what.text, 'x', 904);
    begin_watching();
    int slot = dm_device_publish(&dev, &what, &err);
    EXPECT(slot >= 0);
    EXPECT_OK(dm_device_withdraw(&dev, (uint32_t)slot, dev.services[slot].serial, &err), &err);
    end_watching();
}

static void every_step_of_a_coordinator_has_its_label(void) {
    struct dm_coordinator who = {.pid = 4711, .start_time = 1};
    struct dm_host_identity host = {.pid = 1, .incarnation = 99, .name = "comes"};
    uint64_t moved;
    bool changed;
    memcpy(dev.base, before, tables_bytes());
    dm_device_ptes(&dev, SCENE_OTHER)[5] = DM_PTE_HOLE; /* what an earlier host left there */
    EXPECT_OK(
        dm_device_set_host_state(&dev, SCENE_OTHER, DM_HOST_ACTIVE, DM_HOST_FREE, &changed, &err),
        &err);
    begin_watching();
    EXPECT_OK(dm_device_start_coordinator(&dev, &who, &err), &err);
    EXPECT_OK(dm_device_activate_host(&dev, SCENE_OTHER, &host, &err), &err);
    EXPECT_OK(dm_device_transfer(&dev, 5, 7, DM_OWNER_POOL, SCENE_OTHER, &moved, &err), &err);
    EXPECT_EQ(moved, 7);
    EXPECT(dm_device_stop_coordinator(&dev, who.epoch));
    end_watching();
}

/* Leaked counts, free frames of a host that is not attached, Refs that nobody holds. */
static void damage(void) {
    for (uint32_t pfn = 40; pfn < 44; pfn++)
        dev.frames[pfn] = dm_frame_pack(1, SCENE_OTHER, 3);
    dev.frames[50] = dm_frame_pack(0, SCENE_DEAD, 3);
    for (uint32_t i = 0; i < 2; i++) {
        struct dm_ref_entry *entry = &dev.refs[3 + i];
        entry->nr_pages = entry->nr_runs = 1;
        entry->runs[0] = (struct dm_run){40 + i, 1};
        entry->overflow = i ? 45 : 0;
        entry->nr_overflow = i;
        entry->state = dm_ref_pack(DM_REF_LIVE, 0, SCENE_DEAD, 9);
    }
}

static void settle(struct dm_scrub *scrub) {
    bool done, quiet;
    for (int looks = 0; looks < 2; looks++)
        do
            EXPECT_OK(dm_scrub_step(scrub, 1000000, &done, &err), &err);
        while (!done);
    EXPECT_OK(dm_scrub_settle(scrub, &dev, 2, true, &quiet, &err), &err);
    EXPECT(quiet);
}

static void every_step_of_a_repair_has_its_label(void) {
    struct dm_scrub *scrub;
    bool changed;
    memcpy(dev.base, before, tables_bytes());
    EXPECT_OK(
        dm_device_set_host_state(&dev, SCENE_DEAD, DM_HOST_ACTIVE, DM_HOST_FREE, &changed, &err),
        &err);
    damage();
    EXPECT(by_hand_audit(&dev)->nr_violations > 0);
    EXPECT_OK(dm_scrub_new(&dev, &scrub, &err), &err);
    begin_watching();
    settle(scrub);
    end_watching();
    dm_scrub_free(scrub);
    by_hand_exact(&dev);
    damage();
    begin_watching();
    EXPECT_EQ(dm_scrub_forget_refs(&dev), 2);
    end_watching();
}

/* ---------------------------------------------------------------- which labels */

/* The rest of the list, which is only passed with a coordinator, a kernel that serves faults, or a peer. */
static bool needs_more_than_a_scene(const char *label) {
    static const char *const elsewhere[] = {
        "scatter_",        "grant_",         "attach_",     "detach_",        "ring_",
        "relay_",          "value_",         "call_",       "reply_",         "method_returned",
        "published",       "withdrawn",      "restored",    "host_declared",  "host_reclaimed",
        "guard_kept",      "return_told",    "register_",   "return_counted", "host_forgotten",
        "refs_taken_back", "listener_bound", "welcome_sent"};
    for (unsigned i = 0; i < sizeof elsewhere / sizeof elsewhere[0]; i++)
        if (!strncmp(label, elsewhere[i], strlen(elsewhere[i])))
            return true;
    return false;
}

static void every_label_of_the_dm_layer_was_passed(void) {
    for (int i = 1; i < DM_CRASH_NR; i++)
        if (!record->passes[i] && !needs_more_than_a_scene(dm_crash_labels[i].name))
            FAIL("expected: some operation passes %s", dm_crash_labels[i].name);
}

int main(void) {
    const char *why = NULL;
    char path[64];
    if (!stores_can_be_watched() || CHECK_TSAN) {
        printf("a program can stop itself at every store on x86-64 only, and not for this "
               "sanitizer\n");
        return 77;
    }
    int fd = memfd_create("dmrpc-test-record", MFD_CLOEXEC);
    EXPECT(fd >= 0 && !ftruncate(fd, DM_CRASH_RECORD_BYTES));
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    record = mmap(NULL, sizeof *record, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    EXPECT(record != MAP_FAILED);
    EXPECT_EQ(dm_crash_arm(DM_CRASH_none, 0, path), 0);
    scene_device(&dev);
    EXPECT(dev.geo.ptes_per_host <= 4096 && dev.geo.nr_services >= 8);
    before = malloc(tables_bytes());
    EXPECT(before);
    memcpy(before, dev.base, tables_bytes());
    HOLDS(every_step_of_an_operation_has_its_label);
    HOLDS(every_step_of_a_recovery_has_its_label);
    HOLDS(frames_are_taken_back_when_home_dies);
    HOLDS(recovery_takes_back_what_was_sent_to_a_home_that_is_dead);
    HOLDS(every_step_of_a_service_has_its_label);
    HOLDS(every_step_of_a_coordinator_has_its_label);
    HOLDS(every_step_of_a_repair_has_its_label);
    if (by_hand_has_uffd(&why))
        HOLDS(every_label_of_the_dm_layer_was_passed);
    free(before);
    dm_device_close(&dev);
    return 0;
}
