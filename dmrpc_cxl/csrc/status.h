/*
 * status.h - what native functions return: 0 or a negative status. _native.pyx turns them into the exceptions of
 * errors.py, in one place. The system error, where there is one, travels in struct dm_error.
 */
#ifndef DM_STATUS_H
#define DM_STATUS_H

enum dm_status {
    DM_OK = 0,
    /* misuse */
    DM_ERR_BAD_ADDRESS = -1,   /* not an address of this host's DM, or not the start of a range */
    DM_ERR_BAD_SIZE = -2,      /* zero, or beyond the range or the device */
    DM_ERR_BAD_REF = -3,       /* malformed, forged, or of another fabric */
    DM_ERR_REF_CONSUMED = -4,  /* was mapped, dropped or accepted by somebody else */
    DM_ERR_TOO_MANY_REFS = -5, /* refcount would overflow */
    DM_ERR_CLOSED = -6,        /* host is detached */
    DM_ERR_FORKED = -7,        /* called in a forked child */
    DM_ERR_BUSY = -8,          /* still viewed */
    DM_ERR_RING_CLOSED = -9,   /* the ring or wait set is closed, or closed for sending */
    /* device */
    DM_ERR_NOT_A_DEVICE = -20,
    DM_ERR_TRUNCATED = -21,
    DM_ERR_VERSION = -22,
    DM_ERR_CORRUPT = -23,
    DM_ERR_OUT_OF_FRAMES = -24,
    DM_ERR_NO_REF_SLOT = -25,
    DM_ERR_NO_ADDRESS_SPACE = -26, /* the VMA area is full */
    DM_ERR_DEVICE_FULL = -27,      /* /dev/shm has no room for the device's own tables */
    DM_ERR_NO_SERVICE_SLOT = -28,  /* the service table is full */
    /* environment */
    DM_ERR_UFFD_DENIED = -40,
    DM_ERR_UFFD_FEATURE = -41,
    DM_ERR_SYSTEM = -42, /* a system call failed; see dm_error */
    DM_ERR_NO_MEMORY = -43,
    DM_ERR_DESCRIPTOR_LOST = -44, /* a descriptor of the DM layer was closed behind its back */
    /* peers */
    DM_ERR_COORDINATOR_LOST = -60,
    DM_ERR_COORDINATOR_REFUSED = -61, /* it answered with an error; text in dm_error */
    DM_ERR_PROTOCOL = -62,
    DM_ERR_DEADLINE = -63,
    DM_ERR_FENCED = -64,
    DM_ERR_PEER_GONE = -65, /* the process at the other end of a ring */
    DM_ERR_REPLACED = -66,  /* another coordinator has taken over from the caller */
    /* not an error: run again without the GIL */
    DM_AGAIN_BLOCKING = -90,
    /* not an error: the request may have been carried out before its answer was lost (-91 is DM_REF_BUSY) */
    DM_AGAIN_LOOK = -92,
};

/* Filled in by the function that fails; lives on the caller's stack. */
struct dm_error {
    int sys_errno;       /* 0 when no system call failed */
    int wire_status;     /* enum dm_wire_status when the coordinator refused */
    const char *syscall; /* static string or NULL */
    unsigned long long address;
    unsigned int frame;
    char text[192];
};

#endif
