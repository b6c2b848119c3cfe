"""Stage 5 with two of its steps in the wrong order, to see what that loses.

    python3 docs/tutorial/stage5_wrong_order.py [PORT]

The requests and the setting are those of stage 5.
"""

from time import sleep

import stage5_resume
from stage4_selector import start
from stage5_resume import PAUSE_S


class Handler(stage5_resume.Handler):
    def stream(self):
        """First the history, then into the relay: what is published in between is in neither."""
        last_event_id = self.headers.get("Last-Event-ID", "")
        frames, position = stage5_resume.replay(last_event_id)
        sleep(PAUSE_S)
        relay = self.relay
        descriptor = self.connection.detach()
        stream = stage5_resume.Stream(descriptor)
        relay.call(relay.add, stream)
        relay.call(relay.go_live, stream, frames, position)


if __name__ == "__main__":
    relay = stage5_resume.Relay()
    start(Handler, relay, 5005)
