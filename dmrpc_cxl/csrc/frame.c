/* frame.c - what no header may say. */
#include "frame.h"

#include "host.h"

int dm_frame_check(const struct dm_frame *h, uint64_t bytes, struct dm_error *e) {
    uint64_t end = DM_FRAME_HEADER + DM_FRAME_REF * (uint64_t)h->nr_refs + h->meta_bytes +
                   (uint64_t)h->body_bytes;
    if (h->size != bytes)
        return dm_fail(e, DM_ERR_PROTOCOL, "a frame of %llu bytes says that it has %u",
                       (unsigned long long)bytes, h->size);
    if (h->kind < DM_FRAME_FIRST_KIND || h->kind > DM_FRAME_LAST_KIND)
        return dm_fail(e, DM_ERR_PROTOCOL, "a frame of unknown kind %u", h->kind);
    if (h->flags & ~DM_FRAME_KNOWN_FLAGS)
        return dm_fail(e, DM_ERR_PROTOCOL, "a frame with unknown flags %#x", h->flags);
    if (h->meta_bytes > DM_FRAME_MAX_META)
        return dm_fail(e, DM_ERR_PROTOCOL, "%u bytes of metadata; %u are allowed", h->meta_bytes,
                       (unsigned)DM_FRAME_MAX_META);
    if (h->inline_at) {
        if (h->inline_at % DM_FRAME_ALIGNMENT || h->inline_at < end || h->inline_at > h->size)
            return dm_fail(e, DM_ERR_PROTOCOL, "inline data cannot begin at byte %u of %u",
                           h->inline_at, h->size);
    } else if (end != h->size) {
        return dm_fail(e, DM_ERR_PROTOCOL, "the parts of a frame of %u bytes have %llu", h->size,
                       (unsigned long long)end);
    }
    return DM_OK;
}
