/* fault.h - serving one page fault (fault.c), for the handler thread (handler.c). */
#ifndef DM_FAULT_H
#define DM_FAULT_H

#include "dm.h"

enum { DM_FAULT_SERVED = 0, DM_FAULT_NO_FRAME = 1 };

struct dm_stray { /* the last fault at an address without a mapping */
    uint64_t addr, when_ns;
    uint32_t tid;
};

/* Would a store there still fault? */
bool dm_fault_pending(const struct dm_host *h, uint64_t addr);
int dm_serve_fault(struct dm_host *h, struct dm_stray *last, uint64_t addr, uint32_t tid);

#endif
