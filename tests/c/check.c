/* check.c - see check.h. */
#include "check.h"

#include <stdarg.h>

char check_doing[256];

void check_failed(const char *file, int line, const char *format, ...) {
    va_list args;
    fflush(stdout);
    fprintf(stderr, "%s:%d: ", file, line);
    if (check_doing[0])
        fprintf(stderr, "%s: ", check_doing);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    fflush(stderr);
    _exit(1);
}

struct rng rng_start(void) {
    const char *given = getenv("DM_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct rng r = {given ? strtoull(given, NULL, 0)
                          : (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec};
    printf("DM_TEST_SEED=%llu\n", (unsigned long long)r.state);
    fflush(stdout);
    return r;
}

int check_slow(void) {
    const char *slow = getenv("DM_TEST_SLOW");
    return slow && *slow && *slow != '0';
}
