/* stores.c - see stores.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "stores.h"

#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "check.h"

static struct {
    char *base;
    size_t bytes;
    void (*after)(void *arg);
    void *arg;
    volatile bool on;
    struct sigaction old_segv, old_trap;
} watch;

static void protect(int how) {
    if (mprotect(watch.base, watch.bytes, how) < 0)
        FAIL("expected: mprotect of the watched range succeeds");
}

#if defined(__x86_64__)

#define TRAP_FLAG 0x100

bool stores_can_be_watched(void) { return true; }

static void before_store(int signal, siginfo_t *info, void *context) {
    ucontext_t *u = context;
    (void)signal;
    if (!watch.on || (uintptr_t)info->si_addr - (uintptr_t)watch.base >= watch.bytes) {
        sigaction(SIGSEGV, &watch.old_segv,
                  NULL); /* somebody's mistake: it faults again, for good */
        return;
    }
    protect(PROT_READ | PROT_WRITE);
    u->uc_mcontext.gregs[REG_EFL] |= TRAP_FLAG;
}

static void after_store(int signal, siginfo_t *info, void *context) {
    ucontext_t *u = context;
    (void)signal;
    (void)info;
    u->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
    watch.after(watch.arg);
    if (watch.on)
        protect(PROT_READ);
}

#else

bool stores_can_be_watched(void) { return false; }
static void before_store(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info, (void)context;
}
static void after_store(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info, (void)context;
}

#endif

void stores_watch(void *base, size_t bytes, void (*after)(void *arg), void *arg) {
    struct sigaction segv = {.sa_sigaction = before_store, .sa_flags = SA_SIGINFO};
    struct sigaction trap = {.sa_sigaction = after_store, .sa_flags = SA_SIGINFO};
    watch.base = base;
    watch.bytes = bytes;
    watch.after = after;
    watch.arg = arg;
    EXPECT(!sigaction(SIGSEGV, &segv, &watch.old_segv));
    EXPECT(!sigaction(SIGTRAP, &trap, &watch.old_trap));
    watch.on = true;
    protect(PROT_READ);
}

void stores_unwatch(void) {
    watch.on = false;
    protect(PROT_READ | PROT_WRITE);
    EXPECT(!sigaction(SIGSEGV, &watch.old_segv, NULL));
    EXPECT(!sigaction(SIGTRAP, &watch.old_trap, NULL));
}
