/* recover.h - reclaiming what a dead host held. Called by the coordinator, once the process is gone for certain. */
#ifndef DM_RECOVER_H
#define DM_RECOVER_H

#include "device.h"

struct dm_recovery {
    uint32_t intent;           /* what it was doing, enum dm_intent_op */
    uint64_t pages_unmapped;   /* PTEs whose counts were dropped */
    uint64_t refs_dropped;     /* Refs it held */
    uint64_t frames_reclaimed; /* frames that came to the pool */
    uint64_t refs_damaged;     /* entries that made no sense; left for `dmrpc fabric verify` */
    uint64_t duration_ns;
};

int dm_recover_host(struct dm_device *dev, uint32_t host, struct dm_recovery *out,
                    struct dm_error *e);

#endif
