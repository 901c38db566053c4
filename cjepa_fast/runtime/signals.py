"""Asked to stop: the run ends after the step."""

import contextlib
import os
import signal
import threading

from cjepa_fast.runtime.distributed import rank

SAID = "{}: stopping after this step\n"


class StopRequest:
    """SIGTERM, SIGINT and SIGHUP (a terminal that closes) ask the run to end after the step:
    `asked`, on this process. A SIGHUP that is ignored, as under nohup, stays so.

    `give_back` leaves the signals to whom they had been. Outside the main thread, where Python lets
    nobody take them, they stay with the program.
    """

    def __init__(self):
        self.asked, self._before = False, {}
        if threading.current_thread() is threading.main_thread():
            hung_up = [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
            for number in (signal.SIGTERM, signal.SIGINT, *hung_up):
                self._before[number] = signal.signal(number, self._ask)

    def give_back(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._ask:
                signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if not self.asked and rank() == 0:
            with contextlib.suppress(OSError):  # a print may itself have been interrupted
                os.write(2, SAID.format(signal.Signals(number).name).encode())
        self.asked = True
