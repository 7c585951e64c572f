/* freelist.c - see freelist.h. Context: host lock held, any thread; never blocks. */
#include "freelist.h"

#include <stdlib.h>
#include <string.h>

int dm_freelist_init(struct dm_freelist *fl, uint32_t nr_frames) {
    memset(fl, 0, sizeof *fl);
    size_t words = ((size_t)nr_frames + 63) / 64 + 1;
    fl->bits = calloc(words, sizeof *fl->bits);
    fl->displaced = calloc(words, sizeof *fl->displaced);
    fl->nr_frames = nr_frames;
    if (!fl->bits || !fl->displaced) {
        dm_freelist_destroy(fl);
        return -1;
    }
    return 0;
}

void dm_freelist_destroy(struct dm_freelist *fl) {
    free(fl->bits);
    free(fl->displaced);
    memset(fl, 0, sizeof *fl);
}

static void set_range(uint64_t *bits, uint32_t first, uint32_t nr, bool value) {
    uint32_t end = first + nr;
    while (first < end) {
        uint32_t offset = first % 64, take = 64 - offset;
        if (take > end - first)
            take = end - first;
        uint64_t mask = (take == 64 ? ~0ull : (1ull << take) - 1) << offset;
        if (value)
            bits[first / 64] |= mask;
        else
            bits[first / 64] &= ~mask;
        first += take;
    }
}

static bool test_bit(const uint64_t *bits, uint32_t n) { return bits[n / 64] >> (n % 64) & 1; }

/* First position >= from, < end, whose bit equals value; end when there is none. */
static uint32_t scan(const uint64_t *bits, uint32_t from, uint32_t end, bool value) {
    while (from < end) {
        uint64_t word = (value ? bits[from / 64] : ~bits[from / 64]) >> (from % 64);
        if (word) {
            from += (uint32_t)__builtin_ctzll(word);
            return from < end ? from : end;
        }
        from = (from / 64 + 1) * 64;
    }
    return end;
}

/* First run of nr set bits that starts in [from, end). */
static bool find_run(const struct dm_freelist *fl, uint32_t from, uint32_t end, uint32_t nr,
                     uint32_t *pfn) {
    while ((from = scan(fl->bits, from, end, true)) < end) {
        uint32_t limit = fl->nr_frames - from < nr ? fl->nr_frames : from + nr;
        uint32_t stop = scan(fl->bits, from, limit, false);
        if (stop - from >= nr) {
            *pfn = from;
            return true;
        }
        from = stop;
    }
    return false;
}

void dm_freelist_put_cold(struct dm_freelist *fl, uint32_t pfn, uint32_t nr) {
    set_range(fl->bits, pfn, nr, true);
    fl->nr_in_bits += nr;
    fl->nr_free += nr;
}

static void quick_to_bits(struct dm_freelist *fl, uint32_t runs) {
    for (uint32_t i = 0; i < runs; i++) {
        set_range(fl->bits, fl->quick[i].pfn, fl->quick[i].count, true);
        fl->nr_in_bits += fl->quick[i].count;
    }
    fl->nr_quick -= runs;
    memmove(fl->quick, fl->quick + runs, fl->nr_quick * sizeof fl->quick[0]);
}

void dm_freelist_put(struct dm_freelist *fl, uint32_t pfn, uint32_t nr) {
    if (fl->nr_quick == DM_QUICK_RUNS)
        quick_to_bits(fl, DM_QUICK_RUNS / 2);
    fl->quick[fl->nr_quick++] = (struct dm_run){pfn, nr};
    fl->nr_free += nr;
}

void dm_freelist_put_displaced(struct dm_freelist *fl, uint32_t pfn) {
    set_range(fl->displaced, pfn, 1, true);
    fl->nr_displaced++;
    fl->nr_free++;
}

void dm_freelist_vacated(struct dm_freelist *fl, uint32_t pfn) {
    if (!fl->nr_displaced || !test_bit(fl->displaced, pfn))
        return;
    set_range(fl->displaced, pfn, 1, false);
    fl->nr_displaced--;
    fl->nr_free--;
    dm_freelist_put_cold(fl, pfn, 1);
}

