"""Asks for a server's /health until its input ends; a process of its own, so that nothing beside it delays the clock.

    python health_probe.py HOST PORT        (started by `hostile_server.health`)

Prints {"milliseconds": of each answer, "failed": how many came late or not at all}.
"""

import http.client
import json
import sys
import threading
import time

_PERIOD_S = 0.1


def main() -> None:
    """Asks ten times a second."""
    host, port = sys.argv[1], int(sys.argv[2])
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    milliseconds: list[float] = []
    failed = 0
    while not over.wait(_PERIOD_S):
        start = time.perf_counter()
        connection = http.client.HTTPConnection(host, port, timeout=10)
        try:
            connection.request("GET", "/health")
            failed += connection.getresponse().status != 200
        except OSError:
            failed += 1
        finally:
            connection.close()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    print(json.dumps({"milliseconds": milliseconds, "failed": failed}))


if __name__ == "__main__":
    main()
