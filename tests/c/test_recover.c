/*
 * test_recover.c - any process may die at any instruction.
 *
 * Each operation is done by a forked child on a device in memory, and the child is killed with SIGKILL behind its first store
 * to the device, behind its second, and so on to the last (stores.h): so every state that a death can leave is met.
 * Then dm_recover_host does its work, and Expect:
 *     - the audit finds nothing but at most one frame with one count too many (leaked), never one with too few;
 *     - nothing is left of the dead host: no mapping, no Ref, no free frame, no intent;
 *     - the mappings, the Refs and the bytes of the other host are what they were.
 *
 * The coordinator that recovers may die as well. Recovery is therefore stopped behind each of its own stores, too, and done
 * again on a copy of the device: within one more leaked frame the same must hold. Between the two the surviving host
 * takes every frame that the pool has into use, as a new coordinator would let it.
 *
 * And a survivor does not wait: in a third run it takes what comes into the pool, and accepts Refs of the dead host, behind
 * each store of a recovery under way.
 *
 * With DM_TEST_SLOW=1 long operations are stopped at all of their stores as well, instead of at a sample.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "by_hand.h"
#include "check.h"
#include "recover.h"
#include "scenes.h"
#include "stores.h"

#define ALL_STORES_UP_TO 250u /* a longer operation: dense at both ends, sampled between */
#define DENSE 80u
#define ALL_INTERRUPTIONS_UP_TO (CHECK_ASAN ? 25u : 120u)
#define AT_THE_END UINT32_MAX

static struct dm_error err;
static struct rng rng;
static struct dm_device dev, copy; /* what a child works on; where recovery is tried again */
static char *before, *crashed;     /* images: nothing held by anybody; as the death left it */

/* What the survivor holds, and who must have what when the dead host is gone. */
struct held {
    uint32_t *ptes;
    struct dm_ref_entry refs[SCENE_REFS];
    bool keeps[SCENE_REFS];
    uint64_t hash[SCENE_FRAMES]; /* of the bytes of a frame that it holds; 0: not one of these */
    uint32_t crowded, crowd;
};

/* Written by the child, in memory of both. */
static struct {
    struct held held;
    uint32_t nr_stores;
    bool done;
} *note;

/* ---------------------------------------------------------------- images of a device */

static size_t tables_bytes(void) {
    return dev.geo.page_table_off + 2 * dev.geo.ptes_per_host * sizeof(uint32_t);
}
static size_t data_bytes(void) { return (size_t)SCENE_FRAMES * BY_HAND_PAGE; }

static char *image_room(void) {
    char *p = malloc(tables_bytes() + data_bytes());
    EXPECT(p);
    return p;
}

static void save(char *image, const struct dm_device *from) {
    memcpy(image, from->base, tables_bytes());
    memcpy(image + tables_bytes(), from->data, data_bytes());
}

static void load(struct dm_device *to, const char *image) {
    memcpy(to->base, image, tables_bytes());
    memcpy(to->data, image + tables_bytes(), data_bytes());
}

static uint64_t hash_of(const void *bytes, size_t n) {
    const uint64_t *words = bytes;
    uint64_t hash = 1;
    for (size_t i = 0; i < n / 8; i++)
        hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15ull, hash ^= hash >> 29;
    return hash | 1;
}

struct look {         /* at the device, hashed */
    uint64_t refs;    /* the Refs, and what the intent is */
    uint64_t essence; /* all that recovery goes by: the tables but for the host entries' counters */
};

/* Is the device in a state that is worth more trouble? Not twice in the same one; and of the long stretches in which counts
 * are changed one after the other only a part, unless all are wanted. */
static bool worth_a_look(struct look *last, bool all) {
    const struct dm_intent *intent = &dev.hosts[SCENE_DEAD - 1].intent;
    struct look now = {hash_of(dev.refs, SCENE_REFS * sizeof dev.refs[0]) + intent->op,
                       hash_of(intent, sizeof *intent) * 3 +
                           hash_of(dev.refs, tables_bytes() - dev.geo.ref_table_off)};
    bool changed = now.essence != last->essence, reshaped = now.refs != last->refs;
    *last = now;
    return changed && (reshaped || all || check_slow() || rng_below(&rng, 16) == 0);
}

