"""Asked to stop: the run ends after the step."""

import signal
import threading


class StopRequest:
    """SIGTERM and SIGINT ask the run to end after the step: `asked`, on this process.

    `give_back` leaves the signals to whom they had been. Outside the main thread, where Python lets
    nobody take them, they stay with the program.
    """

    def __init__(self):
        self.asked, self._before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)

    def give_back(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._ask:
                signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self.asked = True
