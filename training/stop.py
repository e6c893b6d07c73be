"""Signals that ask a training run to stop."""

import contextlib
import math
import os
import select
import signal
import socket
import threading
import time

GRACE = 240  # seconds that a save has after a signal; batch systems are asked for 300
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGBREAK')
    if hasattr(signal, name)
]


class StopRequest:
    """SIGINT (Ctrl-C), SIGTERM or SIGUSR1, received, so that a loop can stop where nothing is lost;
    `signal` is its number.

    A second one ends at once, and so does a save that hangs, after GRACE seconds. What comes within
    two seconds is the same one: torchrun and batch systems tell each process, and each other. A
    thread listens, too, since Python calls handlers only between two instructions of the main
    thread, and that may be waiting for another process.
    """

    def __init__(self):
        self.signal = None
        self._ears = socket.socketpair()
        self._ears[1].setblocking(False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.set_wakeup_fd(self._ears[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True).start()

    def release(self):
        """Once nothing is left to save: SIGINT and SIGTERM end the process, as by default, and
        SIGUSR1 does nothing."""
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number, frame):
        self.signal = self.signal or number

    def _listen(self):
        since = math.inf
        while True:
            left = None if since == math.inf else max(0.0, since + GRACE - time.monotonic())
            if not select.select(self._ears[:1], [], [], left)[0]:
                self._tell(f"error: not saved within {GRACE} s of the signal: ending without\n")
                os._exit(128 + self.signal)
            for number in self._ears[0].recv(64):
                if number in STOP_SIGNALS and since == math.inf:
                    self.signal, since = self.signal or number, time.monotonic()
                    self._tell(
                        f"{signal.Signals(number).name}: saving after this step; once more ends without saving\n"
                    )
                elif number in STOP_SIGNALS and time.monotonic() - since > 2:
                    os._exit(128 + number)

    def _tell(self, text):
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, text.encode())

    @property
    def exit_code(self):
        """128 + the signal's number; 0 under torchrun, which would take anything else for a fault
        to recover from."""
        return 0 if 'TORCHELASTIC_RUN_ID' in os.environ else 128 + (self.signal or signal.SIGTERM)
