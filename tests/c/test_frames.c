/*
 * test_frames.c - words: how frame words, page-table entries and Ref words are packed, what counting does to a frame
 * word, and that of several hosts that drop the same frame at once exactly one is told that it was the last.
 *
 * The threads stand for processes: each has a host of its own, and they have nothing in common but the device. So that
 * ThreadSanitizer sees whether the counts order what was done to the frames, nothing else orders it.
 */
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "by_hand.h"
#include "check.h"

#define NR_FRAMES 256u
#define NR_HOSTS 4u

static struct dm_device dev;
static struct dm_host *hosts[NR_HOSTS];

/* ---------------------------------------------------------------- packing */

_Static_assert(sizeof(dm_frame_pack(0, 0, 0)) == 8, "a frame word is one atomic word");
_Static_assert(sizeof(dm_frame_refcount(0)) == 4, "32 bits of refcount");
_Static_assert(sizeof(dm_frame_owner(0)) == 2, "16 bits of owner");
_Static_assert(sizeof(dm_frame_seq(0)) == 2, "16 bits of sequence");
_Static_assert(DM_MAX_HOSTS < DM_COMING, "an owner names any host");
_Static_assert(DM_REFCOUNT_MAX <= UINT32_MAX - 2 * DM_MAX_HOSTS,
               "hosts that overrun the limit at once do not carry into the owner");
_Static_assert((DM_PTE_PRESENT & DM_PTE_HEAD) == 0 && (DM_PTE_PRESENT & DM_PTE_HOLE) == 0 &&
                   (DM_PTE_HEAD & DM_PTE_HOLE) == 0,
               "flags of a page-table entry are apart");
_Static_assert(((DM_PTE_PRESENT | DM_PTE_HEAD | DM_PTE_HOLE) & DM_PTE_PFN) == 0,
               "no flag lies in the PFN");
_Static_assert(DM_MAX_FRAMES - 1 == DM_PTE_PFN, "a page-table entry names any frame");
_Static_assert(DM_NO_FRAME > DM_MAX_FRAMES, "no frame has the number that means none");
_Static_assert(sizeof(dm_ref_pack(0, 0, 0, 0)) == 8, "a Ref word is one atomic word");
_Static_assert(sizeof(dm_ref_gen(0)) == 4 && sizeof(dm_ref_holder(0)) == 2 &&
                   sizeof(dm_ref_flags(0)) == 1 && sizeof(dm_ref_state(0)) == 1,
               "32, 16, 8 and 8 bits of a Ref word");

static const uint32_t values32[] = {0,          1,          2,          0xffff,     0x10000,
                                    0x7ffffffe, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff};
static const uint16_t values16[] = {0, 1, 2, 0xff, 0x100, 0x7fff, 0x8000, 0xfffe, 0xffff};
static const uint8_t values8[] = {0, 1, 2, 5, 0x7f, 0x80, 0xfe, 0xff};

#define NR(values) (sizeof values / sizeof values[0])

static void fields_of_a_frame_word_do_not_touch_each_other(void) {
    for (unsigned c = 0; c < NR(values32); c++)
        for (unsigned o = 0; o < NR(values16); o++)
            for (unsigned s = 0; s < NR(values16); s++) {
                uint64_t word = dm_frame_pack(values32[c], values16[o], values16[s]);
                EXPECT_EQ(dm_frame_refcount(word), values32[c]);
                EXPECT_EQ(dm_frame_owner(word), values16[o] & 0x7fff);
                EXPECT_EQ(dm_frame_coming(word), values16[o] >> 15);
                EXPECT_EQ(dm_frame_seq(word), values16[s]);
            }
    EXPECT_EQ(dm_frame_pack(0, 0, 0), 0); /* a formatted device: all frames the pool's */
}

static void expect_ref_word(uint8_t state, uint8_t flags, uint16_t holder, uint32_t gen) {
    uint64_t word = dm_ref_pack(state, flags, holder, gen);
    EXPECT_EQ(dm_ref_state(word), state);
    EXPECT_EQ(dm_ref_flags(word), flags);
    EXPECT_EQ(dm_ref_holder(word), holder);
    EXPECT_EQ(dm_ref_gen(word), gen);
}

