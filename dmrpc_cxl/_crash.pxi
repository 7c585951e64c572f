# _crash.pxi - crash points of Python, and arming them in this process; see csrc/crash.h. Included by _native.pyx.

cdef extern from "csrc/crash.h" nogil:
    cdef struct dm_crash_info:
        const char *name
        const char *text

    const dm_crash_info *dm_crash_labels
    int DM_CRASH_NR
    size_t DM_CRASH_SLOTS
    size_t DM_CRASH_RECORD_BYTES
    bint DM_CRASH_IS_ARMED
    void dm_crash_pass(int label) noexcept
    int dm_crash_arm(int label, uint64_t passes, const char *record) noexcept
    int dm_crash_stop_at(int label, uint64_t passes) noexcept

CRASH_POINTS = {dm_crash_labels[i].name.decode(): dm_crash_labels[i].text.decode() for i in range(1, DM_CRASH_NR)}
CRASH_RECORD_BYTES = DM_CRASH_RECORD_BYTES
cdef dict _crash_numbers = {dm_crash_labels[i].name.decode(): i for i in range(DM_CRASH_NR)}


def crash_point(str label):
    """Say that the step of that label has been taken. Off, it costs a call and a branch."""
    if DM_CRASH_IS_ARMED:
        dm_crash_pass(_crash_numbers[label])


def crash_at(str label, uint64_t passes=1, record=None):
    """Let this process kill itself at the passes-th time it comes to a label from now on; "none": only count.

    What DM_CRASH_POINT does to a process from its start.

    Args:
        record: path of a file of CRASH_RECORD_BYTES that counts passes and deaths, for crash_record().

    Raises:
        KeyError: there is no such label.
    """
    cdef bytes path = b""
    cdef const char *c_path = NULL
    cdef int failed
    if record is not None:
        path = record.encode()
        c_path = path
    failed = dm_crash_arm(_crash_numbers[label], passes, c_path)
    if failed:
        raise _errors.SystemCallFailed(failed, f"crash_at {label}: {_os.strerror(failed)}")


def crash_stop_at(str label, uint64_t passes=1):
    """Let this process stop itself, as by SIGSTOP, at the passes-th time it comes to a label from now on; once.

    It has to be armed as well, by crash_at.

    Raises:
        KeyError: there is no such label.
    """
    cdef int failed = dm_crash_stop_at(_crash_numbers[label], passes)
    if failed:
        raise _errors.SystemCallFailed(failed, f"crash_stop_at {label}: {_os.strerror(failed)}")


def crash_record(data):
    """Return ({label: passes}, {label: deaths}) of the bytes of a record; labels with none are left out."""
    cdef list numbers = memoryview(data).cast("B").cast("Q").tolist()
    found = ({}, {})
    for name, i in _crash_numbers.items():
        for which in range(2):
            count = numbers[<int>DM_CRASH_SLOTS * which + <int>i]
            if i and count:
                found[which][name] = count
    return found