/* ---------------------------------------------------------------- what must hold */

static void note_frame(struct held *held, uint32_t pfn) {
    if (pfn != DM_NO_FRAME)
        held->hash[pfn] = hash_of(dev.data + (size_t)pfn * BY_HAND_PAGE, BY_HAND_PAGE);
}

static void note_what_other_holds(struct held *held, const struct scene *s) {
    const uint32_t *pt = dm_device_ptes(&dev, SCENE_OTHER);
    memcpy(held->ptes, pt, dev.geo.ptes_per_host * sizeof *pt);
    held->crowded = s->crowded;
    held->crowd = s->crowd;
    for (uint64_t i = 0; i < dev.geo.ptes_per_host; i++)
        if (pt[i] & DM_PTE_PRESENT)
            note_frame(held, pt[i] & DM_PTE_PFN);
    for (uint32_t i = 0; i < SCENE_REFS; i++) {
        const struct dm_ref_entry *entry = &dev.refs[i];
        held->keeps[i] = dm_ref_state(entry->state) == DM_REF_LIVE &&
                         dm_ref_holder(entry->state) == SCENE_OTHER && i != s->handed;
        if (!held->keeps[i])
            continue;
        held->refs[i] = *entry;
        struct dm_runs runs;
        dm_runs_init(&runs);
        EXPECT_EQ(dm_runs_of_entry(entry, (const char *)dev.data, 12, SCENE_FRAMES, &runs), DM_OK);
        for (uint32_t r = 0; r < runs.nr; r++)
            for (uint32_t k = 0; k < runs.list[r].count; k++)
                note_frame(held, runs.list[r].pfn + k);
        dm_runs_free(&runs);
    }
}

static void expect_survivor_unharmed(const struct dm_device *on, const struct held *held) {
    EXPECT(!memcmp(held->ptes, dm_device_ptes(on, SCENE_OTHER),
                   on->geo.ptes_per_host * sizeof *held->ptes));
    for (uint32_t i = 0; i < SCENE_REFS; i++)
        if (held->keeps[i])
            EXPECT(!memcmp(&held->refs[i], &on->refs[i], sizeof held->refs[i]));
    for (uint32_t pfn = 0; pfn < SCENE_FRAMES; pfn++)
        if (held->hash[pfn] &&
            held->hash[pfn] != hash_of(on->data + (size_t)pfn * BY_HAND_PAGE, BY_HAND_PAGE))
            FAIL("expected: frame %u, which the other host holds, keeps its bytes", pfn);
}

static void expect_nothing_left(const struct dm_device *on) {
    const uint32_t *pt = dm_device_ptes(on, SCENE_DEAD);
    for (uint64_t i = 0; i < on->geo.ptes_per_host; i++)
        EXPECT_EQ(pt[i], 0);
    for (uint32_t i = 0; i < SCENE_REFS; i++)
        EXPECT(dm_ref_state(on->refs[i].state) == DM_REF_FREE ||
               dm_ref_holder(on->refs[i].state) != SCENE_DEAD);
    for (uint32_t pfn = 0; pfn < SCENE_FRAMES; pfn++)
        if (dm_frame_refcount(on->frames[pfn]) == 0)
            EXPECT(dm_frame_owner(on->frames[pfn]) != SCENE_DEAD);
    EXPECT_EQ(on->hosts[SCENE_DEAD - 1].intent.op, DM_INTENT_NONE);
}

