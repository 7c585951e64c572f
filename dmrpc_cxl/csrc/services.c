/*
 * services.c - the service table, see layout.h: published names, kept where the next coordinator finds them.
 *
 * Nothing here keeps state of its own. Which slots are free follows from the chains of the live heads, walked anew for
 * each new entry: publishing is rare, a table has a thousand slots. Bytes that make no sense (a chain that leaves
 * the table or runs in a circle, a wrong checksum) make an entry damaged, never a crash.
 *
 * A coordinator that was stopped in the midst of writing and replaced makes the rest of its stores all the same. The mark in the
 * superblock (dm_device_begin_change) tells its successor, who leaves the table as it is until that one is gone, and then
 * frees what it does not know.
 *
 * Context: the coordinator writes, one change at a time; anybody may read. No locks, no GIL.
 */
#include <stdlib.h>

#include "device_private.h"

static uint64_t fnv(uint64_t hash, const void *data, size_t bytes) {
    const uint8_t *at = data;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ at[i]) * 0x100000001b3ull;
    return hash;
}

static uint64_t checksum_of(const struct dm_service *what) {
    const uint64_t words[] = {what->incarnation, what->serial,
                              (uint64_t)what->host << 32 | what->name_bytes, what->endpoint_bytes};
    uint64_t hash = fnv(0xcbf29ce484222325ull, words, sizeof words);
    return fnv(hash, what->text, (size_t)what->name_bytes + what->endpoint_bytes);
}

static uint32_t slots_for(uint64_t bytes) {
    return bytes ? (uint32_t)((bytes + DM_SERVICE_SLOT_ROOM - 1) / DM_SERVICE_SLOT_ROOM) : 1;
}

/*
 * Read the entry whose head is `slot`. Returns 1, 0 when no live entry begins there, or DM_ERR_CORRUPT; out->host
 * and out->serial are filled in even so.
 */
int dm_device_service(const struct dm_device *dev, uint32_t slot, struct dm_service *out) {
    if (slot >= dev->geo.nr_services)
        return 0;
    const struct dm_service_slot *at = dev->services + slot;
    uint32_t state = __atomic_load_n(&at->state, __ATOMIC_ACQUIRE);
    if (state == DM_SERVICE_FREE)
        return 0;
    out->slot = slot;
    out->host = at->host;
    out->incarnation = at->incarnation;
    out->serial = at->serial;
    out->name_bytes = at->name_bytes;
    out->endpoint_bytes = at->endpoint_bytes;
    if (state != DM_SERVICE_LIVE || out->name_bytes == 0 || out->name_bytes > DM_MAX_SERVICE_NAME ||
        out->endpoint_bytes > DM_MAX_SERVICE_ENDPOINT)
        return DM_ERR_CORRUPT;
    uint64_t checksum = at->checksum;
    uint32_t left = out->name_bytes + out->endpoint_bytes, done = 0;
    for (;;) {
        uint32_t part = left < DM_SERVICE_SLOT_ROOM ? left : DM_SERVICE_SLOT_ROOM;
        memcpy(out->text + done, at->text, part);
        done += part;
        left -= part;
        if (left == 0)
            break;
        uint32_t next = at->next;
        if (next == 0 || next > dev->geo.nr_services)
            return DM_ERR_CORRUPT;
        at = dev->services + next - 1;
    }
    return checksum == checksum_of(out) ? 1 : DM_ERR_CORRUPT;
}

/* Mark every slot that belongs to a live entry; returns the highest serial number. */
static uint64_t mark_used(const struct dm_device *dev, uint8_t *used) {
    uint64_t highest = 0;
    for (uint32_t i = 0; i < dev->geo.nr_services; i++) {
        const struct dm_service_slot *at = dev->services + i;
        if (at->serial > highest) /* of free slots, too: a serial number is never used again */
            highest = at->serial;
        if (at->state == DM_SERVICE_FREE)
            continue;
        uint32_t slots = slots_for((uint64_t)at->name_bytes + at->endpoint_bytes);
        used[i] = 1;
        for (uint32_t k = 1; k < slots && at->next && at->next <= dev->geo.nr_services; k++) {
            used[at->next - 1] = 1;
            at = dev->services + at->next - 1;
        }
    }
    return highest;
}