static void fields_of_a_ref_word_do_not_touch_each_other(void) {
    for (unsigned a = 0; a < NR(values8); a++)
        for (unsigned b = 0; b < NR(values8); b++)
            for (unsigned c = 0; c < NR(values16); c++)
                for (unsigned d = 0; d < NR(values32); d++)
                    expect_ref_word(values8[a], values8[b], values16[c], values32[d]);
    EXPECT_EQ(dm_ref_pack(DM_REF_FREE, 0, 0, 0), 0); /* a formatted device: no Refs */
}

/* ---------------------------------------------------------------- counting, alone */

static uint64_t word_of(uint32_t pfn) {
    return __atomic_load_n(&dev.frames[pfn], __ATOMIC_RELAXED);
}

static void counting_up_and_down_leaves_owner_and_sequence(void) {
    struct dm_host *h = hosts[2];
    dev.frames[9] = dm_frame_pack(1, 7, 0xffff);
    for (uint32_t n = 2; n <= 100; n++) {
        EXPECT_EQ(dm_count_up(h, 9), DM_OK);
        EXPECT_EQ(word_of(9), dm_frame_pack(n, 7, 0xffff));
    }
    for (uint32_t n = 99; n >= 1; n--) {
        EXPECT(!dm_count_down(h, 9));
        EXPECT_EQ(word_of(9), dm_frame_pack(n, 7, 0xffff));
    }
    dev.frames[9] = 0;
}

static void who_drops_the_last_count_owns_the_frame(void) {
    for (uint32_t i = 0; i < NR_HOSTS; i++) {
        dev.frames[9] = dm_frame_pack(1, 900, 0x1234);
        EXPECT(dm_count_down(hosts[i], 9));
        EXPECT_EQ(word_of(9), dm_frame_pack(0, hosts[i]->id, 0x1234));
    }
    dev.frames[9] = 0;
}

static void a_count_at_its_limit_is_refused_and_carries_nowhere(void) {
    dev.frames[9] = dm_frame_pack(DM_REFCOUNT_MAX - 1, 3, 5);
    EXPECT_EQ(dm_count_up(hosts[0], 9), DM_OK);
    EXPECT_EQ(word_of(9), dm_frame_pack(DM_REFCOUNT_MAX, 3, 5));
    for (int i = 0; i < 3; i++) {
        EXPECT_EQ(dm_count_up(hosts[0], 9), DM_ERR_TOO_MANY_REFS);
        EXPECT_EQ(word_of(9), dm_frame_pack(DM_REFCOUNT_MAX, 3, 5));
    }
    EXPECT(!dm_count_down(hosts[0], 9));
    EXPECT_EQ(dm_count_up(hosts[0], 9), DM_OK);
    dev.frames[9] = 0;
}

