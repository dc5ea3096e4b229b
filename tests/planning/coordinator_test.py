"""Connections of the hosts of a run to process 0."""

import socket
import threading

from dgpt_jax.planning import coordinator
from tests.distributed.multihost_test import free_address


def test_hosts_that_reach_the_coordinator():
    address, findings = free_address(), []

    def check():
        findings.extend(coordinator.check(address, 2, 20.0))

    both = [threading.Thread(target=check) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    server, client = sorted(f.text for f in findings)
    assert server.startswith("1 of 1 ") and address.rpartition(":")[2] in server
    assert address in client and {f.level for f in findings} == {"ok"}


def test_hosts_that_do_not_reach_the_coordinator(monkeypatch):
    address = free_address()
    host, _, port = address.rpartition(":")
    (alone,) = coordinator.check(address, 3, 0.1)
    assert alone.level == "fail" and alone.text.startswith("0 of 2 ")
    assert f"port {port}" in alone.remedy
    with socket.socket() as bound:  # but not listening
        bound.bind((host, int(port)))
        (refused,) = coordinator.check(address, 2, 0.1)
    assert refused.level == "fail" and "refused" in refused.remedy

    def silent(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    (dropped,) = coordinator.check("192.0.2.1:8476", 2, 0.1)  # an address for documentation
    assert dropped.level == "fail" and "port 8476" in dropped.remedy
    (invalid,) = coordinator.check("host", 2, 0.1)
    assert "HOST:PORT" in invalid.remedy
