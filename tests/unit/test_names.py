"""The name service."""

import pytest

from dmrpc_cxl.coordinator.names import (
    MAX_NAME_CHARACTERS,
    MAX_NAMES_PER_HOST,
    BadName,
    Names,
)
from dmrpc_cxl.errors import ServiceExists, ServiceNotFound


@pytest.fixture
def names():
    names = Names()
    names.publish("users", "unix:/u", 1)
    names.publish("urls", {"tcp": ["127.0.0.1", 5]}, 2)
    return names


def test_a_published_name_is_found_with_its_endpoint_and_host(names):
    assert names.lookup("urls").as_json() == {
        "name": "urls",
        "endpoint": {"tcp": ["127.0.0.1", 5]},
        "host": 2,
    }


def test_a_name_belongs_to_one_host(names):
    with pytest.raises(ServiceExists):
        names.publish("users", "elsewhere", 2)
    assert names.lookup("users").endpoint == "unix:/u"


def test_the_owner_of_a_name_may_change_its_endpoint(names):
    names.publish("users", "unix:/new", 1)
    assert names.lookup("users").endpoint == "unix:/new"
    assert len(names) == 2


def test_a_withdrawn_name_is_gone_and_free_for_others(names):
    names.withdraw("users", 1)
    assert "users" not in names
    with pytest.raises(ServiceNotFound):
        names.lookup("users")
    names.publish("users", "x", 2)


def test_a_host_cannot_withdraw_what_another_published(names):
    with pytest.raises(ServiceNotFound):
        names.withdraw("users", 2)
    with pytest.raises(ServiceNotFound):
        names.withdraw("nothing", 1)
    assert "users" in names


def test_names_are_listed_by_prefix_in_order(names):
    names.publish("users.cache", "", 2)
    assert [service.name for service in names.with_prefix("users")] == ["users", "users.cache"]
    assert [service.name for service in names.with_prefix()] == ["urls", "users", "users.cache"]
    assert names.with_prefix("x") == []


def test_the_names_of_a_host_vanish_with_it(names):
    names.publish("mail", "", 2)
    assert names.forget_host(2) == ["mail", "urls"]
    assert [service.name for service in names] == ["users"]
    assert names.forget_host(2) == []


@pytest.mark.parametrize(
    "name", [None, 7, "", "a\nb", "\0", "\ud800", "x" * (MAX_NAME_CHARACTERS + 1), ["a"]]
)
def test_what_cannot_be_a_name_is_refused(names, name):
    with pytest.raises(BadName):
        names.publish(name, "", 1)
    assert len(names) == 2


def test_a_host_publishes_a_bounded_number_of_names():
    names = Names()
    for number in range(MAX_NAMES_PER_HOST):
        names.publish(str(number), "", 1)
    with pytest.raises(BadName):
        names.publish("one more", "", 1)
    names.publish("0", "again", 1)
    names.publish("one more", "", 2)