static void dropping_a_count_that_is_not_there_stops_the_process(void) {
    fflush(NULL);
    pid_t pid = fork();
    EXPECT(pid >= 0);
    if (pid == 0) {
        EXPECT(freopen("/dev/null", "w", stderr));
        dev.frames[9] = dm_frame_pack(0, 1, 1);
        (void)dm_count_down(hosts[0], 9);
        _exit(0);
    }
    int status;
    EXPECT(waitpid(pid, &status, 0) == pid);
    EXPECT(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    EXPECT_EQ(word_of(9), dm_frame_pack(0, 1, 1)); /* and has not changed it */
    dev.frames[9] = 0;
}

static void entering_and_leaving_use_changes_the_run_and_nothing_beside_it(void) {
    struct dm_host *h = hosts[1];
    for (uint32_t i = 0; i < 20; i++)
        dev.frames[i] = dm_frame_pack(0, h->id, (uint16_t)(0xfff0 + i));
    dm_frames_enter_use(h, 5, 12);
    for (uint32_t i = 0; i < 20; i++) {
        bool inside = i >= 5 && i < 17;
        EXPECT_EQ(word_of(i), dm_frame_pack(inside, h->id, (uint16_t)(0xfff0 + i + inside)));
    }
    for (uint32_t i = 5; i < 17; i++) /* as if received from another host, which owned them last */
        dev.frames[i] = dm_frame_pack(1, hosts[3]->id, dm_frame_seq(dev.frames[i]));
    dm_frames_leave_use(h, 5, 12);
    for (uint32_t i = 0; i < 20; i++) {
        bool inside = i >= 5 && i < 17;
        EXPECT_EQ(word_of(i), dm_frame_pack(0, h->id, (uint16_t)(0xfff0 + i + inside)));
    }
    memset(dev.frames, 0, 20 * sizeof dev.frames[0]);
}

static void freed_frames_whose_page_is_occupied_are_displaced(void) {
    struct dm_host *h = hosts[0];
    h->pt[11] = DM_PTE_PRESENT | 200;
    h->pt[12] = DM_PTE_HOLE;
    dm_frame_freed(h, 10, 5);
    EXPECT_EQ(h->free.nr_free, 5);
    EXPECT_EQ(h->free.nr_displaced, 2);
    EXPECT_EQ(h->entry->nr_free, 5);
    uint32_t pfn;
    EXPECT_EQ(dm_freelist_take_upto(&h->free, 9, &pfn), 2);
    EXPECT_EQ(pfn, 11);
    EXPECT(dm_freelist_take(&h->free, 2, &pfn) && pfn == 13);
    EXPECT(dm_freelist_take(&h->free, 1, &pfn) && pfn == 10);
    h->pt[11] = h->pt[12] = 0;
    h->entry->nr_free = 0;
}

static void runs_are_exclusive_when_every_frame_has_one_count(void) {
    struct dm_run runs[] = {{5, 2}, {DM_NO_FRAME, 9}, {40, 1}};
    EXPECT(dm_all_exclusive(hosts[0], runs, 0));
    dev.frames[5] = dev.frames[6] = dev.frames[40] = dm_frame_pack(1, 1, 1);
    EXPECT(dm_all_exclusive(hosts[0], runs, 3));
    dev.frames[6] = dm_frame_pack(2, 1, 1);
    EXPECT(!dm_all_exclusive(hosts[0], runs, 3));
    dev.frames[6] = dm_frame_pack(1, 1, 1);
    dev.frames[40] = dm_frame_pack(0x10001, 1, 1);
    EXPECT(!dm_all_exclusive(hosts[0], runs, 3));
    dev.frames[5] = dev.frames[6] = dev.frames[40] = 0;
}

/* ---------------------------------------------------------------- counting, together */

static pthread_barrier_t start;

struct dropper {
    struct dm_host *h;
    uint64_t seed;
    uint32_t ups; /* how often each frame is counted up and down before it is dropped */
    uint32_t last[NR_FRAMES];
};

/* Each host writes to a part of its own of each frame, then drops its count. Who was the last reads all parts: whatever
 * the others did to the frame must have happened before. */
static void *drop_all(void *arg) {
    struct dropper *me = arg;
    struct rng r = {me->seed};
    uint32_t order[NR_FRAMES];
    for (uint32_t i = 0; i < NR_FRAMES; i++)
        order[i] = i;
    for (uint32_t i = NR_FRAMES; i-- > 1;) {
        uint32_t k = rng_below(&r, 8) ? i : rng_below(&r, i + 1), t = order[i];
        order[i] = order[k];
        order[k] = t;
    }
    pthread_barrier_wait(&start);
    for (uint32_t i = 0; i < NR_FRAMES; i++) {
        uint32_t *bytes = (uint32_t *)dm_frame_data(me->h, order[i]);
        for (uint32_t n = 0; n < me->ups; n++) {
            EXPECT_EQ(dm_count_up(me->h, order[i]), DM_OK);
            EXPECT(!dm_count_down(me->h, order[i]));
        }
        bytes[me->h->id] = me->h->id;
        if (!dm_count_down(me->h, order[i]))
            continue;
        me->last[order[i]] = 1;
        for (uint32_t host = 1; host <= NR_HOSTS; host++)
            EXPECT_EQ(bytes[host], host);
        memset(bytes, 0, (NR_HOSTS + 1) * sizeof *bytes);
    }
    return NULL;
}

static void of_hosts_that_drop_a_frame_at_once_exactly_one_is_the_last(void) {
    static struct dropper droppers[NR_HOSTS];
    pthread_t threads[NR_HOSTS];
    struct rng r = rng_start();
    for (uint32_t round = 0; round < (CHECK_SANITIZED ? 50 : 300); round++) {
        for (uint32_t pfn = 0; pfn < NR_FRAMES; pfn++)
            dev.frames[pfn] = dm_frame_pack(NR_HOSTS, 77, (uint16_t)(pfn + round));
        for (uint32_t i = 0; i < NR_HOSTS; i++) {
            droppers[i] = (struct dropper){hosts[i], rng_next(&r), round % 3, {0}};
            EXPECT(!pthread_create(&threads[i], NULL, drop_all, &droppers[i]));
        }
        for (uint32_t i = 0; i < NR_HOSTS; i++)
            EXPECT(!pthread_join(threads[i], NULL));
        for (uint32_t pfn = 0; pfn < NR_FRAMES; pfn++) {
            uint32_t owner = 0, nr_last = 0;
            for (uint32_t i = 0; i < NR_HOSTS; i++) {
                nr_last += droppers[i].last[pfn];
                owner = droppers[i].last[pfn] ? hosts[i]->id : owner;
            }
            EXPECT_EQ(nr_last, 1);
            EXPECT_EQ(word_of(pfn), dm_frame_pack(0, (uint16_t)owner, (uint16_t)(pfn + round)));
        }
    }
    memset(dev.frames, 0, NR_FRAMES * sizeof dev.frames[0]);
}

static void *overrun(void *arg) {
    struct dm_host *h = arg;
    uintptr_t got = 0;
    pthread_barrier_wait(&start);
    for (int i = 0; i < 2000; i++)
        got += dm_count_up(h, 9) == DM_OK;
    return (void *)got;
}

static void hosts_that_overrun_the_limit_at_once_get_what_there_is_and_no_more(void) {
    const uint32_t room = 3000;
    pthread_t threads[NR_HOSTS];
    uintptr_t total = 0;
    dev.frames[9] = dm_frame_pack(DM_REFCOUNT_MAX - room, 3, 5);
    for (uint32_t i = 0; i < NR_HOSTS; i++)
        EXPECT(!pthread_create(&threads[i], NULL, overrun, hosts[i]));
    for (uint32_t i = 0; i < NR_HOSTS; i++) {
        void *got;
        EXPECT(!pthread_join(threads[i], &got));
        total += (uintptr_t)got;
    }
    /* While one that was refused takes its count back, another may be refused, too: never one too many. */
    EXPECT(total > 0 && total <= room);
    EXPECT_EQ(word_of(9), dm_frame_pack(DM_REFCOUNT_MAX - room + (uint32_t)total, 3, 5));
    dev.frames[9] = 0;
}

int main(void) {
    by_hand_device(&dev, NR_FRAMES, NR_HOSTS, 8);
    for (uint16_t i = 0; i < NR_HOSTS; i++) {
        by_hand_activate(&dev, i + 1u);
        hosts[i] = by_hand_host(&dev, (uint16_t)(i + 1));
    }
    EXPECT(!pthread_barrier_init(&start, NULL, NR_HOSTS));
    HOLDS(fields_of_a_frame_word_do_not_touch_each_other);
    HOLDS(fields_of_a_ref_word_do_not_touch_each_other);
    HOLDS(counting_up_and_down_leaves_owner_and_sequence);
    HOLDS(who_drops_the_last_count_owns_the_frame);
    HOLDS(a_count_at_its_limit_is_refused_and_carries_nowhere);
    HOLDS(dropping_a_count_that_is_not_there_stops_the_process);
    HOLDS(entering_and_leaving_use_changes_the_run_and_nothing_beside_it);
    HOLDS(freed_frames_whose_page_is_occupied_are_displaced);
    HOLDS(runs_are_exclusive_when_every_frame_has_one_count);
    HOLDS(of_hosts_that_drop_a_frame_at_once_exactly_one_is_the_last);
    HOLDS(hosts_that_overrun_the_limit_at_once_get_what_there_is_and_no_more);
    for (uint32_t i = 0; i < NR_HOSTS; i++)
        by_hand_host_free(hosts[i]);
    by_hand_exact(&dev);
    dm_device_close(&dev);
    return 0;
}
