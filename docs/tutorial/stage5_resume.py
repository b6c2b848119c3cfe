"""Stage 5: events have ids and are kept for a while. A page that was away gets what it missed when it comes back.

    python3 docs/tutorial/stage5_resume.py [PORT]

POST /publish answers the event's id; the other requests are those of stage 3.
PAUSE_S in the environment makes the moment longer in which a stream that comes back could lose events.
"""

import json
import os
import re
from math import inf
from socket import socket
from time import sleep

import stage4_selector
from stage2_redis import REDIS, frame_of

HISTORY = "tutorial:history"  # a Redis Stream: entries, each with an id that Redis makes, "1764000000000-0"
EVENT_ID = re.compile("[0-9]{1,18}-[0-9]{1,18}")
PAUSE_S = float(os.environ.get("PAUSE_S", "0"))

# Redis runs a script in one go: nobody can see an event that is kept and not yet published, or the other way round.
PUBLISH_LUA = """
local id = redis.call('XADD', KEYS[1], 'MAXLEN', 100, '*', 'message', ARGV[1])
redis.call('PUBLISH', 'sse', string.sub(ARGV[1], 1, -2) .. ', "id": "' .. id .. '"}')
return id
"""


def order(event_id):
    """Ids as numbers: as text, "…-10" would come before "…-9". An event without an id comes after all others."""
    if not event_id:
        return [inf]
    return [int(part) for part in event_id.split("-")]


def kept_from(event_id):
    """{id: frame} of the events that are kept, from this one on."""
    frames = {}
    for entry, members in REDIS.xrange(HISTORY, min=event_id):
        event = json.loads(members[b"message"])
        event["id"] = entry.decode()
        frames[event["id"]] = frame_of(json.dumps(event))
    return frames


def tell_position(event_type):
    """(frames, position): one event without data, to tell a page the newest id."""
    newest = REDIS.xrevrange(HISTORY, count=1) or [(b"0-0", {})]
    position = newest[0][0].decode()
    frame = f"event: {event_type}\nid: {position}\ndata:\n\n"
    return frame.encode(), position


def replay(last_event_id):
    """(frames, position): what a page with this Last-Event-ID has missed, and the id that it is at then."""
    if EVENT_ID.fullmatch(last_event_id):
        frames = kept_from(last_event_id)
        if last_event_id in frames:  # so everything after it is there, too
            position = list(frames)[-1]
            del frames[last_event_id]
            return b"".join(frames.values()), position
    # The page is new; or its id is older than all that is kept, or not ours, and nobody knows what it has missed.
    return tell_position("stream-reset" if last_event_id else "stream-position")


class Stream(socket):
    """A browser's connection, as in stage 4, and where it is."""

    def __init__(self, descriptor):
        super().__init__(fileno=descriptor)
        self.held = []  # what comes before the replay is sent; then None
        self.replayed = []  # order of the last event of the replay


class Relay(stage4_selector.Relay):
    """As in stage 4, but a stream gets its replay first."""

    def go_live(self, stream, frames, position):
        """Send the replay, then what was held meanwhile, but nothing twice."""
        if stream not in self.streams:  # it has left already
            return
        stream.replayed = order(position)
        for event_order, frame in stream.held:
            if event_order > stream.replayed:
                frames += frame
        stream.held = None
        self.send(stream, frames)

    def take_message(self, message):
        members = json.loads(message)
        event_order = order(members.get("id"))
        frame = frame_of(message)
        for stream in list(self.streams):
            if stream.held is not None:
                stream.held.append((event_order, frame))
            elif event_order > stream.replayed:
                self.send(stream, frame)


class Handler(stage4_selector.Handler):
    def stream(self):
        """First into the relay, then the history: what is published in between is in both, rather than in neither."""
        relay = self.relay
        descriptor = self.connection.detach()
        stream = Stream(descriptor)
        relay.call(relay.add, stream)
        sleep(PAUSE_S)
        last_event_id = self.headers.get("Last-Event-ID", "")
        frames, position = replay(last_event_id)
        relay.call(relay.go_live, stream, frames, position)

    def publish(self, message):
        event_id = REDIS.eval(PUBLISH_LUA, 1, HISTORY, message)
        return event_id.decode()


if __name__ == "__main__":
    stage4_selector.start(Handler, Relay(), 5005)
