/*
 * test_kill_race.c - hosts die by SIGKILL, each at any moment, while the others go on.
 *
 * Hosts are processes that fight over the same Refs (traffic.h). This process is the coordinator: again and again it kills
 * one of them, or has it kill itself behind a store to the device's tables, recovers it while the others go on, counts, and
 * starts another in its place. Some recoveries are killed as well, and done again. Expect, each time when all stand
 * still for a moment:
 *     - at most one frame with one count too many for each process that was killed, and no other violation;
 *     - no survivor has stopped: each looks at its pages all the time, and ends when one has changed.
 *
 * test_recover.c stops at every store of every operation, but of one host in situations made for it; here situations and
 * moments are random, and recovery runs beside living hosts.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "recover.h"
#include "stores.h"
#include "traffic.h"

#define NR_HOSTS 3u
#define NR_FRAMES 300u
#define NR_REFS 40u

static struct dm_device dev;
static struct dm_error err;
static struct rng rng;
static bool has_uffd;

static struct { /* in memory of all processes; every word is atomic */
    struct traffic traffic;
    uint32_t stand_still;
    uint32_t stands_still[NR_HOSTS + 1];
    uint64_t nr_steps[NR_HOSTS + 1];
    uint32_t dies_at[NR_HOSTS + 1]; /* store, counted from the moment that it is set; 0: lives on */
} *shared;

static pid_t pids[NR_HOSTS + 1];
static uint64_t nr_leaks, nr_recoveries_killed, nr_intents[DM_INTENT_HOME + 1];

