# _netc.pxd - csrc/*.h as _native.pyx uses them.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.types cimport pid_t


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "<stdbool.h>" nogil:
    pass


cdef extern from "net_wire.h" nogil:
    enum:
        NET_MAGIC
        NET_VERSION
        NET_SECRET_BYTES
        NET_MAX_TRANSFER
        NET_SEND_BUFFER
        NET_SERVER_SHIFT
        NET_SHARD_SHIFT
        NET_SESSION_SHIFT
        NET_CLASS_SHIFT
        NET_MAX_SERVERS
        NET_MAX_SHARDS
        NET_NR_SESSIONS
        NET_MIN_CLASS
        NET_MAX_CLASS
        NET_REF_TAG
        NET_CONTROL
        NET_DATA

    enum net_op:
        NET_RALLOC
        NET_RFREE
        NET_CREATE_REF
        NET_MAP_REF
        NET_RREAD
        NET_RWRITE
        NET_ACCEPT_REF
        NET_CLONE_REF
        NET_DROP_REF
        NET_PUT
        NET_GET
        NET_HELD
        NET_UNDO
        NET_STATS
        NET_AUDIT
        NET_PING

    enum:
        NET_COPY
        NET_MOVE
        NET_READ_ONLY
        NET_KEEP
        NET_ANEW
        NET_ANYBODYS

    enum net_status:
        NET_OK
        NET_BAD_ADDRESS
        NET_BAD_SIZE
        NET_BAD_REF
        NET_REF_CONSUMED
        NET_TOO_MANY_REFS
        NET_IS_READ_ONLY
        NET_OUT_OF_PAGES
        NET_OVER_QUOTA
        NET_NO_REF_SLOT
        NET_NO_ADDRESS_SPACE
        NET_ANSWER_LOST
        NET_BAD_REQUEST
        NET_NO_MEMORY
        NET_DENIED
        NET_OTHER_VERSION
        NET_NO_PROCESS
        NET_PID_TAKEN
        NET_WRONG_SERVER
        NET_FULL

    struct net_ref_wire:
        uint16_t server
        uint16_t shard
        uint32_t flags
        uint64_t key
        uint64_t length

    struct net_hello:
        uint32_t magic
        uint16_t version
        uint16_t kind
        uint8_t secret[32]
        uint64_t token
        uint32_t pid
        uint16_t shard
        uint8_t session
        uint8_t reserved

    struct net_welcome:
        uint32_t magic
        uint16_t version
        uint16_t status
        uint64_t epoch
        uint64_t slice_bytes
        uint64_t last
        uint32_t pid
        uint16_t server
        uint16_t nr_shards
        uint32_t page_size
        uint32_t max_outstanding

    struct net_request:
        uint32_t payload
        uint8_t op
        uint8_t flags
        uint16_t reserved
        uint64_t id
        uint64_t oldest
        uint64_t a
        uint64_t b
        uint64_t c
        uint64_t d

    struct net_answer:
        uint32_t payload
        uint16_t status
        uint16_t op
        uint64_t id
        uint64_t a
        uint64_t b

    struct net_audit:
        pass

    enum:
        NET_NR_COUNTERS

    uint32_t net_address_server(uint64_t a)
    uint32_t net_address_shard(uint64_t a)
    uint32_t net_address_session(uint64_t a)


cdef extern from "net_link.h" nogil:
    enum net_outcome:
        NET_PENDING
        NET_BROKEN
        NET_DEADLINE
        NET_INTERRUPTED
        NET_CROWDED
        NET_LOST
        NET_CLOSED
        NET_GARBLED
        NET_STARVED

    struct net_call:
        net_request request
        const void *payload
        void *into
        uint64_t into_bytes
        int outcome
        uint64_t a
        uint64_t b
        bint bell

    struct net_link:
        pid_t owner
        int fd
        int bell
        uint32_t generation
        uint32_t nr_calls
        uint32_t max_calls
        uint64_t nr_calls_done
        uint64_t nr_system_calls
        uint64_t bytes_in
        uint64_t bytes_out

    net_link *net_link_new(uint32_t max_calls)
    void net_link_free(net_link *l)
    int net_link_submit(net_link *l, net_call *c, bint cork)
    bint net_link_post(net_link *l, const net_request *q)
    int net_link_wait(net_link *l, net_call *c, uint64_t deadline_ns)
    void net_link_abandon(net_link *l, net_call *c)
    int net_link_pump(net_link *l)
    int net_link_resume(net_link *l, int fd)
    void net_link_fail(net_link *l, int outcome)
    int net_link_state(net_link *l)
    bint net_link_healthy(net_link *l)
    int net_link_dup(net_link *l, uint32_t *generation)
    bint net_call_done(const net_call *c)