static int write_entry(struct dm_device *dev, struct dm_service entry, struct dm_error *err) {
    uint32_t bytes = entry.name_bytes + entry.endpoint_bytes, nr = slots_for(bytes), found = 0;
    uint32_t chain[(DM_MAX_SERVICE_NAME + DM_MAX_SERVICE_ENDPOINT) / DM_SERVICE_SLOT_ROOM + 1];
    uint8_t *used = calloc(dev->geo.nr_services, 1);
    if (!used)
        return dm_device_fail(err, DM_ERR_NO_MEMORY, "no memory to look for a service slot");
    entry.serial = mark_used(dev, used) + 1;
    for (uint32_t i = 0; i < dev->geo.nr_services && found < nr; i++)
        if (!used[i])
            chain[found++] = i;
    free(used);
    if (found < nr)
        return dm_device_fail(
            err, DM_ERR_NO_SERVICE_SLOT,
            "the service table has %u of the %u free slots that this name and endpoint "
            "need, of %llu: withdraw names, or create the fabric for more hosts",
            found, nr, (unsigned long long)dev->geo.nr_services);
    for (uint32_t i = nr; i-- > 0;) { /* from the end: a head is written last */
        struct dm_service_slot *at = dev->services + chain[i];
        uint32_t from = i * DM_SERVICE_SLOT_ROOM, part = bytes - from;
        memcpy(at->text, entry.text + from,
               part < DM_SERVICE_SLOT_ROOM ? part : DM_SERVICE_SLOT_ROOM);
        at->next = i + 1 < nr ? chain[i + 1] + 1 : 0;
    }
    struct dm_service_slot *head = dev->services + chain[0];
    head->serial = entry.serial;
    head->incarnation = entry.incarnation;
    head->host = entry.host;
    head->name_bytes = entry.name_bytes;
    head->endpoint_bytes = entry.endpoint_bytes;
    head->checksum = checksum_of(&entry);
    int status =
        dm_device_check_writable(dev, err); /* once more: nothing before this store can be seen */
    if (status != DM_OK)
        return status;
    DM_CRASH_POINT(service_written);
    __atomic_store_n(&head->state, DM_SERVICE_LIVE, __ATOMIC_RELEASE);
    DM_CRASH_POINT(service_live);
    return (int)chain[0];
}

/*
 * Add an entry; what->slot and what->serial are chosen here. The caller withdraws an older entry of the same name
 * afterwards. Returns the head's slot, DM_ERR_BAD_SIZE, DM_ERR_NO_SERVICE_SLOT, DM_ERR_NO_MEMORY or DM_ERR_REPLACED; after
 * a failure, and after a crash anywhere before the last store, the table says what it said before.
 */
int dm_device_publish(struct dm_device *dev, const struct dm_service *what, struct dm_error *err) {
    int status = dm_device_check_writable(dev, err);
    if (status != DM_OK)
        return status;
    if (what->name_bytes == 0 || what->name_bytes > DM_MAX_SERVICE_NAME ||
        what->endpoint_bytes > DM_MAX_SERVICE_ENDPOINT || what->host < 1 ||
        what->host > dev->geo.max_hosts)
        return dm_device_fail(err, DM_ERR_BAD_SIZE,
                              "a name of %u bytes, an endpoint of %u, host %u", what->name_bytes,
                              what->endpoint_bytes, what->host);
    status = dm_device_begin_change(dev, &dev->sb->changing_services, 1, err);
    if (status != DM_OK)
        return status;
    status = write_entry(dev, *what, err);
    dm_device_end_change(dev, &dev->sb->changing_services, 1);
    return status;
}

/* Free the entry of that serial number at `slot`; nothing happens when another one is there. */
int dm_device_withdraw(struct dm_device *dev, uint32_t slot, uint64_t serial,
                       struct dm_error *err) {
    int status = dm_device_check_writable(dev, err);
    if (status != DM_OK || slot >= dev->geo.nr_services)
        return status;
    status = dm_device_begin_change(dev, &dev->sb->changing_services, 1, err);
    if (status != DM_OK)
        return status;
    if (dev->services[slot].serial == serial) {
        __atomic_store_n(&dev->services[slot].state, DM_SERVICE_FREE, __ATOMIC_RELEASE);
        DM_CRASH_POINT(service_withdrawn);
    }
    dm_device_end_change(dev, &dev->sb->changing_services, 1);
    return DM_OK;
}
