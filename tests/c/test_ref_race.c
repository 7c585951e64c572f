/*
 * test_ref_race.c - several hosts fight over the same Refs (traffic.h); then the audit must be exact.
 *
 * Hosts are threads of this process (two threads share a host), each host with its own struct dm_host. They have nothing in
 * common but the device and letter boxes that order nothing, so ThreadSanitizer sees whether the words of the device
 * order what the hosts do to Refs and frames.
 */
#include <pthread.h>

#include "traffic.h"

#define NR_HOSTS 4u
#define NR_THREADS 6u
#define NR_FRAMES 400u
#define NR_REFS 48u

static struct dm_device dev;
static struct dm_host *hosts[NR_HOSTS];
static bool has_uffd;
static struct traffic traffic;
static uint32_t nr_steps;
static pthread_barrier_t start;

static void *play(void *arg) {
    pthread_barrier_wait(&start);
    for (uint32_t n = 0; n < nr_steps; n++)
        traffic_step(arg);
    return NULL;
}

static const struct dm_vma *hosts_vma(const struct player *p, uint32_t buffer) {
    return &p->h->vmas[p->buffers[buffer].id];
}

/* Free what is mapped and viewed, and drop the Refs that nobody took. */
static void drop_the_rest(void) {
    struct dm_error e;
    for (uint32_t i = 0; i < NR_HOSTS; i++) /* first, for views are Refs, too */
        for (uint32_t id = 1; id <= hosts[i]->nr_vmas; id++)
            if (hosts[i]->vmas[id].flags & DM_VMA_USED)
                EXPECT_OK(dm_rfree(hosts[i], id, &e), &e);
    for (uint32_t i = 0; i < NR_REFS; i++) {
        uint64_t word = dev.refs[i].state;
        if (dm_ref_state(word) == DM_REF_FREE)
            continue;
        struct dm_host *h = hosts[dm_ref_holder(word) - 1];
        dm_lock(h);
        EXPECT_EQ(dm_ref_state(word), DM_REF_LIVE);
        dev.refs[i].state = dm_ref_pack(DM_REF_DROPPING, 0, h->id, dm_ref_gen(word));
        dm_ref_release(h, i);
        dm_unlock(h);
    }
}

/* What was handed over is found without the hints, of which some were overwritten. */
static void expect_all_listed(const struct dm_audit *audit) {
    for (uint32_t i = 0; i < NR_HOSTS; i++) {
        dm_welcome_home(hosts[i]);
        dm_rescan_owned(hosts[i]);
        EXPECT_EQ(audit->free_of[i + 1], hosts[i]->free.nr_free);
    }
}

static void counts_are_exact_after_hosts_fought_over_refs(void) {
    static struct player players[NR_THREADS];
    pthread_t threads[NR_THREADS];
    struct rng rng = rng_start();
    nr_steps = check_slow() ? 1000000 : CHECK_TSAN ? 40000 : CHECK_ASAN ? 100000 : 200000;
    for (uint32_t i = 0; i < NR_THREADS; i++) {
        players[i] =
            (struct player){hosts[i % NR_HOSTS], &traffic, {rng_next(&rng)}, has_uffd, {{0}}};
        EXPECT(!pthread_create(&threads[i], NULL, play, &players[i]));
    }
    for (uint32_t i = 0; i < NR_THREADS; i++)
        EXPECT(!pthread_join(threads[i], NULL));
    printf("made %llu, accepted %llu, cloned %llu, dropped %llu, mapped %llu, in vain %llu\n",
           (unsigned long long)traffic.nr_won[TRAFFIC_MAKE],
           (unsigned long long)traffic.nr_won[TRAFFIC_ACCEPT],
           (unsigned long long)traffic.nr_won[TRAFFIC_CLONE],
           (unsigned long long)traffic.nr_won[TRAFFIC_DROP],
           (unsigned long long)traffic.nr_won[TRAFFIC_MAP], (unsigned long long)traffic.nr_lost);
    for (int i = 0; i < TRAFFIC_MOVES; i++)
        EXPECT(traffic.nr_won[i] > 0);

    const struct dm_audit *audit = by_hand_exact(&dev);
    uint64_t pages = 0, views = 0;
    for (uint32_t i = 0; i < NR_THREADS; i++)
        for (uint32_t b = 0; b < TRAFFIC_BUFFERS; b++)
            if (players[i].buffers[b].id) {
                traffic_expect_unchanged(&players[i], &players[i].buffers[b]);
                bool view = hosts_vma(&players[i], b)->flags & DM_VMA_VIEW;
                views += view;
                pages += view ? 0 : players[i].buffers[b].nr_pages;
            }
    EXPECT_EQ(audit->live_refs, traffic.nr_made - traffic.nr_used + views);
    EXPECT_EQ(audit->mapped_pages, pages);
    expect_all_listed(audit);

    drop_the_rest();
    audit = by_hand_exact(&dev);
    EXPECT_EQ(audit->in_use, 0);
    EXPECT_EQ(audit->live_refs, 0);
    expect_all_listed(audit);
}

int main(void) {
    const char *why;
    has_uffd = by_hand_has_uffd(&why);
    if (!has_uffd)
        printf("without create_ref that shares and without copy-on-write: %s\n", why);
    by_hand_device(&dev, NR_FRAMES, NR_HOSTS, NR_REFS);
    for (uint16_t i = 0; i < NR_HOSTS; i++) {
        by_hand_activate(&dev, i + 1u);
        hosts[i] = by_hand_host(&dev, (uint16_t)(i + 1));
        by_hand_grant(hosts[i], i * (NR_FRAMES / NR_HOSTS), NR_FRAMES / NR_HOSTS);
    }
    EXPECT(!pthread_barrier_init(&start, NULL, NR_THREADS));
    HOLDS(counts_are_exact_after_hosts_fought_over_refs);
    for (uint32_t i = 0; i < NR_HOSTS; i++)
        by_hand_host_free(hosts[i]);
    dm_device_close(&dev);
    return 0;
}
