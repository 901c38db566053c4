"""Asked to stop: the run ends after the step."""

import signal


class StopRequest:
    """SIGTERM and SIGINT ask the run to end after the step: `asked`, on this process."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        self.asked = True
