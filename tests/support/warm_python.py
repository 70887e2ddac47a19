# The program of `warm_process.executable()`, started without site-packages: it has little to import. It is Python to
# whoever starts it; the server, whose socket is beside it, forks the command with the files that are open here.
import json
import os
import signal
import socket
import sys
from contextlib import suppress

HERE = os.path.dirname(os.path.abspath(sys.argv[0]))


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def receive(connection: socket.socket) -> int:
    data = b""
    while len(data) < 4:
        part = connection.recv(4 - len(data))
        if not part:
            sys.exit("the server of warm processes has ended")
        data += part
    return int.from_bytes(data, "big")


def main() -> int:
    descriptors = [*filter(is_open, map(int, os.listdir("/dev/fd")))]
    leads = os.getpgrp() == os.getpid()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(HERE, "socket"))
    request = {
        "arguments": sys.argv[1:],
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "descriptors": descriptors,
        "session": leads,
        "executable": os.path.join(HERE, "python"),
    }
    data = json.dumps(request).encode()
    socket.send_fds(connection, [len(data).to_bytes(4, "big")], descriptors)
    connection.sendall(data)
    pid = receive(connection)

    def hand_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            (os.killpg if leads else os.kill)(pid, number)

    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, hand_on)
    code = os.waitstatus_to_exitcode(receive(connection))
    if code < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


sys.exit(main())
