"""The name service, as hosts use it."""

from typing import Any

import pytest

from dmrpc_cxl.errors import ServiceExists, ServiceNotFound
from tests.fabrics import At, Fabric


def publish(at: At, name: str, endpoint: Any) -> None:
    at.host.publish(name, endpoint)


def withdraw(at: At, name: str) -> None:
    at.host.withdraw(name)


def lookup(at: At, name: str) -> dict[str, Any]:
    return at.host.lookup(name)


def services(at: At, prefix: str) -> list[str]:
    return [entry["name"] for entry in at.host.services(prefix)]


def test_a_published_service_is_found_by_every_host_until_it_is_withdrawn(fabric: Fabric) -> None:
    server, client = fabric.host(), fabric.host()
    server.call(publish, "image.scale", {"unix": "/somewhere", "port": 7})
    assert client.call(lookup, "image.scale") == {
        "name": "image.scale",
        "endpoint": {"unix": "/somewhere", "port": 7},
        "host": server.id,
    }
    server.call(publish, "text", 1)
    assert client.call(services, "image.") == ["image.scale"]
    assert sorted(client.call(services, "")) == ["image.scale", "text"]
    with pytest.raises(ServiceExists):
        client.call(publish, "text", 2)
    server.call(withdraw, "text")
    with pytest.raises(ServiceNotFound):
        client.call(lookup, "text")
    with pytest.raises(ServiceNotFound):
        client.call(withdraw, "image.scale")  # another host's


def test_services_of_a_killed_host_vanish_and_their_names_are_free_again(fabric: Fabric) -> None:
    server, client = fabric.host(), fabric.host()
    server.call(publish, "one", ["first"])
    server.kill()
    fabric.wait_until(lambda audit: len(fabric.host_states()) == 1)
    with pytest.raises(ServiceNotFound):
        client.call(lookup, "one")
    client.call(publish, "one", "mine now")
    assert client.call(lookup, "one")["host"] == client.id
