"""pyuserfaultfd: getting a descriptor, agreeing on features, owning and losing it."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import pickle
import re
import warnings
from pathlib import Path

import pytest

import pyuserfaultfd
from pyuserfaultfd import (
    ClosedError,
    Feature,
    FeatureUnavailable,
    InvalidDescriptor,
    Method,
    NotSupported,
    PartialResult,
    PermissionDenied,
    UserFaultFD,
    UserfaultfdError,
    address_of,
    errors,
    supported_features,
)
from tests.unit import pyuserfaultfd_peer as peer
from tests.unit.pyuserfaultfd_peer import PAGE, Child, Link, isolated, private, require_capability

nothing_left = peer.nothing_left

DEVICE = Path("/dev/userfaultfd")
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
NOBODY = 65534
libc = ctypes.CDLL(None)
NAMELESS = Feature(1 << 40)


def need(method: Method) -> None:
    try:
        UserFaultFD(method=method).close()
    except (PermissionDenied, NotSupported) as error:
        pytest.skip(f"no userfaultfd by {method.value}: {error}")


# ---------------------------------------------------------------- ways to open


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("method", [Method.SYSCALL, Method.DEVICE])
def test_every_method_gives_a_working_descriptor_and_is_named(method: Method, only: bool):
    need(method)
    memory = private(1)
    with UserFaultFD(method=method, user_mode_only=only) as uffd:
        assert (uffd.method, uffd.user_mode_only) == (method, only)
        uffd.register(*address_of(memory))
        assert uffd.copy(address_of(memory).address, bytes(PAGE)) == PAGE
    memory.close()


def test_automatic_choice_takes_the_system_call_with_all_faults_where_permitted():
    need(Method.SYSCALL)
    with UserFaultFD(user_mode_only=None) as uffd:
        assert (uffd.method, uffd.user_mode_only) == (Method.SYSCALL, False)


@pytest.mark.parametrize("method", [Method.SYSCALL, Method.DEVICE])
@pytest.mark.parametrize("wanted", [False, True])
def test_flags_of_the_descriptor_are_those_asked_for(method: Method, wanted: bool):
    need(method)
    with UserFaultFD(method=method, cloexec=wanted, nonblock=wanted) as uffd:
        assert os.get_inheritable(uffd.fileno()) is not wanted
        assert os.get_blocking(uffd.fileno()) is not wanted


@isolated
def test_user_mode_only_turns_a_fault_of_the_kernel_into_efault():
    memory = private(1)
    with UserFaultFD(user_mode_only=True) as uffd:
        uffd.register(*address_of(memory))
        reader, writer = os.pipe()
        os.write(writer, b"x")
        with pytest.raises(OSError, match="Bad address"):
            os.readv(reader, [memory])
        assert uffd.read(timeout=0) == []


# ---------------------------------------------------------------- features


def test_enabled_features_are_those_asked_for_and_no_others():
    wanted = Feature.THREAD_ID | Feature.EVENT_UNMAP
    with UserFaultFD(wanted) as uffd:
        assert uffd.features == wanted
        with UserFaultFD.from_fd(os.dup(uffd.fileno())) as told_by_the_kernel:
            assert told_by_the_kernel.features == wanted


def test_all_features_of_the_kernel_can_be_enabled_by_the_privileged():
    require_capability()
    with UserFaultFD(supported_features()) as uffd:
        assert uffd.features == supported_features()


def test_feature_that_the_kernel_lacks_is_named_and_only_that():
    with pytest.raises(FeatureUnavailable, match="0x10000000000") as caught:
        UserFaultFD(Feature.THREAD_ID | NAMELESS)
    assert caught.value.missing == NAMELESS
    assert "THREAD_ID" not in str(caught.value)


def test_missing_feature_is_named_with_the_linux_that_brought_it():
    error = FeatureUnavailable.lacking(Feature.MOVE | Feature.POISON)
    assert "POISON (Linux 6.6), MOVE (Linux 6.8)" in str(error)


def test_optional_features_are_enabled_where_the_kernel_has_them():
    with UserFaultFD(optional=Feature.THREAD_ID | NAMELESS) as uffd:
        assert uffd.features == Feature.THREAD_ID


# ---------------------------------------------------------------- without privileges


def child_opens_as_nobody(link: Link, features: int, method: str, only: bool | None) -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    try_to_open(link, features, method, only)


def child_opens_without_capabilities(link: Link) -> None:
    version_3_of_capset = 0x20080522
    header = (ctypes.c_uint32 * 2)(version_3_of_capset, 0)
    nothing = (ctypes.c_uint32 * 6)()
    assert libc.capset(header, nothing) == 0
    try_to_open(link, 0, "auto", None)


def try_to_open(link: Link, features: int, method: str, only: bool | None) -> None:
    try:
        with UserFaultFD(Feature(features), method=Method(method), user_mode_only=only) as uffd:
            link.send([type(uffd).__name__, f"{uffd.method} {uffd.user_mode_only}", 0])
    except UserfaultfdError as error:
        link.send([type(error).__name__, str(error), error.errno])


def open_as_nobody(
    features: int = 0, *, method: str = "auto", user_mode_only: bool | None = False
) -> tuple[str, str]:
    """Let a process without privileges open one. Returns the type of what came out, and words."""
    if os.geteuid():
        pytest.skip("only root can become nobody")
    if SYSCTL.exists() and SYSCTL.read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd=1 lets everybody")
    if DEVICE.exists() and DEVICE.stat().st_mode & 0o006:
        pytest.skip(f"{DEVICE} is open to everybody")
    with Child(child_opens_as_nobody, features, method, user_mode_only) as child:
        kind, words, _ = child.receive()[0]
    return kind, words


@pytest.mark.parametrize("method", ["auto", "syscall", "device"])
def test_refusal_names_what_bars_the_way_and_every_way_to_allow_it(method: str):
    kind, words = open_as_nobody(method=method)
    assert kind == PermissionDenied.__name__
    if method != "device":
        assert "userfaultfd(2): Operation not permitted" in words
    if method != "syscall" and DEVICE.exists():
        assert f"{DEVICE}: Permission denied" in words
    assert "vm.unprivileged_userfaultfd is 0" in words
    assert re.search(rf"{DEVICE} (is crw|cannot be used)", words)
    for remedy in (
        "CAP_SYS_PTRACE",
        "vm.unprivileged_userfaultfd=1",
        "chmod",
        "user_mode_only=True",
    ):
        assert remedy in words


def test_user_mode_only_needs_no_permission():
    assert open_as_nobody(user_mode_only=True) == ("UserFaultFD", "Method.SYSCALL True")


def test_automatic_choice_falls_back_to_user_mode_only_when_allowed_to_and_says_so():
    assert open_as_nobody(user_mode_only=None) == ("UserFaultFD", "Method.SYSCALL True")


def test_automatic_choice_takes_the_device_where_the_system_call_is_barred():
    need(Method.DEVICE)
    if SYSCTL.exists() and SYSCTL.read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd=1 lets everybody")
    with Child(child_opens_without_capabilities) as child:
        assert child.receive()[0] == ["UserFaultFD", "Method.DEVICE False", 0]


def test_fork_events_without_the_capability_are_refused_by_its_name():
    kind, words = open_as_nobody(Feature.EVENT_FORK, user_mode_only=True)
    assert kind == PermissionDenied.__name__
    assert "EVENT_FORK needs CAP_SYS_PTRACE" in words


# ---------------------------------------------------------------- owning


def test_close_may_be_called_twice_and_ends_the_with_block_early():
    with UserFaultFD() as uffd:
        fd = uffd.fileno()
        uffd.close()
        uffd.close()
        assert uffd.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    "call",
    [
        lambda uffd: uffd.fileno(),
        lambda uffd: uffd.detach(),
        lambda uffd: uffd.waiting(),
        lambda uffd: uffd.read(timeout=0),
        lambda uffd: uffd.register(PAGE, PAGE),
        lambda uffd: uffd.unregister(PAGE, PAGE),
        lambda uffd: uffd.wake(PAGE, PAGE),
        lambda uffd: uffd.copy(PAGE, bytes(PAGE)),
        lambda uffd: uffd.zeropage(PAGE, PAGE),
        lambda uffd: uffd.continue_(PAGE, PAGE),
        lambda uffd: uffd.writeprotect(PAGE, PAGE),
        lambda uffd: uffd.move(PAGE, PAGE, PAGE),
        lambda uffd: uffd.poison(PAGE, PAGE),
        lambda uffd: uffd.events().__anext__().send(None),
    ],
)
def test_use_after_close_is_a_clear_error(call):
    uffd = UserFaultFD()
    uffd.close()
    with pytest.raises(ClosedError, match="the userfaultfd is closed"):
        call(uffd)
    assert repr(uffd) == "<UserFaultFD closed>"


def test_dropped_descriptor_warns_and_is_closed():
    fd = UserFaultFD().detach()
    with pytest.warns(ResourceWarning, match=f"unclosed <UserFaultFD fd={fd} "):
        UserFaultFD.from_fd(fd)  # dropped at once
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_object_whose_opening_failed_is_dropped_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FeatureUnavailable):
            UserFaultFD(NAMELESS)
        gc.collect()


def test_detached_descriptor_stays_open_and_can_be_adopted_again():
    with UserFaultFD(Feature.THREAD_ID) as uffd:
        fd = uffd.detach()
        assert uffd.closed
    with UserFaultFD.from_fd(fd) as again:
        assert again.fileno() == fd
        assert (again.features, again.method, again.user_mode_only) == (
            Feature.THREAD_ID,
            None,
            None,
        )


def test_adopting_what_is_no_userfaultfd_is_refused_and_leaves_it_alone():
    reader, writer = os.pipe()
    with pytest.raises(InvalidDescriptor, match=f"descriptor {reader} is no userfaultfd"):
        UserFaultFD.from_fd(reader)
    os.close(reader)
    os.close(writer)
    with pytest.raises(InvalidDescriptor):
        UserFaultFD.from_fd(reader)


def test_reading_a_descriptor_without_a_handshake_says_so():
    need(Method.SYSCALL)
    number = pyuserfaultfd._abi.syscall_number()
    assert number is not None
    fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    refused = pytest.raises(InvalidDescriptor, match="handshake has not been done")
    with UserFaultFD.from_fd(fd) as uffd, refused:
        uffd.read(timeout=0)


# ---------------------------------------------------------------- exceptions


def test_every_exception_is_public_and_in_the_tree_of_the_docstring():
    tree = errors.__doc__ or ""
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, UserfaultfdError):
            assert getattr(pyuserfaultfd, name) is kind
            drawn = re.search(rf"^(.*)\b{name}\b( \((\w+)\))?", tree, re.MULTILINE)
            assert drawn is not None, name
            if drawn[3]:
                assert drawn[3] in {base.__name__ for base in kind.__mro__}


def test_exceptions_survive_pickling():
    error = errors.from_errno(errno.EAGAIN, "copy", address=PAGE, length=3 * PAGE, bytes_done=PAGE)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, PartialResult)
    assert str(again) == str(error)
    assert (again.operation, again.address, again.bytes_done) == ("copy", PAGE, PAGE)


def test_memory_is_not_kept_by_the_descriptor():
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE)
    with UserFaultFD() as uffd:
        uffd.register(*address_of(memory))
        memory.close()
