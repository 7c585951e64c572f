/*
 * check.h - what the C unit tests expect, and numbers drawn at random.
 *
 * An expectation that fails prints file, line and what was expected, and ends the process. The end is _exit: tests fork, and
 * a child must not run what its parent registered with atexit.
 *
 * Random numbers come from DM_TEST_SEED, or from the clock; the seed is printed, so that a failure can be repeated.
 */
#ifndef DM_TEST_CHECK_H
#define DM_TEST_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* Printed before the message of a failure: what the test was doing. Empty: nothing. */
extern char check_doing[256];

__attribute__((noreturn, format(printf, 3, 4))) void check_failed(const char *file, int line,
                                                                  const char *format, ...);

#define FAIL(...) check_failed(__FILE__, __LINE__, __VA_ARGS__)
#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition))                                                                          \
            FAIL("expected: %s", #condition);                                                      \
    } while (0)
#define EXPECT_EQ(got, want)                                                                       \
    do {                                                                                           \
        long long got_ = (long long)(got), want_ = (long long)(want);                              \
        if (got_ != want_)                                                                         \
            FAIL("expected: %s == %s, but %lld (%#llx) is not %lld (%#llx)", #got, #want, got_,    \
                 (unsigned long long)got_, want_, (unsigned long long)want_);                      \
    } while (0)
/* A native function that fills in a struct dm_error. */
#define EXPECT_OK(call, error)                                                                     \
    do {                                                                                           \
        int status_ = (call);                                                                      \
        if (status_)                                                                               \
            FAIL("expected: %s succeeds, but status %d: %s", #call, status_, (error)->text);       \
    } while (0)

/* Run a test and print its name, which is a claim. */
#define HOLDS(test) (test(), printf("%s\n", #test))

/* ---------------------------------------------------------------- random numbers: splitmix64 */

struct rng {
    uint64_t state;
};

static inline uint64_t rng_next(struct rng *r) {
    uint64_t z = r->state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

/* In [0, n). */
static inline uint32_t rng_below(struct rng *r, uint32_t n) {
    return (uint32_t)((rng_next(r) >> 32) * n >> 32);
}

struct rng rng_start(void);

/* DM_TEST_SLOW=1: look everywhere instead of in a sample. */
int check_slow(void);

#ifdef __SANITIZE_THREAD__
#define CHECK_TSAN 1
#else
#define CHECK_TSAN 0
#endif
#ifdef __SANITIZE_ADDRESS__
#define CHECK_ASAN 1
#else
#define CHECK_ASAN 0
#endif
#define CHECK_SANITIZED (CHECK_TSAN || CHECK_ASAN)

#endif
