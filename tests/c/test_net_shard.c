/* test_net_shard.c - pages, ranges, Refs and writes of one shard of a memory server: no threads, no sockets. */
#include <string.h>

#include "check.h"
#include "net_shard.h"

#define PAGE 4096u
#define PAGES 64u

static struct net_shard shard;
static uint8_t *memory;
static const struct net_limits plenty = {.max_pages = UINT64_MAX,
                                         .max_virtual = UINT64_MAX,
                                         .max_ranges = 1 << 20,
                                         .max_refs = 1 << 20,
                                         .max_outstanding = 64,
                                         .max_ref_slots = 1 << 20,
                                         .keep_ms = 1000};

static struct net_session *begin(const struct net_limits *limits) {
    memory = malloc((PAGES + 1) * PAGE);
    memset(memory, 0xee, (PAGES + 1) * PAGE);
    EXPECT_EQ(net_shard_open(&shard, 3, 5, memory, (PAGES + 1) * PAGE, 12, limits), NET_OK);
    return net_session_open(&shard, 7, 1, 2);
}

static struct net_audit audit(void) {
    struct net_audit found;
    EXPECT(net_shard_audit(&shard, &found));
    EXPECT_EQ(found.nr_violations, 0);
    EXPECT_EQ(found.nr_free + found.in_use, found.nr_pages);
    return found;
}

static void end(void) {
    while (shard.sessions)
        net_session_close(&shard, shard.sessions);
    struct net_audit found = audit();
    EXPECT_EQ(found.nr_free, PAGES);
    EXPECT_EQ(found.nr_refs, 0);
    net_shard_close(&shard);
    free(memory);
}

static uint64_t ralloc(struct net_session *ses, uint64_t bytes) {
    uint64_t address;
    EXPECT_EQ(net_ralloc(&shard, ses, bytes, &address), NET_OK);
    return address;
}

static int try_fill(struct net_session *ses, uint64_t address, uint64_t bytes, int value) {
    struct net_write w;
    int status = net_write_begin(&shard, ses, address, bytes, &w);
    if (status)
        return status;
    for (uint64_t left = bytes; left;) { /* in pieces, as from a socket */
        char piece[1000];
        uint64_t n = left < sizeof piece ? left : sizeof piece;
        memset(piece, value, n);
        net_cursor_write(&shard.pool, &w.to, piece, n);
        left -= n;
    }
    net_write_commit(&shard, &w);
    return NET_OK;
}

static void fill(struct net_session *ses, uint64_t address, uint64_t bytes, int value) {
    EXPECT_EQ(try_fill(ses, address, bytes, value), NET_OK);
}

static void expect_bytes(struct net_session *ses, uint64_t address, uint64_t bytes, int value) {
    struct net_cursor from;
    uint8_t *copy = malloc(bytes);
    EXPECT_EQ(net_rread(&shard, ses, address, bytes, &from), NET_OK);
    net_cursor_read(&shard.pool, &from, copy, bytes);
    for (uint64_t i = 0; i < bytes; i++)
        EXPECT_EQ(copy[i], value);
    free(copy);
}

static uint32_t page_of(struct net_session *ses, uint64_t address) {
    struct net_range *r = net_space_find(&ses->space, address);
    return r->pages[net_address_offset(address) / PAGE];
}

static uint32_t count_of(struct net_session *ses, uint64_t address) {
    return shard.pool.counts[page_of(ses, address)];
}

/* ---------------------------------------------------------------- pages */

static void pages_freed_last_are_handed_out_first_and_those_of_one_run_in_their_order(void) {
    begin(&plenty);
    uint32_t pages[PAGES], again[5];
    EXPECT(net_pages_take(&shard.pool, PAGES, pages));
    EXPECT(!net_pages_take(&shard.pool, 1, again));
    const uint32_t before[2] = {pages[7], pages[1]}, last[3] = {pages[9], pages[2], pages[40]};
    net_pages_drop(&shard.pool, before, 2);
    net_pages_drop(&shard.pool, last, 3);
    EXPECT(net_pages_take(&shard.pool, 5, again));
    EXPECT(!memcmp(last, again, sizeof last));
    EXPECT(!memcmp(before, again + 3, sizeof before));
    net_pages_drop(&shard.pool, pages, PAGES);
    end();
}

