/* crash.c - see crash.h. Context: any thread, any lock, with the GIL or without. */
#define _GNU_SOURCE
#include "crash.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LABEL_SHIFT 48
#define PASSES ((1ull << LABEL_SHIFT) - 1)

bool dm_crash_armed;
/* Label, and in the lower bits the passes until death: one word, so that who is armed anew while other threads pass points
 * dies where it was told last. Label DM_CRASH_none: only count. */
static uint64_t target;
static uint64_t stops; /* the same, for stopping before that */
static struct dm_crash_record *record;

const struct dm_crash_info dm_crash_labels[DM_CRASH_NR] = {{"none", "none of them"},
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

static void count(uint64_t *of) { __atomic_fetch_add(of, 1, __ATOMIC_RELAXED); }

/* Is this the pass that a target counts down to? */
static bool comes_due(uint64_t *of, int label) {
    uint64_t at = __atomic_load_n(of, __ATOMIC_ACQUIRE);
    do {
        if (label != (int)(at >> LABEL_SHIFT) || !(at & PASSES))
            return false;
    } while (
        !__atomic_compare_exchange_n(of, &at, at - 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    return !((at - 1) & PASSES);
}

void dm_crash_pass(int label) {
    struct dm_crash_record *r = __atomic_load_n(&record, __ATOMIC_ACQUIRE);
    if (r)
        count(&r->passes[label]);
    if (comes_due(&stops, label)) /* this thread, at once, and then all others */
        (void)syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGSTOP);
    if (!comes_due(&target, label))
        return;
    if (r)
        count(&r->deaths[label]);
    for (;;)
        kill(getpid(), SIGKILL); /* no instruction of any thread comes after it */
}

#if defined(__x86_64__)
/* dm_crash_pass of what lies on the stack, and every register as before: see DM_CRASH_CALL. */
__asm__(".text\n"
        ".hidden dm_crash_pass_preserving\n"
        ".globl dm_crash_pass_preserving\n"
        ".type dm_crash_pass_preserving, @function\n"
        "dm_crash_pass_preserving:\n"
        "    pushq %rbp\n"
        "    movq %rsp, %rbp\n"
        "    pushq %rax\n"
        "    pushq %rcx\n"
        "    pushq %rdx\n"
        "    pushq %rsi\n"
        "    pushq %rdi\n"
        "    pushq %r8\n"
        "    pushq %r9\n"
        "    pushq %r10\n"
        "    pushq %r11\n"
        "    movq 16(%rbp), %rdi\n"
        "    andq $-16, %rsp\n"
        "    subq $512, %rsp\n"
        "    fxsave (%rsp)\n"
        "    call dm_crash_pass\n"
        "    fxrstor (%rsp)\n"
        "    leaq -72(%rbp), %rsp\n"
        "    popq %r11\n"
        "    popq %r10\n"
        "    popq %r9\n"
        "    popq %r8\n"
        "    popq %rdi\n"
        "    popq %rsi\n"
        "    popq %rdx\n"
        "    popq %rcx\n"
        "    popq %rax\n"
        "    popq %rbp\n"
        "    ret\n"
        ".size dm_crash_pass_preserving, . - dm_crash_pass_preserving\n");
#endif

static int map_record(const char *path, struct dm_crash_record **out) {
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return errno;
    void *at = MAP_FAILED;
    int failed = lseek(fd, 0, SEEK_END) < (off_t)sizeof **out ? EINVAL : 0;
    if (!failed) {
        at = mmap(NULL, sizeof **out, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        failed = at == MAP_FAILED ? errno : 0;
    }
    close(fd);
    *out = failed ? NULL : at;
    return failed;
}

static bool makes_sense(int label, uint64_t pass) {
    return label >= 0 && label < DM_CRASH_NR && pass <= PASSES &&
           (label == DM_CRASH_none || pass > 0);
}

/* Stop, as by SIGSTOP, at the pass-th time from now on that this process comes to a label: so that others may do something just
 * then. Once, and only if the process is armed as well. Returns 0 or an errno. */
int dm_crash_stop_at(int label, uint64_t pass) {
#ifdef DM_NO_CRASH_POINTS
    return ENOTSUP;
#endif
    if (!makes_sense(label, pass))
        return EINVAL;
    __atomic_store_n(&stops, (uint64_t)label << LABEL_SHIFT | pass, __ATOMIC_RELEASE);
    return 0;
}

/* Die at the pass-th time from now on that this process comes to a label; none: count only. path: of a record, or NULL.
 * Returns 0, or an errno when the record cannot be used. A record once used stays mapped: another thread may be at it. */
int dm_crash_arm(int label, uint64_t pass, const char *path) {
    struct dm_crash_record *r = NULL;
#ifdef DM_NO_CRASH_POINTS
    return ENOTSUP;
#endif
    if (!makes_sense(label, pass))
        return EINVAL;
    int failed = path ? map_record(path, &r) : 0;
    if (failed)
        return failed;
    __atomic_store_n(&target, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&record, r, __ATOMIC_RELEASE);
    __atomic_store_n(&target, (uint64_t)label << LABEL_SHIFT | pass, __ATOMIC_RELEASE);
    __atomic_store_n(&dm_crash_armed, true, __ATOMIC_RELEASE);
    return 0;
}

/* Context: attach, opening a device. The first time counts. Who misspells what it was asked for must not look as if it had
 * survived. */
void dm_crash_read_environment(void) {
    const char *at = getenv("DM_CRASH_POINT");
    if (__atomic_load_n(&dm_crash_armed, __ATOMIC_ACQUIRE) || !at || !*at)
        return;
    char name[64] = "", rest = 0;
    unsigned long long pass = 1;
    int fields = sscanf(at, "%63[a-z0-9_]:%llu%c", name, &pass, &rest), failed = EINVAL;
    if (fields == 2 || (fields == 1 && !strcmp(at, name)))
        failed = dm_crash_arm(dm_crash_label(name), pass, getenv("DM_CRASH_RECORD"));
    if (failed) {
        fprintf(stderr, "dmrpc: DM_CRASH_POINT=%s: %s\n", at, strerror(failed));
        abort();
    }
}