static void expect_leaks_at_most(const struct dm_device *on, const struct held *held,
                                 unsigned most) {
    const struct dm_audit *audit = by_hand_audit(on);
    unsigned leaks = 0;
    EXPECT(audit->nr_violations <= DM_AUDIT_MAX_VIOLATIONS);
    for (uint64_t i = 0; i < audit->nr_violations; i++) {
        const struct dm_violation *v = &audit->violations[i];
        unsigned pfn, refcount, holders;
        if (v->pfn == held->crowded && strstr(v->text, "above the maximum"))
            continue; /* it was at the maximum by design, and one leaked count is above it */
        if (sscanf(v->text, "refcount of frame %u is %u, but mappings and Refs hold %u", &pfn,
                   &refcount, &holders) != 3)
            FAIL("expected: only counts may be wrong, but: %s", v->text);
        if (pfn == held->crowded)
            refcount -= held->crowd;
        if (refcount < holders)
            FAIL("expected: never a count too few, but: %s", v->text);
        leaks += refcount - holders;
        if (leaks > most)
            FAIL("expected: at most %u frame leaked, but: %s (and %llu more)", most,
                 audit->violations[0].text, (unsigned long long)audit->nr_violations - 1);
    }
    EXPECT_EQ(audit->in_flight, 0);
}

static void expect_recovered(struct dm_device *on, const struct held *held, unsigned most_leaks) {
    bool changed;
    expect_nothing_left(on);
    EXPECT_OK(dm_device_set_host_state(on, SCENE_DEAD, DM_HOST_DEAD, DM_HOST_FREE, &changed, &err),
              &err);
    expect_leaks_at_most(on, held, most_leaks);
    expect_survivor_unharmed(on, held);
}

static void recover(struct dm_device *on) {
    struct dm_recovery report;
    EXPECT_OK(dm_recover_host(on, SCENE_DEAD, &report, &err), &err);
    EXPECT_EQ(report.refs_damaged, 0);
}

/* ---------------------------------------------------------------- a survivor in need */

/* Take all frames of the pool into use, each at a page of its own. */
static void use_the_pool(struct dm_device *on, struct held *held) {
    uint32_t *pt = dm_device_ptes(on, SCENE_OTHER);
    for (uint32_t pfn = 0; pfn < SCENE_FRAMES; pfn++) {
        uint64_t word = on->frames[pfn];
        if (dm_frame_refcount(word) || dm_frame_owner(word) != DM_OWNER_POOL)
            continue;
        uint32_t page = pt[pfn] ? 2 * SCENE_FRAMES + pfn : pfn;
        EXPECT_EQ(pt[page], 0);
        on->frames[pfn] = dm_frame_pack(1, SCENE_OTHER, (uint16_t)(dm_frame_seq(word) + 1));
        held->ptes[page] = pt[page] = DM_PTE_PRESENT | DM_PTE_HEAD | pfn;
    }
}

/* Accept a Ref of the dead host, as dm_ref_accept does, if there is one. */
static void accept_one(struct dm_device *on, struct held *held) {
    uint32_t i = rng_below(&rng, SCENE_REFS);
    uint64_t word = on->refs[i].state;
    if (dm_ref_state(word) != DM_REF_LIVE || dm_ref_holder(word) != SCENE_DEAD)
        return;
    on->refs[i].state =
        dm_ref_pack(DM_REF_LIVE, dm_ref_flags(word), SCENE_OTHER, dm_ref_gen(word) + 1);
    held->refs[i] = on->refs[i];
    held->keeps[i] = true;
}

static struct held same_as(const struct held *held) {
    struct held h = *held;
    h.ptes = malloc(dev.geo.ptes_per_host * sizeof *h.ptes);
    EXPECT(h.ptes);
    memcpy(h.ptes, held->ptes, dev.geo.ptes_per_host * sizeof *h.ptes);
    return h;
}

/* ---------------------------------------------------------------- recovery that is interrupted */

struct interruption {
    struct look look;
    uint32_t nr_stores, tried;
    char doing[128];
};

static void recover_again(void *arg) {
    struct interruption *in = arg;
    in->nr_stores++;
    if (!worth_a_look(&in->look, in->tried < ALL_INTERRUPTIONS_UP_TO))
        return;
    in->tried++;
    snprintf(check_doing, sizeof check_doing, "%s; recovery stopped behind its store %u", in->doing,
             in->nr_stores);
    memcpy(copy.base, dev.base, tables_bytes());
    struct held held = same_as(&note->held);
    use_the_pool(&copy, &held);
    recover(&copy);
    expect_recovered(&copy, &held, 2);
    free(held.ptes);
}