static void taking_more_pages_than_there_are_takes_none(void) {
    begin(&plenty);
    uint32_t pages[PAGES + 1];
    EXPECT(!net_pages_take(&shard.pool, PAGES + 1, pages));
    EXPECT_EQ(shard.pool.nr_free, PAGES);
    end();
}

static void a_count_that_is_full_refuses_and_undoes_the_pages_before(void) {
    begin(&plenty);
    uint32_t pages[3];
    EXPECT(net_pages_take(&shard.pool, 3, pages));
    shard.pool.counts[pages[2]] = UINT32_MAX;
    EXPECT_EQ(net_pages_hold(&shard.pool, pages, 3), NET_TOO_MANY_REFS);
    EXPECT_EQ(shard.pool.counts[pages[0]], 1);
    EXPECT_EQ(shard.pool.counts[pages[1]], 1);
    EXPECT_EQ(shard.pool.counts[pages[2]], UINT32_MAX);
    shard.pool.counts[pages[2]] = UINT32_MAX - 1;
    EXPECT_EQ(net_pages_hold(&shard.pool, pages, 3), NET_OK);
    EXPECT_EQ(shard.pool.counts[pages[2]], UINT32_MAX);
    shard.pool.counts[pages[2]] = 2;
    net_pages_drop(&shard.pool, pages, 3);
    net_pages_drop(&shard.pool, pages, 3);
    end();
}

static void pieces_of_neighbouring_pages_are_one(void) {
    begin(&plenty);
    const uint32_t pages[6] = {4, 5, 6, 0, 9, 8};
    struct net_cursor c = {.pages = pages, .at = 100, .left = 6 * PAGE - 200};
    struct iovec iov[8];
    uint64_t bytes;
    EXPECT_EQ(net_cursor_iov(&shard.pool, &c, iov, 8, &bytes), 4);
    EXPECT_EQ(bytes, 6 * PAGE - 200);
    EXPECT_EQ(iov[0].iov_len, 3 * PAGE - 100);
    EXPECT(iov[1].iov_base == memory);
    EXPECT_EQ(iov[3].iov_len, PAGE - 100);
    EXPECT_EQ(net_cursor_iov(&shard.pool, &c, iov, 2, &bytes), 2);
    EXPECT_EQ(bytes, 4 * PAGE - 100);
    end();
}

/* ---------------------------------------------------------------- addresses */

static void an_address_names_server_shard_session_and_range(void) {
    struct net_session *ses = begin(&plenty);
    uint64_t a = ralloc(ses, 5 * PAGE), b = ralloc(ses, 8 * PAGE);
    EXPECT_EQ(net_address_server(a), 3);
    EXPECT_EQ(net_address_shard(a), 5);
    EXPECT_EQ(net_address_session(a), 2);
    EXPECT_EQ(net_address_class(a), 15);
    EXPECT_EQ(b - a, 8 * PAGE);
    EXPECT(net_space_find(&ses->space, a + 7 * PAGE) == net_space_find(&ses->space, a));
    EXPECT(!net_space_find(&ses->space, b + 8 * PAGE));
    EXPECT(!net_space_find(&ses->space, a ^ 1ull << NET_SESSION_SHIFT));
    EXPECT(!net_space_find(&ses->space, 0));
    EXPECT(!net_space_find(&ses->space, UINT64_MAX));
    end();
}

static void any_address_at_all_can_be_looked_up(void) {
    struct net_session *ses = begin(&plenty);
    struct rng r = rng_start();
    uint64_t a = ralloc(ses, PAGE);
    struct net_cursor from;
    for (int i = 0; i < 1000000; i++) {
        uint64_t wild = i & 1 ? rng_next(&r) : a ^ 1ull << rng_below(&r, 64);
        if (net_rread(&shard, ses, wild, 1, &from) == NET_OK)
            EXPECT_EQ(wild & ~(uint64_t)(PAGE - 1), a);
    }
    end();
}

static void a_freed_address_is_nobodys_for_a_while(void) {
    struct net_session *ses = begin(&plenty);
    uint64_t first = ralloc(ses, PAGE);
    EXPECT_EQ(net_rfree(&shard, ses, first), NET_OK);
    for (int i = 0; i < 60; i++) {
        uint64_t next = ralloc(ses, PAGE);
        EXPECT(next != first);
        EXPECT_EQ(net_rfree(&shard, ses, next), NET_OK);
    }
    EXPECT_EQ(net_rfree(&shard, ses, first), NET_BAD_ADDRESS);
    for (int i = 0; i < 100000; i++)
        EXPECT_EQ(net_rfree(&shard, ses, ralloc(ses, PAGE)), NET_OK);
    EXPECT(ses->space.classes[12].nr < 200);
    end();
}

