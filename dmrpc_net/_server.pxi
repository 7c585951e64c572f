# _server.pxi - the server for Python: its threads, and one shard without sockets. Included by _native.pyx.

from libc.stdlib cimport calloc, free, malloc


cdef extern from "<string.h>" nogil:
    char *strerror(int error)


cdef int _limits(net_limits *limits, dict given) except -1:
    limits.max_pages = given.pop("max_pages", 0) or <uint64_t>-1
    limits.max_virtual = given.pop("max_virtual", 0) or <uint64_t>-1
    limits.max_ranges = given.pop("max_ranges", 1 << 20)
    limits.max_refs = given.pop("max_refs", 1 << 20)
    limits.max_outstanding = given.pop("max_outstanding", 1024)
    limits.max_count = given.pop("max_count", 0)
    limits.max_ref_slots = given.pop("max_ref_slots", 1 << 22)
    limits.keep_ms = given.pop("keep_ms", 2000)
    return 0


cdef class Server:
    """A memory server in this process: threads in C, which need no GIL."""

    cdef net_server *v
    cdef readonly int lock_error

    def __init__(
        self,
        listeners,
        bytes secret not None,
        *,
        uint64_t pool_bytes,
        uint32_t server=0,
        uint32_t shards=1,
        uint32_t page_bytes=4096,
        uint32_t max_processes=1024,
        uint32_t max_strangers=256,
        uint32_t hello_ms=5000,
        uint32_t vanished_s=30,
        bint lock_pool=True,
        bint populate=True,
        bint eager=False,
        bint time_translation=False,
        **limits,
    ):
        cdef net_config config
        cdef net_failure failure
        cdef int[4] fds
        cdef int nr = len(listeners), status
        if self.v != NULL:
            raise TypeError("a Server is initialised once")
        if len(secret) != NET_SECRET_BYTES:
            raise ValueError(f"a secret has {NET_SECRET_BYTES} bytes")
        if not 1 <= nr <= 4:
            raise ValueError("one to four listeners")
        if not 1 <= shards <= NET_MAX_SHARDS or server >= NET_MAX_SERVERS:
            raise ValueError(f"at most {NET_MAX_SHARDS} shards and {NET_MAX_SERVERS} servers")
        if page_bytes < 1 << NET_MIN_CLASS or page_bytes & (page_bytes - 1) or page_bytes > 1 << 21:
            raise ValueError("page_bytes: a power of two from 4096 to 2 MiB")
        if pool_bytes // shards < 2 * page_bytes or pool_bytes // shards // page_bytes > 0xffffffff:
            raise _cxl.BadSize(f"a pool of {pool_bytes} bytes cannot be cut into {shards} shards")
        for i in range(nr):
            fds[i] = listeners[i]
        memset(&config, 0, sizeof(config))
        memcpy(config.secret, PyBytes_AS_STRING(secret), NET_SECRET_BYTES)
        config.server = server
        config.nr_shards = shards
        config.pool_bytes = pool_bytes
        config.page_bytes = page_bytes
        config.max_processes = max_processes
        config.max_strangers = max_strangers
        config.hello_ms = hello_ms
        config.vanished_s = vanished_s
        config.lock_pool = lock_pool
        config.populate = populate
        config.eager = eager
        config.time_translation = time_translation
        _limits(&config.limits, limits)
        if limits:
            raise TypeError(f"unknown: {', '.join(limits)}")
        with nogil:
            status = net_server_open(&config, fds, nr, &self.v, &failure)
        if status:
            if failure.what != NULL:
                raise OSError(failure.error, f"{failure.what.decode()}: {strerror(failure.error).decode()}")
            raise MemoryError("no memory for the server's tables")
        self.lock_error = 0
        if failure.what != NULL:
            self.lock_error = failure.error

    def __dealloc__(self):
        if self.v != NULL:
            with nogil:
                net_server_close(self.v)

    @property
    def locked_bytes(self):
        """Bytes of the pool that are locked in memory: all, or none."""
        return self.v.locked_bytes

    @property
    def slice_bytes(self):
        """Bytes of the pool that each shard has."""
        return self.v.slice_bytes

    @property
    def nr_processes(self):
        """Processes that are connected."""
        return net_server_processes(self.v)

    def close(self):
        """Stop, and free everything. Idempotent."""
        cdef net_server *v = self.v
        self.v = NULL
        if v != NULL:
            with nogil:
                net_server_close(v)


