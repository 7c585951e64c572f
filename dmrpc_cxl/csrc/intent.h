/*
 * intent.h - the host's intent record: what recovery needs to know if the process dies inside an operation.
 *
 * A record is complete before op is set (release) and op is zeroed (release) before the fields are used again. The
 * reader is the coordinator, after the process is gone: it needs program order as stored, and on a coherent memory
 * stores of one thread to the device become visible in order once the compiler keeps them in order.
 */
#ifndef DM_INTENT_H
#define DM_INTENT_H

#include "host.h"

static inline struct dm_intent *dm_intent_begin(struct dm_host *h, uint32_t op, uint32_t page,
                                                uint32_t nr, uint32_t pfn, uint32_t ref,
                                                uint64_t ref_state) {
    struct dm_intent *in = &h->entry->intent;
    /* The stores below stay behind the one that ended the record before: a release orders only what precedes it. Against
     * SIGKILL the compiler's order is all that matters. */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    in->page = page;
    in->nr = nr;
    in->pfn = pfn;
    in->ref = ref;
    in->ref_state = ref_state;
    in->progress = 0;
    __atomic_store_n(&in->op, op, __ATOMIC_RELEASE);
    /* Later stores must not move above op: a full barrier for the compiler, none needed of x86 or of
     * the release/acquire atomics that follow. */
    __atomic_thread_fence(__ATOMIC_ACQ_REL);
    return in;
}

static inline void dm_intent_progress(struct dm_intent *in, uint64_t progress) {
    __atomic_store_n(&in->progress, progress, __ATOMIC_RELEASE);
}

static inline void dm_intent_end(struct dm_intent *in) {
    __atomic_store_n(&in->op, DM_INTENT_NONE, __ATOMIC_RELEASE);
}

#endif