static uint32_t interrupt_recovery(void) {
    struct interruption in = {0};
    snprintf(in.doing, sizeof in.doing, "%.120s", check_doing);
    load(&dev, crashed);
    memcpy(copy.data, dev.data, data_bytes()); /* recovery writes to no frame */
    recover_again(&in);
    stores_watch(dev.base, tables_bytes(), recover_again, &in);
    recover(&dev);
    stores_unwatch();
    snprintf(check_doing, sizeof check_doing, "%s", in.doing);
    return in.tried;
}

static void be_greedy(void *arg) {
    struct held *held = arg;
    use_the_pool(&dev, held);
    if (rng_below(&rng, 4) == 0)
        accept_one(&dev, held);
}

static void recover_beside_a_greedy_host(void) {
    struct held held = same_as(&note->held);
    load(&dev, crashed);
    stores_watch(dev.base, tables_bytes(), be_greedy, &held);
    recover(&dev);
    stores_unwatch();
    expect_recovered(&dev, &held, 1);
    free(held.ptes);
}

/* ---------------------------------------------------------------- operations that are killed */

struct killing {
    struct scene scene;
    const struct scenario *what;
    uint32_t at; /* die behind this store */
    bool meanwhile_done;
};

static void die_in_time(void *arg) {
    struct killing *k = arg;
    if (k->what->meanwhile && !k->meanwhile_done && k->scene.h->entry->intent.op) {
        k->meanwhile_done = true;
        k->what->meanwhile(&k->scene);
    }
    if (++note->nr_stores == k->at)
        kill(getpid(), SIGKILL);
}

static void child(const struct scenario *what, uint32_t at) {
    struct killing k = {.what = what, .at = at};
    scene_prepare(&k.scene, &dev, what);
    note_what_other_holds(&note->held, &k.scene);
    bool data = what->flags & SCENE_DATA;
    stores_watch(dev.base, data ? dev.geo.data_off + data_bytes() : tables_bytes(), die_in_time,
                 &k);
    if (at == 0)
        kill(getpid(), SIGKILL);
    int status = what->operate(&k.scene);
    stores_unwatch();
    EXPECT_EQ(status, what->status);
    note->done = true;
    kill(getpid(), SIGKILL);
}

/* Let a child do the operation and die behind store `at`. False: it came to the end before. */
static bool killed_at(const struct scenario *what, uint32_t at) {
    load(&dev, before);
    note->nr_stores = 0;
    note->done = false;
    memset(note->held.hash, 0, sizeof note->held.hash);
    fflush(NULL);
    pid_t pid = fork();
    EXPECT(pid >= 0);
    if (pid == 0) {
        child(what, at);
        _exit(1);
    }
    int status;
    EXPECT(waitpid(pid, &status, 0) == pid);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        FAIL("expected: a child that ends by SIGKILL, but its status is %#x", status);
    bool changed;
    EXPECT_OK(
        dm_device_set_host_state(&dev, SCENE_DEAD, DM_HOST_ACTIVE, DM_HOST_DEAD, &changed, &err),
        &err);
    EXPECT(changed);
    return !note->done;
}

/* Returns how many interrupted recoveries were tried. */
static uint32_t die_and_recover(const struct scenario *what, uint32_t at, unsigned most_leaks,
                                bool every) {
    static struct look last;
    if (at == AT_THE_END)
        snprintf(check_doing, sizeof check_doing, "%s, killed after its end", what->name);
    else
        snprintf(check_doing, sizeof check_doing, "%s, killed behind store %u", what->name, at);
    (void)killed_at(what, at);
    bool more = worth_a_look(&last, every);
    save(crashed, &dev);
    recover(&dev);
    expect_recovered(&dev, &note->held, most_leaks);
    if (!more)
        return 0;
    uint32_t tried = interrupt_recovery();
    if (check_slow() || rng_below(&rng, 2) == 0)
        recover_beside_a_greedy_host();
    return tried;
}

static bool worth_a_try(uint32_t at, uint32_t nr_stores) {
    if (check_slow())
        return true;
    if (CHECK_ASAN) /* a fork takes ten times as long */
        return at <= 1 || nr_stores - at <= 1 || rng_below(&rng, nr_stores) < 8;
    if (nr_stores <= ALL_STORES_UP_TO || at <= DENSE || nr_stores - at <= DENSE)
        return true;
    return rng_below(&rng, nr_stores) < ALL_STORES_UP_TO / 4;
}

