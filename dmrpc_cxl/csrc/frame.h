/*
 * frame.h - the header of every frame of the RPC layer: its one definition, its limits, and how it is checked.
 *
 * What the fields mean: dmrpc_cxl/rpc/frames.py. Behind the header come Refs, metadata, the body, and from inline_at on
 * what travels by value; they fill the frame exactly.
 */
#ifndef DM_FRAME_H
#define DM_FRAME_H

#include <assert.h>
#include <stdint.h>

#include "status.h"

struct dm_frame {
    uint32_t size; /* of the whole frame */
    uint8_t kind;
    uint8_t flags;
    uint16_t nr_refs;
    uint64_t call_id;
    uint64_t time_left_us;
    uint32_t method;
    uint32_t meta_bytes;
    uint32_t body_bytes;
    uint32_t inline_at;
};

enum dm_frame_limit {
    DM_FRAME_HEADER = 40,
    DM_FRAME_REF = 40,
    DM_FRAME_KNOWN_FLAGS = 63,
    DM_FRAME_MAX_REFS = 0xffff,
    DM_FRAME_MAX_META = 64 << 10,
    DM_FRAME_MAX_BYTES = 1 << 30,
    /* a frame's buffer has so much at first, untouched, whatever its sender claims */
    DM_FRAME_BELIEVED = 16 << 20,
    DM_FRAME_ALIGNMENT = 64,
};

enum dm_frame_kind {
    DM_FRAME_HELLO = 1,
    DM_FRAME_WELCOME,
    DM_FRAME_CALL,
    DM_FRAME_REPLY,
    DM_FRAME_ERROR,
    DM_FRAME_CANCEL,
    DM_FRAME_DISCARD,
    DM_FRAME_GOAWAY,
};

#define DM_FRAME_FIRST_KIND DM_FRAME_HELLO
#define DM_FRAME_LAST_KIND DM_FRAME_GOAWAY

static_assert(sizeof(struct dm_frame) == DM_FRAME_HEADER, "no padding");

/* Is this the header of a frame of that many bytes? h: a private copy. DM_ERR_PROTOCOL, with a text, if not. */
int dm_frame_check(const struct dm_frame *h, uint64_t bytes, struct dm_error *e);

#endif