static void a_class_without_free_numbers_says_so(void) {
    struct net_session *ses = begin(&plenty);
    uint32_t *pages = calloc(1, sizeof *pages);
    int status = 0;
    /* The largest class has two numbers; pretend that a page is as large. */
    struct net_range *one = net_space_add(&ses->space, NET_MAX_CLASS, pages, 1, &status);
    struct net_range *two = net_space_add(&ses->space, NET_MAX_CLASS, pages, 1, &status);
    EXPECT(one && two);
    EXPECT(!net_space_add(&ses->space, NET_MAX_CLASS, pages, 1, &status));
    EXPECT_EQ(status, NET_NO_ADDRESS_SPACE);
    EXPECT(!net_space_add(&ses->space, NET_MAX_CLASS + 1, pages, 1, &status));
    EXPECT_EQ(status, NET_BAD_SIZE);
    net_space_remove(&ses->space, one);
    net_space_remove(&ses->space, two);
    free(pages);
    end();
}

/* ---------------------------------------------------------------- keys */

static void the_cipher_of_keys_is_speck(void) {
    struct net_refs t;
    const uint32_t secret[4] = {0x03020100, 0x0b0a0908, 0x13121110, 0x1b1a1918};
    net_refs_open(&t, 1, secret);
    EXPECT_EQ(net_key_seal(&t, 0x3b7265747475432dull), 0x8c6fa548454e028bull);
    EXPECT_EQ(net_key_open(&t, 0x8c6fa548454e028bull), 0x3b7265747475432dull);
}

static void a_guessed_key_is_no_ref(void) {
    struct net_session *ses = begin(&plenty);
    struct rng r = rng_start();
    uint64_t a = ralloc(ses, PAGE), key;
    int status;
    fill(ses, a, 10, 1);
    EXPECT_EQ(net_create_ref(&shard, ses, a, 10, 0, &key), NET_OK);
    for (int i = 0; i < 1000000; i++) {
        EXPECT(!net_ref_find(&shard.refs, rng_next(&r), 10, &status));
        EXPECT_EQ(status, NET_BAD_REF);
    }
    EXPECT(!net_ref_find(&shard.refs, key, 11, &status));
    EXPECT_EQ(status, NET_BAD_REF);
    EXPECT(net_ref_find(&shard.refs, key, 10, &status));
    end();
}

static void a_used_key_stays_used_when_its_slot_has_a_new_ref(void) {
    struct net_session *ses = begin(&plenty);
    uint64_t a = ralloc(ses, PAGE), keys[100], dropped;
    int status;
    for (int i = 0; i < 100; i++) {
        EXPECT_EQ(net_create_ref(&shard, ses, a, PAGE, 0, &keys[i]), NET_OK);
        EXPECT_EQ(net_drop_ref(&shard, ses, keys[i], PAGE, 0, &dropped), NET_OK);
        EXPECT_EQ(dropped, 1);
    }
    EXPECT_EQ(shard.refs.nr, 1);
    for (int i = 0; i < 100; i++) {
        EXPECT(!net_ref_find(&shard.refs, keys[i], PAGE, &status));
        EXPECT_EQ(status, NET_REF_CONSUMED);
    }
    end();
}

/* ---------------------------------------------------------------- writes */

static void a_write_that_is_broken_off_shows_nothing_of_fresh_pages(void) {
    struct net_session *ses = begin(&plenty);
    uint64_t a = ralloc(ses, 3 * PAGE), key;
    fill(ses, a, 2 * PAGE, 1);
    EXPECT_EQ(net_create_ref(&shard, ses, a, 2 * PAGE, 0, &key), NET_OK);
    struct net_write w;
    EXPECT_EQ(net_write_begin(&shard, ses, a + 10, 3 * PAGE - 20, &w), NET_OK);
    char piece[5000];
    memset(piece, 9, sizeof piece);
    net_cursor_write(&shard.pool, &w.to, piece, sizeof piece);
    EXPECT_EQ(audit().pages_under_way, 3);
    net_write_abort(&shard, &w);
    EXPECT_EQ(audit().pages_under_way, 0);
    expect_bytes(ses, a, 2 * PAGE, 1);
    expect_bytes(ses, a + 2 * PAGE, PAGE, 0);
    end();
}

