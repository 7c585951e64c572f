/*
 * stores.h - stop at every store to a range of memory.
 *
 * The range is made read-only. A store to it raises SIGSEGV, whose handler makes the range writable and sets the trap flag; the
 * processor executes that one instruction and raises SIGTRAP, whose handler makes the range read-only again and calls back.
 * So every instruction that stores to the range is seen, in program order, with nothing between two of them; all other
 * code runs at full speed. The signals belong to the instruction that stores, so the callback may do whatever that
 * code could have done instead: it does not interrupt malloc or a lock, unless these live in the range.
 *
 * One range at a time, one thread that stores. x86-64 only: elsewhere a program cannot single-step itself.
 */
#ifndef DM_TEST_STORES_H
#define DM_TEST_STORES_H

#include <stdbool.h>
#include <stddef.h>

bool stores_can_be_watched(void);
/* after() is called behind each store to [base, base + bytes), whole pages of memory. The range is writable inside. */
void stores_watch(void *base, size_t bytes, void (*after)(void *arg), void *arg);
/* Also from inside after(). */
void stores_unwatch(void);

#endif
