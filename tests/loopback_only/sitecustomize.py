"""Put on PYTHONPATH, refuses every connection and name look-up that leaves this machine, and writes down the attempt.

Python runs a module of this name at start-up; child processes inherit it with the environment.
"""

import os
import socket

LOOPBACK = ("127.0.0.1", "::1", "localhost", None, "")


def _guarded(real, host_of):
    def guarded(*args, **kwargs):
        host = host_of(args)
        if host not in LOOPBACK:
            with open(os.environ["LOOPBACK_ONLY_LOG"], "a") as log:
                log.write(f"{real.__name__} {host}\n")
            raise OSError(f"the tests may reach loopback only, not {host}")
        return real(*args, **kwargs)

    return guarded


def _address_host(args):
    address = args[1]
    return address[0] if isinstance(address, tuple) else None  # a Unix socket has a path


if "LOOPBACK_ONLY_LOG" in os.environ:
    socket.getaddrinfo = _guarded(socket.getaddrinfo, lambda args: args[0])
    socket.socket.connect = _guarded(socket.socket.connect, _address_host)
    socket.socket.connect_ex = _guarded(socket.socket.connect_ex, _address_host)
