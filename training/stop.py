"""Signals that ask a training run to stop."""

import contextlib
import os
import select
import signal
import socket
import threading
import time

# The time for saving after a signal. cluster/ asks batch systems for a notice of 300 s.
GRACE_SECONDS = 240
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGBREAK')
    if hasattr(signal, name)  # Windows has others than Linux
]


class StopRequest:
    """Catches SIGINT (Ctrl-C), SIGTERM and SIGUSR1, so that the training loop can save and stop.

    `signal` is the number of the signal that has arrived, or None.

    A second signal ends the process at once; so does a save that takes longer than GRACE_SECONDS.
    Signals within two seconds of the first count as the same one, because torchrun and batch
    systems signal each process, and each other. A thread handles this: Python calls signal handlers
    only between two instructions of the main thread, which may be waiting for another process.
    """

    def __init__(self):
        self.signal = None
        # Python writes the number of each signal to one end, from which the thread reads it.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def exit_code(self):
        """The process's exit code after a stop: 128 + the signal's number.

        It is 0 under torchrun, which would restart the processes after any other code.
        """
        if 'TORCHELASTIC_RUN_ID' in os.environ:
            return 0
        return 128 + (self.signal or signal.SIGTERM)

    def release(self):
        """Stop catching signals, once everything is saved.

        SIGINT and SIGTERM end the process again, as by default. The others are ignored.
        """
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number, frame):
        self.signal = self.signal or number

    def _listen(self):
        """Announce the first signal; end the process at a second one, or when the time is up."""
        first_at = None
        while True:
            remaining = None  # wait without limit
            if first_at is not None:
                remaining = max(0.0, first_at + GRACE_SECONDS - time.monotonic())
            readable, _, _ = select.select([self._receiver], [], [], remaining)
            if not readable:
                _write_error(
                    f"error: not saved within {GRACE_SECONDS} s of the signal: ending without\n"
                )
                os._exit(128 + self.signal)

            for number in self._receiver.recv(64):
                if number not in STOP_SIGNALS:
                    continue
                if first_at is None:
                    self.signal = self.signal or number
                    first_at = time.monotonic()
                    name = signal.Signals(number).name
                    _write_error(
                        f"{name}: saving after this step; a second signal ends without saving\n"
                    )
                elif time.monotonic() - first_at > 2:
                    os._exit(128 + number)


def _write_error(text):
    """Write to stderr, from a thread and unbuffered."""
    with contextlib.suppress(OSError):  # nobody may be left to read it
        os.write(2, text.encode())