static bool take_from_bits(struct dm_freelist *fl, uint32_t nr, uint32_t *pfn) {
    if (fl->nr_in_bits < nr)
        return false;
    if (!find_run(fl, fl->cursor, fl->nr_frames, nr, pfn) && !find_run(fl, 0, fl->cursor, nr, pfn))
        return false;
    set_range(fl->bits, *pfn, nr, false);
    fl->nr_in_bits -= nr;
    fl->nr_free -= nr;
    fl->cursor = *pfn + nr < fl->nr_frames ? *pfn + nr : 0;
    return true;
}

bool dm_freelist_take(struct dm_freelist *fl, uint32_t nr, uint32_t *pfn) {
    if (nr == 0 || fl->nr_free < nr)
        return false;
    for (uint32_t i = fl->nr_quick; i-- > 0;) {
        if (fl->quick[i].count == nr) {
            *pfn = fl->quick[i].pfn;
            fl->nr_quick--;
            memmove(fl->quick + i, fl->quick + i + 1, (fl->nr_quick - i) * sizeof fl->quick[0]);
            fl->nr_free -= nr;
            return true;
        }
    }
    if (take_from_bits(fl, nr, pfn))
        return true;
    if (!fl->nr_quick)
        return false;
    quick_to_bits(fl, fl->nr_quick);
    return take_from_bits(fl, nr, pfn);
}

uint32_t dm_freelist_take_upto(struct dm_freelist *fl, uint32_t nr, uint32_t *pfn) {
    if (nr == 0)
        return 0;
    if (fl->nr_displaced) {
        uint32_t first = scan(fl->displaced, fl->displaced_cursor, fl->nr_frames, true);
        if (first == fl->nr_frames)
            first = scan(fl->displaced, 0, fl->nr_frames, true);
        uint32_t limit = fl->nr_frames - first < nr ? fl->nr_frames : first + nr;
        uint32_t got = scan(fl->displaced, first, limit, false) - first;
        set_range(fl->displaced, first, got, false);
        fl->nr_displaced -= got;
        fl->nr_free -= got;
        fl->displaced_cursor = first + got < fl->nr_frames ? first + got : 0;
        *pfn = first;
        return got;
    }
    for (; nr > 1; nr = (nr + 1) / 2)
        if (dm_freelist_take(fl, nr, pfn))
            return nr;
    return dm_freelist_take(fl, 1, pfn) ? 1 : 0;
}

uint32_t dm_freelist_evict(struct dm_freelist *fl, uint32_t nr, uint32_t *pfn) {
    if (nr == 0 || fl->nr_free == 0)
        return 0;
    if (fl->nr_displaced)
        return dm_freelist_take_upto(fl, nr, pfn);
    if (fl->nr_in_bits == 0)
        quick_to_bits(fl, (fl->nr_quick + 1) / 2);
    uint32_t first = scan(fl->bits, fl->cursor, fl->nr_frames, true);
    if (first == fl->nr_frames)
        first = scan(fl->bits, 0, fl->nr_frames, true);
    uint32_t limit = fl->nr_frames - first < nr ? fl->nr_frames : first + nr;
    uint32_t got = scan(fl->bits, first, limit, false) - first;
    set_range(fl->bits, first, got, false);
    fl->nr_in_bits -= got;
    fl->nr_free -= got;
    *pfn = first;
    return got;
}

bool dm_freelist_has(const struct dm_freelist *fl, uint32_t pfn) {
    if (test_bit(fl->bits, pfn) || test_bit(fl->displaced, pfn))
        return true;
    for (uint32_t i = 0; i < fl->nr_quick; i++)
        if (pfn - fl->quick[i].pfn < fl->quick[i].count)
            return true;
    return false;
}

bool dm_freelist_overlaps(const struct dm_freelist *fl, uint32_t pfn, uint32_t nr) {
    for (uint32_t i = 0; i < fl->nr_quick; i++)
        if (fl->quick[i].pfn < pfn + nr && pfn < fl->quick[i].pfn + fl->quick[i].count)
            return true;
    return (fl->nr_in_bits && scan(fl->bits, pfn, pfn + nr, true) != pfn + nr) ||
           (fl->nr_displaced && scan(fl->displaced, pfn, pfn + nr, true) != pfn + nr);
}
