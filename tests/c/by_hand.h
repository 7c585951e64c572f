/*
 * by_hand.h - a device in memory and hosts on it, made without a coordinator.
 *
 * The device has pages of 4 KiB and page tables that are much smaller than a real device's, so that they can be copied and
 * walked thousands of times. A host has its tables and windows but no fault handler: its locks are taken by the test.
 * It gets a userfaultfd where this process may have one; otherwise another descriptor stands in for it, operations that
 * protect pages fail, and the rest works.
 *
 * Several hosts may live in one process, each with its own windows on the same device.
 */
#ifndef DM_TEST_BY_HAND_H
#define DM_TEST_BY_HAND_H

#include "dm.h"

#define BY_HAND_PAGE 4096u
#define BY_HAND_AREA_PAGES 640u /* of each host's VMA area, at least */

/* Unnamed file in memory, formatted and opened. Host entries are FREE, all frames the pool's. */
void by_hand_device(struct dm_device *dev, uint32_t nr_frames, uint32_t max_hosts,
                    uint32_t max_refs);
void by_hand_activate(struct dm_device *dev, uint32_t host);

/* Is there userfaultfd for this process? *why says why not. */
bool by_hand_has_uffd(const char **why);

/* A host of dev, whose entry is active. dev must live longer. */
struct dm_host *by_hand_host(struct dm_device *dev, uint16_t id);
void by_hand_host_free(struct dm_host *h);

/* What a grant does: frames [pfn, pfn + nr) of the pool become h's and go on its free list. */
void by_hand_grant(struct dm_host *h, uint32_t pfn, uint32_t nr);

/* The bytes that a page of h's page table shows. */
static inline char *by_hand_bytes(const struct dm_host *h, uint32_t page) {
    return dm_frame_data(h, h->pt[page] & DM_PTE_PFN);
}

/* The audit of dev; valid until the next call. */
const struct dm_audit *by_hand_audit(const struct dm_device *dev);
/* The same; violations and operations in flight fail the test. */
const struct dm_audit *by_hand_exact(const struct dm_device *dev);

#endif
