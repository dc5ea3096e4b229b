"""Check that the hosts of a run reach the coordinator, process 0."""

import errno
import socket
import time

from dgpt_jax.planning.doctor import Finding


def check(address: str, processes: int, seconds: float) -> list[Finding]:
    """Checks that the hosts of a run reach HOST:PORT of process 0.

    Run it on all hosts at about the same time: HOST waits for `processes` - 1 connections.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        return [Finding("fail", f"--coordinator is {address!r}", "write HOST:PORT")]
    try:
        with socket.socket() as test_socket:  # only a host's own address can be bound
            test_socket.bind((host, 0))
        server = socket.create_server(("", int(port)))
    except socket.gaierror:
        return [Finding("fail", f"{host} has no address", "use its IP address, or fix DNS")]
    except OSError as e:
        if e.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return [Finding("fail", f"{address}: {e.strerror}", "choose another port")]
        return [_connect(address, seconds)]
    with server:
        return [_listen(server, int(port), processes - 1, seconds)]


def _listen(server: socket.socket, port: int, others: int, seconds: float) -> Finding:
    deadline, peers = time.monotonic() + seconds, []
    while len(peers) < others and (remaining := deadline - time.monotonic()) > 0:
        server.settimeout(remaining)
        try:
            connection, peer = server.accept()
        except TimeoutError:
            break
        connection.close()
        peers.append(peer[0])
    text = f"{len(peers)} of {others} other hosts connected to port {port} within {seconds:.0f} s"
    if len(peers) < others:
        return Finding("fail", f"{text} ({', '.join(peers) or 'none'})", _firewall(port))
    return Finding("ok", text)


def _connect(address: str, seconds: float) -> Finding:
    host, _, port = address.rpartition(":")
    deadline, reason = time.monotonic() + seconds, "no answer"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((host, int(port)), timeout=remaining).close()
            return Finding("ok", f"connected to {address}")
        except ConnectionRefusedError:
            reason = "connection refused: run this command on that host too, at the same time"
        except OSError as e:
            reason = f"{e.strerror or 'no answer'}: {_firewall(port)}"
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
    return Finding("fail", f"no connection to {address} within {seconds:.0f} s", reason)


def _firewall(port: int | str) -> str:
    return f"open port {port} between the hosts (Google Cloud opens 8476)"
