"""Stage 6 with two of its steps in the wrong order, to show what that loses.

    python3 docs/tutorial/stage6_wrong_order.py [PORT]

Otherwise as stage 6.
"""

import stage6_resume
from stage5_selector import start


class Handler(stage6_resume.Handler):
    def ask(self, subscriber, subscribe, question):
        """First the question, then SUBSCRIBE: what is published in between is in neither."""
        super().ask(subscriber, question, subscribe)


if __name__ == "__main__":
    start(Handler, stage6_resume.Relay(), 5006)