cdef extern from "net_server.h" nogil:
    struct net_limits:
        uint64_t max_pages
        uint64_t max_virtual
        uint32_t max_ranges
        uint32_t max_refs
        uint32_t max_outstanding
        uint32_t max_count
        uint32_t max_ref_slots
        uint32_t keep_ms

    struct net_pool:
        uint8_t *base
        uint32_t nr_pages
        uint32_t nr_free

    struct net_shard:
        net_pool pool

    struct net_session:
        void *connection

    struct net_conn:
        bint broken

    struct net_config:
        uint32_t server
        uint32_t nr_shards
        uint64_t pool_bytes
        uint32_t page_bytes
        uint8_t secret[32]
        uint32_t max_processes
        uint32_t max_strangers
        uint32_t hello_ms
        uint32_t vanished_s
        bint lock_pool
        bint populate
        bint eager
        bint time_translation
        net_limits limits

    struct net_failure:
        const char *what
        int error

    struct net_server:
        uint64_t slice_bytes
        uint64_t locked_bytes

    int net_server_open(const net_config *config, const int *listeners, int nr_listeners,
                        net_server **out, net_failure *failure)
    void net_server_wait(net_server *v)
    void net_server_stop(net_server *v)
    void net_server_close(net_server *v)
    uint32_t net_server_processes(net_server *v)

    int net_shard_open(net_shard *s, uint32_t server, uint32_t index, void *slice, uint64_t bytes,
                       uint32_t page_shift, const net_limits *limits)
    void net_shard_close(net_shard *s)
    net_session *net_session_open(net_shard *s, uint32_t pid, uint64_t token, uint32_t session)
    net_session *net_session_find(net_shard *s, uint32_t pid)
    void net_session_close(net_shard *s, net_session *ses)
    uint64_t net_deliveries_expire(net_shard *s, uint64_t now_ns)

    net_conn *net_conn_open(net_shard *s, net_session *ses)
    void net_conn_close(net_conn *c)
    bint net_conn_has_output(const net_conn *c)
    int net_conn_have(const net_conn *c, iovec *iov, int max, uint64_t *bytes)
    void net_conn_sent(net_conn *c, uint64_t n)
    bint net_conn_step(net_conn *c)
    int net_conn_want(net_conn *c, iovec *iov, int max)
    void net_conn_got(net_conn *c, uint64_t n)


cdef extern from "<sys/socket.h>" nogil:
    struct sockaddr:
        pass
    ctypedef unsigned int socklen_t


cdef extern from "net_arena.h" nogil:
    enum:
        NET_PAGE

    struct net_arena:
        pass

    struct net_run:
        char *front
        uint64_t nr_pages

    net_arena *net_arena_new()
    void net_arena_free(net_arena *a)
    bint net_arena_take(net_arena *a, uint64_t nr_pages, bint zero, net_run *run)
    void net_arena_give(net_arena *a, const net_run *run, bint broken)
    uint64_t net_arena_kept(net_arena *a)


cdef extern from "net_pager.h" nogil:
    struct net_pager:
        pass

    struct net_region:
        net_run run
        uint64_t length
        uint64_t key
        uint16_t server
        uint16_t shard
        bint whole

    bint net_region_dirty(const net_region *r)
    bint net_region_failed(const net_region *r)
    uint64_t net_region_present(const net_region *r)

    struct net_pager_stats_t "net_pager_stats":
        uint64_t nr_faults
        uint64_t nr_stores
        uint64_t nr_requests
        uint64_t bytes_fetched
        uint64_t nr_failed
        uint64_t nr_regions

    net_pager *net_pager_new(uint64_t deadline_ns)
    void net_pager_free(net_pager *p)
    bint net_pager_poisons(const net_pager *p)
    int net_pager_route(net_pager *p, const sockaddr *address, socklen_t length, const net_hello *hello, uint16_t server)
    int net_pager_add(net_pager *p, net_region *r, bint all_present)
    bint net_pager_remove(net_pager *p, net_region *r)
    int net_pager_protect(net_pager *p, net_region *r)
    int net_pager_supply(net_pager *p, net_region *r, const char *bytes)
    void net_pager_settle(net_pager *p, net_region *r)
    void net_pager_stats(net_pager *p, net_pager_stats_t *to)