static void death_leaves_at_most_one_frame(const struct scenario *what) {
    uint32_t deaths = 0, interruptions = 0;
    snprintf(check_doing, sizeof check_doing, "%s, not killed", what->name);
    EXPECT(!killed_at(what, AT_THE_END));
    uint32_t nr_stores = note->nr_stores;
    bool every = nr_stores <= ALL_STORES_UP_TO;
    EXPECT(nr_stores > 0);
    interruptions += die_and_recover(what, AT_THE_END, 0, true);
    for (uint32_t at = 0; at <= nr_stores; at++) {
        if (!worth_a_try(at, nr_stores))
            continue;
        interruptions += die_and_recover(what, at, at && at < nr_stores, every);
        deaths++;
    }
    check_doing[0] = 0;
    printf("%s: %u stores, %u deaths, %u interrupted recoveries\n", what->name, nr_stores, deaths,
           interruptions);
    fflush(stdout);
}

/* ---------------------------------------------------------------- recovery without memory */

struct block {
    struct block *next;
};
static struct rlimit usual;

/* Take all memory that malloc can give, and let the kernel give no more. */
static struct block *take_all_memory(void) {
    volatile char stack[65536];
    struct block *all = NULL, *b;
    for (size_t i = 0; i < sizeof stack; i += 1024)
        stack[i] = 0; /* it cannot grow later */
    EXPECT(!getrlimit(RLIMIT_AS, &usual));
    struct rlimit none = {0, usual.rlim_max};
    EXPECT(!setrlimit(RLIMIT_AS, &none));
    for (size_t bytes = 1 << 20; bytes >= sizeof *b; bytes /= 2)
        while ((b = malloc(bytes))) {
            b->next = all;
            all = b;
        }
    return all;
}

static void give_memory_back(struct block *all) {
    EXPECT(!setrlimit(RLIMIT_AS, &usual));
    for (struct block *next; all; all = next) {
        next = all->next;
        free(all);
    }
}

/* A long list of runs needs memory. Without it recovery stops, and the next attempt goes on from there. */
static void recovery_without_memory_can_be_repeated(void) {
    for (unsigned i = 0; i < nr_scenarios; i++)
        for (uint32_t at = 20; scenarios[i].flags & SCENE_LONG && at < 600; at += 45) {
            struct dm_recovery report;
            snprintf(check_doing, sizeof check_doing, "%s, killed behind store %u, no memory",
                     scenarios[i].name, at);
            if (!killed_at(&scenarios[i], at))
                break;
            struct block *all = take_all_memory();
            int status = dm_recover_host(&dev, SCENE_DEAD, &report, &err);
            give_memory_back(all);
            EXPECT_EQ(status, DM_ERR_NO_MEMORY);
            recover(&dev);
            expect_recovered(&dev, &note->held, 1);
        }
    check_doing[0] = 0;
}

int main(int argc, char **argv) {
    const char *why = NULL;
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
    scene_device(&copy);
    size_t pt_bytes = dev.geo.ptes_per_host * sizeof(uint32_t);
    note = mmap(NULL, sizeof *note + pt_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                -1, 0);
    EXPECT(note != MAP_FAILED);
    note->held.ptes = (uint32_t *)(note + 1);
    before = image_room();
    crashed = image_room();
    save(before, &dev);
    for (unsigned i = 0; i < nr_scenarios; i++) {
        if (scenarios[i].flags & SCENE_UFFD && !has_uffd)
            continue;
        if (argc < 2 || strstr(scenarios[i].name, argv[1]))
            death_leaves_at_most_one_frame(&scenarios[i]);
    }
    if (!CHECK_ASAN && argc < 2) /* its malloc does not fail, but ends the process */
        HOLDS(recovery_without_memory_can_be_repeated);
    free(before);
    free(crashed);
    dm_device_close(&dev);
    dm_device_close(&copy);
    if (has_uffd)
        return 0;
    printf("what needs no userfaultfd holds; the rest was not tried: %s\n", why);
    return 77;
}