static uint64_t load(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static uint32_t load32(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static void store32(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* ---------------------------------------------------------------- a host */

static void die_in_time(void *stores_left) {
    if (--*(uint32_t *)stores_left == 0)
        kill(getpid(), SIGKILL);
}

/* Kill this process behind the nr-th store to the tables from now on. */
static void die_behind(uint32_t nr) {
    static uint32_t left;
    left = nr;
    size_t tables = dev.geo.page_table_off + NR_HOSTS * dev.geo.ptes_per_host * sizeof(uint32_t);
    stores_watch(dev.base, tables, die_in_time, &left);
}

static void look_for_granted_frames(struct dm_host *h) {
    dm_lock(h);
    dm_rescan_owned(h);
    dm_unlock(h);
}

__attribute__((noreturn)) static void live(uint16_t id, uint64_t seed) {
    static struct player me;
    me = (struct player){by_hand_host(&dev, id), &shared->traffic, {seed}, has_uffd, {{0}}};
    for (uint32_t n = 0, dying = 0;; n++) {
        if (n % 64 == 0)
            look_for_granted_frames(me.h);
        if (n % 16 == 0)
            sched_yield();
        if (!dying && (dying = load32(&shared->dies_at[id])))
            die_behind(dying);
        if (load32(&shared->stand_still)) {
            store32(&shared->stands_still[id], 1);
            while (load32(&shared->stand_still))
                sched_yield();
            store32(&shared->stands_still[id], 0);
        }
        traffic_step(&me);
        __atomic_fetch_add(&shared->nr_steps[id], 1, __ATOMIC_RELEASE);
    }
}

static void start(uint16_t id) {
    uint64_t seed = rng_next(&rng);
    by_hand_activate(&dev, id);
    store32(&shared->stands_still[id], 0);
    store32(&shared->dies_at[id], 0);
    fflush(NULL);
    pids[id] = fork();
    EXPECT(pids[id] >= 0);
    if (pids[id] == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* a failure leaves nobody behind */
        live(id, seed);
    }
}

static void expect_alive(uint16_t id) {
    int status;
    if (waitpid(pids[id], &status, WNOHANG) == pids[id])
        FAIL("expected: host %u lives, but it ended with status %#x", id, status);
}

static void expect_killed(pid_t pid) {
    int status;
    EXPECT(waitpid(pid, &status, 0) == pid);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        FAIL("expected: a process that ends by SIGKILL, but its status is %#x", status);
}

/* ---------------------------------------------------------------- the coordinator */

static void spin(uint32_t most_ns) {
    uint64_t until = dm_now_ns() + rng_below(&rng, most_ns);
    while (dm_now_ns() < until)
        ;
}

static void kill_at_any_moment(uint16_t id) {
    uint64_t until = load(&shared->nr_steps[id]) + rng_below(&rng, 300);
    bool changed;
    while (load(&shared->nr_steps[id]) < until) {
        expect_alive(id);
        sched_yield();
    }
    if (stores_can_be_watched() && rng_below(&rng, 4)) {
        store32(&shared->dies_at[id], 1 + rng_below(&rng, 60));
    } else {
        spin(20000);
        kill(pids[id], SIGKILL);
    }
    expect_killed(pids[id]);
    EXPECT_OK(dm_device_set_host_state(&dev, id, DM_HOST_ACTIVE, DM_HOST_DEAD, &changed, &err),
              &err);
    EXPECT(changed);
}

/* Let another process recover the host, and kill it in the midst of it. False: it came to the end before. */
static bool recover_halfway(uint16_t id) {
    uint32_t at = 1 + rng_below(&rng, 120);
    fflush(NULL);
    pid_t pid = fork();
    EXPECT(pid >= 0);
    if (pid == 0) {
        struct dm_recovery report;
        die_behind(at);
        EXPECT_OK(dm_recover_host(&dev, id, &report, &err), &err);
        _exit(0);
    }
    int status;
    EXPECT(waitpid(pid, &status, 0) == pid);
    EXPECT(status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
    return status != 0;
}

static void let_all_stand_still(uint16_t but) {
    store32(&shared->stand_still, 1);
    for (uint16_t id = 1; id <= NR_HOSTS; id++)
        while (id != but && !load32(&shared->stands_still[id])) {
            expect_alive(id);
            sched_yield();
        }
}

/* Count, and set right what a scrubber would. */
static void expect_leaks_at_most(uint32_t most) {
    const struct dm_audit *audit = by_hand_audit(&dev);
    uint32_t leaks = 0;
    EXPECT(audit->nr_violations <= DM_AUDIT_MAX_VIOLATIONS);
    for (uint64_t i = 0; i < audit->nr_violations; i++) {
        const struct dm_violation *v = &audit->violations[i];
        unsigned pfn, refcount, holders;
        if (sscanf(v->text, "refcount of frame %u is %u, but mappings and Refs hold %u", &pfn,
                   &refcount, &holders) != 3 ||
            refcount < holders)
            FAIL("expected: counts may be too many, nothing else, but: %s", v->text);
        leaks += refcount - holders;
        uint64_t word = dev.frames[pfn];
        uint16_t owner = holders ? dm_frame_owner(word) : DM_OWNER_POOL;
        dev.frames[pfn] = dm_frame_pack(holders, owner, dm_frame_seq(word));
    }
    if (leaks > most)
        FAIL("expected: at most %u frames leaked, but %u: %s", most, leaks,
             audit->violations[0].text);
    EXPECT_EQ(audit->in_flight, 0);
    nr_leaks += leaks;
}

/* Hand out what the pool has: the hosts find it by looking at the words. */
static void grant_the_pool(void) {
    struct dm_run run;
    for (uint64_t cursor = 0, moved;
         dm_device_free_runs(&dev, DM_OWNER_POOL, &cursor, &run, 1) == 1;) {
        uint32_t to = 1 + rng_below(&rng, NR_HOSTS);
        EXPECT_OK(dm_device_transfer(&dev, run.pfn, run.count, DM_OWNER_POOL, to, &moved, &err),
                  &err);
    }
}

static void one_death(uint16_t id) {
    struct dm_recovery report;
    bool changed;
    uint32_t killed = 1;
    kill_at_any_moment(id);
    nr_intents[dev.hosts[id - 1].intent.op]++;
    for (uint32_t n = stores_can_be_watched() ? rng_below(&rng, 3) : 0; n; n--)
        killed += recover_halfway(id);
    EXPECT_OK(dm_recover_host(&dev, id, &report, &err), &err);
    EXPECT_EQ(report.refs_damaged, 0);
    nr_recoveries_killed += killed - 1;
    let_all_stand_still(id);
    EXPECT_OK(dm_device_set_host_state(&dev, id, DM_HOST_DEAD, DM_HOST_FREE, &changed, &err), &err);
    expect_leaks_at_most(killed);
    start(id);
    grant_the_pool();
    store32(&shared->stand_still, 0);
}

static void hosts_survive_the_death_of_others(void) {
    uint32_t nr_deaths = check_slow() ? 10000 : CHECK_ASAN ? 60 : 300;
    for (uint16_t id = 1; id <= NR_HOSTS; id++)
        start(id);
    grant_the_pool();
    for (uint32_t n = 0; n < nr_deaths; n++) {
        snprintf(check_doing, sizeof check_doing, "death %u", n);
        one_death((uint16_t)(1 + rng_below(&rng, NR_HOSTS)));
    }
    for (uint16_t id = 1; id <= NR_HOSTS; id++) {
        expect_alive(id);
        kill(pids[id], SIGKILL);
        expect_killed(pids[id]);
    }
    check_doing[0] = 0;
    const uint64_t *won = shared->traffic.nr_won;
    printf("made %llu, accepted %llu, cloned %llu, dropped %llu, mapped %llu, in vain %llu\n",
           (unsigned long long)won[TRAFFIC_MAKE], (unsigned long long)won[TRAFFIC_ACCEPT],
           (unsigned long long)won[TRAFFIC_CLONE], (unsigned long long)won[TRAFFIC_DROP],
           (unsigned long long)won[TRAFFIC_MAP], (unsigned long long)shared->traffic.nr_lost);
    printf("%u deaths, %llu interrupted recoveries, %llu frames leaked; intents at death:",
           nr_deaths, (unsigned long long)nr_recoveries_killed, (unsigned long long)nr_leaks);
    for (int op = 0; op <= DM_INTENT_HOME; op++)
        printf(" %llu", (unsigned long long)nr_intents[op]);
    printf("\n");
}

int main(void) {
    const char *why;
    if (CHECK_TSAN) {
        printf("processes share nothing that this sanitizer sees\n");
        return 77;
    }
    has_uffd = by_hand_has_uffd(&why);
    if (!has_uffd)
        printf("without create_ref that shares and without copy-on-write: %s\n", why);
    rng = rng_start();
    by_hand_device(&dev, NR_FRAMES, NR_HOSTS, NR_REFS);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    EXPECT(shared != MAP_FAILED);
    HOLDS(hosts_survive_the_death_of_others);
    dm_device_close(&dev);
    return 0;
}
