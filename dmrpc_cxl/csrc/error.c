/* error.c - reporting failures, and the one way the DM layer ends a process. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "host.h"

int dm_fail(struct dm_error *e, int status, const char *fmt, ...) {
    if (e && fmt) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(e->text, sizeof e->text, fmt, ap);
        va_end(ap);
    }
    return status;
}

int dm_fail_sys(struct dm_error *e, const char *syscall, uint64_t address) {
    int saved = errno;
    if (e) {
        e->sys_errno = saved;
        e->syscall = syscall;
        e->address = address;
    }
    if (saved == EBADF)
        return DM_ERR_DESCRIPTOR_LOST;
    return saved == ENOMEM ? DM_ERR_NO_MEMORY : DM_ERR_SYSTEM;
}

/*
 * Stop this process: isolation can no longer be kept. Written with write(2) alone, for it runs while other
 * threads may hold the GIL, stdio's locks or malloc's.
 * Context: any thread.
 */
void dm_fatal(struct dm_host *h, const char *fmt, ...) {
    char text[768];
    int n = snprintf(text, sizeof text, "dmrpc: fatal: fabric %s, host %u (%s): ", h->fabric, h->id,
                     h->name);
    va_list ap;
    va_start(ap, fmt);
    n += vsnprintf(text + n, sizeof text - (size_t)n, fmt, ap);
    va_end(ap);
    if (n > (int)sizeof text - 2)
        n = (int)sizeof text - 2;
    text[n++] = '\n';
    ssize_t ignored = write(2, text, (size_t)n);
    (void)ignored;
    abort();
}

uint64_t dm_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Is fd still the file it was? Somebody may have closed it and the number may be another's by now. */
int dm_descriptor_check(int fd, uint64_t dev, uint64_t ino) {
    struct stat st;
    if (fstat(fd, &st) < 0 || (uint64_t)st.st_dev != dev || (uint64_t)st.st_ino != ino) {
        errno = EBADF;
        return -1;
    }
    return 0;
}