static void the_last_holder_of_a_page_may_let_go_while_it_is_being_replaced(void) {
    struct net_session *ses = begin(&plenty), *other = net_session_open(&shard, 8, 2, 0);
    uint64_t a = ralloc(ses, PAGE), key, dropped;
    fill(ses, a, PAGE, 1);
    EXPECT_EQ(net_create_ref(&shard, ses, a, PAGE, 0, &key), NET_OK);
    EXPECT_EQ(net_accept_ref(&shard, other, key, PAGE, 0, NULL), NET_OK);
    struct net_write w;
    EXPECT_EQ(net_write_begin(&shard, ses, a, 1, &w), NET_OK);
    EXPECT_EQ(net_drop_ref(&shard, other, key, PAGE, 0, &dropped), NET_OK);
    char two = 2;
    net_cursor_write(&shard.pool, &w.to, &two, 1);
    net_write_commit(&shard, &w);
    EXPECT_EQ(audit().nr_free, PAGES - 1);
    expect_bytes(ses, a, 1, 2);
    expect_bytes(ses, a + 1, PAGE - 1, 1);
    end();
}

static void a_session_that_ends_frees_its_writes_under_way(void) {
    struct net_session *ses = begin(&plenty);
    struct net_write w, p;
    EXPECT_EQ(net_write_begin(&shard, ses, ralloc(ses, 40 * PAGE), 30 * PAGE, &w), NET_OK);
    EXPECT_EQ(net_put_begin(&shard, ses, 20 * PAGE, 0, &p), NET_OK);
    EXPECT_EQ(audit().pages_under_way, 50);
    end();
}

/* The life of one page, step by step. */
static void counts_follow_the_life_of_a_page(void) {
    struct net_session *creator = begin(&plenty), *consumer = net_session_open(&shard, 8, 2, 0);
    uint64_t a = ralloc(creator, PAGE), b, key;
    EXPECT_EQ(page_of(creator, a), 0);
    fill(creator, a, PAGE, 1);
    EXPECT_EQ(count_of(creator, a), 1);
    EXPECT_EQ(net_create_ref(&shard, creator, a, PAGE, 0, &key), NET_OK);
    EXPECT_EQ(count_of(creator, a), 2);
    EXPECT_EQ(net_map_ref(&shard, consumer, key, PAGE, 0, &b), NET_OK);
    EXPECT_EQ(count_of(creator, a), 2);
    EXPECT_EQ(page_of(creator, a), page_of(consumer, b));
    fill(consumer, b, 10, 2);
    EXPECT_EQ(count_of(creator, a), 1);
    EXPECT_EQ(count_of(consumer, b), 1);
    EXPECT_EQ(shard.counters[NET_COUNTER_pages_copied], 1);
    fill(creator, a, 10, 3);
    EXPECT_EQ(shard.counters[NET_COUNTER_pages_copied], 1);
    expect_bytes(consumer, b + 10, PAGE - 10, 1);
    EXPECT_EQ(net_rfree(&shard, consumer, b), NET_OK);
    EXPECT_EQ(net_rfree(&shard, creator, a), NET_OK);
    EXPECT_EQ(shard.pool.nr_free, PAGES);
    end();
}

/* ---------------------------------------------------------------- anything, in any order */

#define SESSIONS 3
#define KEYS 40