cdef class Shard:
    """One shard without threads and sockets: bytes of requests in, bytes of answers out."""

    cdef net_shard shard
    cdef uint8_t *memory
    cdef dict conns  # by pid
    cdef bint opened

    def __init__(self, uint32_t pages, *, uint32_t page_bytes=4096, **limits):
        cdef net_limits given
        cdef uint32_t shift = 0
        if self.opened:
            raise TypeError("a Shard is initialised once")
        _limits(&given, limits)
        if limits:
            raise TypeError(f"unknown: {', '.join(limits)}")
        while (<uint32_t>1 << shift) < page_bytes:
            shift += 1
        self.memory = <uint8_t *>malloc((pages + 1) * <size_t>page_bytes)
        if self.memory == NULL:
            raise MemoryError()
        # Whatever was there before: nobody may ever see it.
        memset(self.memory, 0xa5, (pages + 1) * <size_t>page_bytes)
        if net_shard_open(&self.shard, 0, 0, self.memory, (pages + 1) * <uint64_t>page_bytes, shift, &given):
            raise MemoryError()
        self.opened = True
        self.conns = {}

    def __dealloc__(self):
        if self.opened:
            for pid in list(self.conns):
                self._hang_up(pid)
            net_shard_close(&self.shard)
        free(self.memory)

    cdef _hang_up(self, uint32_t pid):
        cdef net_session *ses = net_session_find(&self.shard, pid)
        self.conns.pop(pid, None)
        if ses != NULL and ses.connection != NULL:
            net_conn_close(<net_conn *>ses.connection)
            ses.connection = NULL

    def connect(self, uint32_t pid, uint32_t session=0):
        """Begin a connection of a process; the one it had ends."""
        cdef net_session *ses = net_session_find(&self.shard, pid)
        if ses == NULL:
            ses = net_session_open(&self.shard, pid, 1, session)
            if ses == NULL:
                raise MemoryError()
        self._hang_up(pid)
        ses.connection = net_conn_open(&self.shard, ses)
        if ses.connection == NULL:
            raise MemoryError()
        self.conns[pid] = True

    def depart(self, uint32_t pid):
        """End a process, and free what it held."""
        cdef net_session *ses = net_session_find(&self.shard, pid)
        if ses == NULL:
            return
        self._hang_up(pid)
        net_session_close(&self.shard, ses)

    def expire(self, double seconds):
        """Act as if so much time had passed."""
        net_deliveries_expire(&self.shard, _now_ns() + <uint64_t>(seconds * 1e9))

    def feed(self, uint32_t pid, bytes data not None, uint64_t window=0xffffffffffffffff):
        """Hand bytes to a process's connection: (bytes of answers, whether it broke the protocol).

        window: as many bytes as its socket would take at a time.
        """
        cdef net_session *ses = net_session_find(&self.shard, pid)
        cdef net_conn *c
        cdef iovec[128] iov
        cdef uint64_t bytes_, at = 0, n, k, left
        cdef int nr, i
        cdef const char *raw = PyBytes_AS_STRING(data)
        cdef uint64_t size = PyBytes_GET_SIZE(data)
        if ses == NULL or ses.connection == NULL:
            raise ValueError(f"process {pid} is not connected")
        c = <net_conn *>ses.connection
        out = bytearray()
        while True:
            while net_conn_step(c):
                pass
            if net_conn_has_output(c):
                nr = net_conn_have(c, iov, 128, &bytes_)
                left = bytes_ if bytes_ < window else window
                n = left
                for i in range(nr):
                    k = iov[i].iov_len if iov[i].iov_len < left else left
                    out += (<char *>iov[i].iov_base)[:k]
                    left -= k
                net_conn_sent(c, n)
                continue
            if c.broken or at == size:
                break
            nr = net_conn_want(c, iov, 128)
            left = size - at if size - at < window else window
            n = 0
            for i in range(nr):
                k = iov[i].iov_len if iov[i].iov_len < left else left
                memcpy(iov[i].iov_base, raw + at, k)
                at += k
                n += k
                left -= k
            net_conn_got(c, n)
        return bytes(out), bool(c.broken)
