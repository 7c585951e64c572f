/* crash.c - see crash.h. Context: any thread, any lock; a process is armed before it has threads that pass points. */
#define _GNU_SOURCE
#include "crash.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

bool dm_crash_armed;
static int where;     /* label; DM_CRASH_none: count only */
static uint64_t left; /* passes until then */
static struct dm_crash_record *record;

const struct dm_crash_info dm_crash_labels[DM_CRASH_NR] = {
    {"none", "none of them"},
#define CRASH_INFO(name, text) {#name, text},
    DM_CRASH_LABELS(CRASH_INFO)
#undef CRASH_INFO
};

int dm_crash_label(const char *name) {
    for (int i = 0; i < DM_CRASH_NR; i++)
        if (!strcmp(name, dm_crash_labels[i].name))
            return i;
    return -1;
}

void dm_crash_pass(int label) {
    if (record)
        __atomic_fetch_add(&record->passes[label], 1, __ATOMIC_RELAXED);
    if (label != where || __atomic_sub_fetch(&left, 1, __ATOMIC_RELAXED) != 0)
        return;
    if (record)
        __atomic_fetch_add(&record->deaths[label], 1, __ATOMIC_RELAXED);
    for (;;)
        kill(getpid(), SIGKILL); /* no instruction of any thread comes after it */
}

/* Die at the pass-th time that this process comes to a label; none: count only. Returns 0, or an errno when the record
 * cannot be used. */
int dm_crash_arm(int label, uint64_t pass, const char *path) {
    if (label < 0 || label >= DM_CRASH_NR || (label != DM_CRASH_none && pass == 0))
        return EINVAL;
    struct dm_crash_record *at = NULL;
    if (path) {
        int fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd < 0)
            return errno;
        at = mmap(NULL, sizeof *at, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        int failed = at == MAP_FAILED ? errno : lseek(fd, 0, SEEK_END) < (off_t)sizeof *at ? EINVAL : 0;
        close(fd);
        if (failed)
            return failed;
    }
    if (record)
        munmap(record, sizeof *record);
    record = at;
    where = label;
    left = pass;
    __atomic_store_n(&dm_crash_armed, true, __ATOMIC_RELEASE);
    return 0;
}

/* Once; a process that misspells what it was asked for must not look as if it had survived. */
void dm_crash_read_environment(void) {
    const char *at = getenv("DMRPC_CRASH_AT");
    if (dm_crash_armed || !at || !*at)
        return;
    char name[64] = "";
    unsigned long long pass = 1;
    int failed = EINVAL;
    if (sscanf(at, "%63[a-z_]:%llu", name, &pass) >= 1)
        failed = dm_crash_arm(dm_crash_label(name), pass, getenv("DMRPC_CRASH_RECORD"));
    if (failed) {
        fprintf(stderr, "dmrpc: DMRPC_CRASH_AT=%s: %s\n", at, strerror(failed));
        abort();
    }
}
