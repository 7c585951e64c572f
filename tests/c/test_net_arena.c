/* test_net_arena.c - memory for buffers: two mappings of one file, and what is kept of it. */
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "check.h"
#include "net_arena.h"

#define MIB (256u) /* pages */
#define RUNS 24u

static struct net_arena *arena;

static struct net_run taken(uint64_t nr_pages, bool zero) {
    struct net_run run;
    EXPECT(net_arena_take(arena, nr_pages, zero, &run));
    EXPECT_EQ(run.nr_pages, nr_pages);
    return run;
}

static bool in_memory(const struct net_run *run, uint64_t page) {
    unsigned char there;
    EXPECT_EQ(mincore(run->back + page * NET_PAGE, NET_PAGE, &there), 0);
    return there & 1;
}

static void the_back_shows_what_the_front_has(void) {
    struct net_run run = taken(3, true);
    for (uint32_t i = 0; i < 3 * NET_PAGE; i++)
        EXPECT_EQ(run.front[i] | run.back[i], 0);
    memset(run.back, 1, NET_PAGE);
    memset(run.front + 2 * NET_PAGE, 2, NET_PAGE);
    EXPECT_EQ(run.front[5], 1);
    EXPECT_EQ(run.back[2 * NET_PAGE], 2);
    net_arena_hide(&run);
    EXPECT_EQ(run.front[5], 1);
    net_arena_give(arena, &run, false);
}

static void what_was_given_back_last_is_taken_first_and_cleared_if_asked(void) {
    struct net_run a = taken(5, true), b = taken(7, true);
    memset(a.front, 1, 5 * NET_PAGE);
    memset(b.front, 2, 7 * NET_PAGE);
    net_arena_give(arena, &a, false);
    net_arena_give(arena, &b, false);
    struct net_run c = taken(6, false), d = taken(8, true);
    EXPECT(c.front == b.front);
    EXPECT_EQ(c.front[0], 2);
    EXPECT(d.front == a.front);
    for (uint32_t i = 0; i < 8 * NET_PAGE; i++)
        EXPECT_EQ(d.front[i], 0);
    net_arena_give(arena, &c, false);
    net_arena_give(arena, &d, false);
}

static void so_much_is_kept_and_no_more(void) {
    struct net_run runs[40];
    for (uint32_t i = 0; i < 40; i++) {
        runs[i] = taken(4 * MIB, true);
        memset(runs[i].front, 3, 4 * MIB * NET_PAGE);
    }
    for (uint32_t i = 0; i < 40; i++)
        net_arena_give(arena, &runs[i], false);
    EXPECT_EQ(net_arena_kept(arena), NET_ARENA_KEPT);
    for (uint32_t i = 0; i < 40; i++) /* the newest stay */
        EXPECT_EQ(in_memory(&runs[i], 0), i >= 40 - NET_ARENA_KEPT / (4 * MIB * NET_PAGE));
    struct net_run large = taken(NET_ARENA_KEPT / NET_PAGE + 1, true);
    large.front[0] = 1;
    net_arena_give(arena, &large, false); /* more than is ever kept */
    EXPECT_EQ(net_arena_kept(arena), 0);
    EXPECT(!in_memory(&large, 0));
    for (uint32_t i = 0; i < 300; i++) { /* small ones are counted */
        runs[i % 40] = taken(1, false);
        net_arena_give(arena, &runs[i % 40], false);
    }
    EXPECT_EQ(net_arena_kept(arena), NET_PAGE);
}

static void places_are_used_again(void) {
    struct net_run first = taken(64 * MIB, true), run = first;
    for (uint32_t i = 0; i < 100000; i++) { /* 25 TiB, if each had a place of its own */
        net_arena_give(arena, &run, false);
        run = taken(64 * MIB, false);
        EXPECT(run.front == first.front);
        struct net_run other = taken(1 + i % 64, false);
        net_arena_give(arena, &other, false);
    }
    net_arena_give(arena, &run, false);
}

static void what_cannot_be_had_is_refused(void) {
    struct net_run run;
    EXPECT(!net_arena_take(arena, 0, true, &run));
    EXPECT(!net_arena_take(arena, 1ull << 36, true, &run));
    EXPECT(!net_arena_take(arena, 1ull << 30, true, &run)); /* 4 TiB */
}

static void a_forked_child_has_neither_mapping(void) {
    struct net_run run = taken(1, true);
    for (int side = 0; side < 2; side++) {
        pid_t child = fork();
        if (!child) {
            volatile char *at = side ? run.back : run.front;
            _exit(*at);
        }
        int status;
        EXPECT_EQ(waitpid(child, &status, 0), child);
        EXPECT(WIFSIGNALED(status) || WEXITSTATUS(status) != 0); /* sanitizers exit */
    }
    net_arena_give(arena, &run, true);
    struct net_run again = taken(1, true);
    EXPECT(again.front == run.front);
    pid_t child = fork(); /* also what was mapped anew */
    if (!child) {
        volatile char *at = again.front;
        _exit(*at);
    }
    int status;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT(WIFSIGNALED(status) || WEXITSTATUS(status) != 0);
    net_arena_give(arena, &again, false);
}