static void random_operations_keep_every_count(void) {
    struct net_limits limits = plenty;
    limits.max_count = 5;
    limits.max_pages = 50;
    limits.max_virtual = 90;
    begin(&limits);
    struct net_session *ses[SESSIONS];
    uint64_t ranges[SESSIONS][8] = {0}, keys[KEYS] = {0}, ignored;
    struct rng r = rng_start();
    for (uint32_t i = 0; i < SESSIONS; i++)
        ses[i] = net_session_open(&shard, 100 + i, i, 0);
    for (int step = 0; step < (check_slow() ? 3000000 : 60000); step++) {
        uint32_t i = rng_below(&r, SESSIONS);
        uint64_t *a = &ranges[i][rng_below(&r, 8)], *key = &keys[rng_below(&r, KEYS)];
        uint64_t offset = rng_below(&r, 9 * PAGE), bytes = 1 + rng_below(&r, 9 * PAGE);
        int status;
        switch (rng_below(&r, 12)) {
        case 0:
            if (!*a && net_ralloc(&shard, ses[i], bytes, a))
                *a = 0;
            break;
        case 1:
            if (net_rfree(&shard, ses[i], *a) == NET_OK)
                *a = 0;
            break;
        case 2:
        case 3:
            status = try_fill(ses[i], *a + offset, bytes, 1 + (step & 0x7f));
            if (status == NET_OK)
                expect_bytes(ses[i], *a + offset, bytes, 1 + (step & 0x7f));
            break;
        case 4:
            (void)net_create_ref(&shard, ses[i], *a + offset / PAGE * PAGE, bytes, rng_below(&r, 4),
                                 key);
            if (!net_space_find(&ses[i]->space, *a))
                *a = 0;
            break;
        case 5: {
            struct net_ref *ref = net_ref_of(&shard.refs, *key);
            if (ref && !*a && net_map_ref(&shard, ses[i], *key, ref->length, 0, a))
                *a = 0;
            break;
        }
        case 6: {
            struct net_ref *ref = net_ref_of(&shard.refs, *key);
            if (ref)
                (void)net_accept_ref(&shard, ses[i], *key, ref->length,
                                     rng_below(&r, 2) ? NET_ANEW : 0, key);
            break;
        }
        case 7: {
            struct net_ref *ref = net_ref_of(&shard.refs, *key);
            if (ref)
                (void)net_clone_ref(&shard, ses[i], *key, ref->length, &keys[rng_below(&r, KEYS)]);
            break;
        }
        case 8: {
            struct net_ref *ref = net_ref_of(&shard.refs, *key);
            if (ref)
                (void)net_drop_ref(&shard, ses[i], *key, ref->length, 0, &ignored);
            break;
        }
        case 9: {
            struct net_write w;
            uint32_t flags = rng_below(&r, 2) ? NET_KEEP : 0;
            if (*a || net_put_begin(&shard, ses[i], bytes, flags, &w))
                break;
            if (rng_below(&r, 4) == 0)
                net_write_abort(&shard, &w);
            else
                (void)net_put_commit(&shard, &w, flags, key, a);
            break;
        }
        case 10: {
            struct net_ref *ref = net_ref_of(&shard.refs, *key);
            struct net_delivery *d;
            struct net_request q = {.op = NET_GET,
                                    .flags = rng_below(&r, 2) ? NET_KEEP : 0,
                                    .a = *key,
                                    .b = ref ? ref->length : 1,
                                    .d = ref ? ref->length : 1};
            if (net_get(&shard, ses[i], &q, &d) == NET_OK && rng_below(&r, 2))
                net_delivery_sent(&shard, d, net_now_ns());
            break;
        }
        case 11:
            if (rng_below(&r, 500) == 0) {
                net_session_close(&shard, ses[i]);
                memset(ranges[i], 0, sizeof ranges[i]);
                ses[i] = net_session_open(&shard, 100 + i, i, 0);
            } else if (ses[i]->deliveries) {
                net_delivery_free(&shard, ses[i]->deliveries);
            }
            break;
        }
        if (step % 64 == 0 || step < 2000)
            (void)audit();
    }
    end();
}

int main(void) {
    HOLDS(pages_freed_last_are_handed_out_first_and_those_of_one_run_in_their_order);
    HOLDS(taking_more_pages_than_there_are_takes_none);
    HOLDS(a_count_that_is_full_refuses_and_undoes_the_pages_before);
    HOLDS(pieces_of_neighbouring_pages_are_one);
    HOLDS(an_address_names_server_shard_session_and_range);
    HOLDS(any_address_at_all_can_be_looked_up);
    HOLDS(a_freed_address_is_nobodys_for_a_while);
    HOLDS(a_class_without_free_numbers_says_so);
    HOLDS(the_cipher_of_keys_is_speck);
    HOLDS(a_guessed_key_is_no_ref);
    HOLDS(a_used_key_stays_used_when_its_slot_has_a_new_ref);
    HOLDS(a_write_that_is_broken_off_shows_nothing_of_fresh_pages);
    HOLDS(the_last_holder_of_a_page_may_let_go_while_it_is_being_replaced);
    HOLDS(a_session_that_ends_frees_its_writes_under_way);
    HOLDS(counts_follow_the_life_of_a_page);
    HOLDS(random_operations_keep_every_count);
    return 0;
}