/* A forked child would keep what is in the file, and a core dump would fill it. */
static void the_file_is_nobody_elses(void) {
    char line[400];
    int nr_fds = 0, nr_mapped = 0, nr_dumped = 0;
    bool ours = false;
    for (int fd = 0; fd < 100; fd++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(path, line, sizeof line - 1);
        line[n > 0 ? n : 0] = 0;
        nr_fds += strstr(line, "dmrpc-buffers") != NULL;
    }
    EXPECT_EQ(nr_fds, 0);
    FILE *maps = fopen("/proc/self/smaps", "r");
    EXPECT(maps);
    while (fgets(line, sizeof line, maps)) {
        if (strstr(line, "dmrpc-buffers")) {
            ours = true;
            nr_mapped++;
        } else if (ours && !strncmp(line, "VmFlags:", 8)) {
            nr_dumped += !strstr(line, " dd") || !strstr(line, " dc");
            ours = false;
        }
    }
    (void)fclose(maps);
    EXPECT(nr_mapped >= 2);
    EXPECT_EQ(nr_dumped, 0);
}

static void few_addresses_are_shared_and_do_not_fall_to_pieces(void) {
    if (CHECK_ASAN || CHECK_TSAN) {
        printf("a sanitizer needs its addresses\n");
        return;
    }
    fflush(NULL);
    pid_t child = fork();
    if (!child) {
        enum { MOST = 8192 };
        static struct net_run runs[MOST];
        uint32_t nr = 0;
        const struct rlimit limit = {1u << 30, 1u << 30};
        EXPECT_EQ(setrlimit(RLIMIT_AS, &limit), 0);
        EXPECT(arena = net_arena_new());
        void *others = malloc(600u << 20); /* more than half is left */
        EXPECT(others);
        free(others);
        while (nr < MOST && net_arena_take(arena, MIB, false, &runs[nr]))
            nr++;
        EXPECT(nr >= 16 && nr < MOST);
        const struct net_run last = runs[nr - 1];
        for (uint32_t i = 0; i + 1 < nr; i++)
            net_arena_give(arena, &runs[i], false);
        for (uint32_t i = 0; i < 1000; i++) /* cut out of the others' places */
            runs[i] = taken(1 + i % 4, true);
        for (uint32_t i = 0; i < 1000; i++)
            net_arena_give(arena, &runs[i], false);
        net_arena_give(arena, &last, false);
        struct net_run all = taken((uint64_t)nr / 2 * MIB, true); /* nothing was in use */
        memset(all.front, 1, MIB * NET_PAGE);
        net_arena_give(arena, &all, false);
        net_arena_free(arena);
        _exit(0);
    }
    int status;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
}

static void runs_in_use_never_share_a_page(void) {
    struct rng draw = rng_start();
    struct net_run runs[RUNS] = {0};
    for (int i = 0; i < 4000; i++) {
        uint32_t at = rng_below(&draw, RUNS);
        struct net_run *run = &runs[at];
        if (run->front) {
            for (uint64_t page = 0; page < run->nr_pages; page++)
                EXPECT_EQ(run->front[page * NET_PAGE], at + 1);
            net_arena_give(arena, run, rng_below(&draw, 20) == 0);
            run->front = NULL;
        } else {
            bool zero = rng_below(&draw, 2);
            *run = taken(1 + rng_below(&draw, 1u << rng_below(&draw, 12)), zero);
            for (uint64_t page = 0; page < run->nr_pages; page++) {
                EXPECT(!zero || run->front[page * NET_PAGE] == 0);
                run->front[page * NET_PAGE] = (char)(at + 1);
            }
            if (rng_below(&draw, 2))
                net_arena_hide(run);
        }
        EXPECT(net_arena_kept(arena) <= NET_ARENA_KEPT);
    }
    for (uint32_t at = 0; at < RUNS; at++) {
        if (runs[at].front)
            net_arena_give(arena, &runs[at], false);
    }
}

int main(void) {
    EXPECT(arena = net_arena_new());
    HOLDS(the_back_shows_what_the_front_has);
    HOLDS(what_was_given_back_last_is_taken_first_and_cleared_if_asked);
    HOLDS(so_much_is_kept_and_no_more);
    HOLDS(places_are_used_again);
    HOLDS(what_cannot_be_had_is_refused);
    HOLDS(a_forked_child_has_neither_mapping);
    HOLDS(the_file_is_nobody_elses);
    HOLDS(few_addresses_are_shared_and_do_not_fall_to_pieces);
    HOLDS(runs_in_use_never_share_a_page);
    net_arena_free(arena);
    return 0;
}
