"""Stage 6: a page that was away gets what it missed when it reconnects.

    python3 docs/tutorial/stage6_resume.py [PORT]

GET /stream takes channel=A&channel=B, lastEventId=ID and last=N; POST /publish may name a "channel", and answers the
event's id. The rest is as in stage 5. PAUSE_S in the environment: the time between SUBSCRIBE and the question.
"""

import json
import os
import re
from dataclasses import dataclass
from time import sleep
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import stage5_selector
from stage2_redis import REDIS, Event, event_of, frame_of
from stage3_closed_tabs import HEARTBEAT_S
from stage5_selector import Subscriber, start

PAUSE_S = float(os.environ.get("PAUSE_S", "0"))
WAITING, LIVE = "waiting", "live"  # states of a stream: it has asked what it missed; it has been sent the answer

COUNTER_KEY = "tutorial:counter"  # the newest id of all channels
NEWEST_KEY = "tutorial:newest"  # hash: channel → its newest id
HISTORY_KEY = "tutorial:history:"  # + channel: a Redis Stream of {previous: the id before it, frame: without its id}
EVENT_ID = re.compile("[0-9]{16}")

# An id is one number of 16 digits, for all channels: the clock's microseconds, or one more than the newest id.
# Redis runs a script atomically: nobody sees an event that is kept but not published, or the other way round.
PUBLISH_LUA = """
local channel, message, frame = unpack(ARGV)
local time = redis.call('TIME')
local newest = redis.call('GET', KEYS[1]) or 0
local id = string.format('%.0f', math.max(time[1] * 1e6 + time[2], newest + 1))
local previous = redis.call('HGET', KEYS[2], channel) or '0000000000000000'
redis.call('SET', KEYS[1], id)
redis.call('HSET', KEYS[2], channel, id)
redis.call('XADD', KEYS[3], 'MAXLEN', 100, id .. '-0', 'previous', previous, 'frame', frame)
redis.call('PUBLISH', channel, string.sub(message, 1, -2) .. ', "id": "' .. id .. '"}')
return id
"""

QUESTION_LUA = """
local after, last = ARGV[1], ARGV[2]
local newest_of_each, entries = {}, {}
for i = 3, #KEYS do
  newest_of_each[i - 2] = redis.call('HGET', KEYS[2], ARGV[i]) or '0000000000000000'
  if tonumber(after) then
    for _, entry in ipairs(redis.call('XREVRANGE', KEYS[i], '+', '(' .. after, 'COUNT', last)) do
      entries[string.sub(entry[1], 1, 16)] = {entry[2][2], entry[2][4]}
    end
  end
end
local newest = redis.call('GET', KEYS[1]) or '0000000000000000'  -- older than any id
return cjson.encode({newest = newest, newest_of_each = newest_of_each, entries = entries})
"""


class Since(NamedTuple):
    """What a stream wants from the history, before anything live."""

    after: str = "$"  # an id; "$": nothing; "0": all that is kept; "": an id that is not ours
    last: int = 100  # at most this many events of each channel, the newest


def question(channels, since):
    """The command that asks Redis what a stream missed."""
    keys = [COUNTER_KEY, NEWEST_KEY, *(HISTORY_KEY + channel for channel in channels)]
    return ["EVAL", QUESTION_LUA, len(keys), *keys, *since, *channels]


class History(NamedTuple):
    """What Redis answers to the question, as JSON."""

    newest: str  # id of all channels
    newest_of_each: list
    entries: dict  # {id: (previous, frame)}: what is kept after the id in the question


def replay(after, history):
    """The events after an id, [(id, frame)], and why some may be missing ("" if none are). It walks back in time."""
    if not after or after > history.newest:
        return [], "unknown-id"
    found, reason = [], ""
    for event_id in history.newest_of_each:
        while event_id in history.entries:
            previous, frame = history.entries[event_id]
            found.append((event_id, frame))
            event_id = previous
        if event_id > after:  # it is no longer kept
            reason = "trimmed"
    return sorted(found), reason


def notice(type, position, **data):
    """An event of our own. Its id is the position from which the page resumes."""
    return frame_of(Event(json.dumps(data), type, position))


def missed_by(since, history):
    """What a stream is sent before anything live: all that it missed, or a reset."""
    found, reason = replay(since.after, history)
    if reason and since.after not in ("$", "0"):
        return notice("stream-reset", history.newest, reason=reason)
    frames = [f"id: {event_id}\n{frame}".encode() for event_id, frame in found]
    return b"".join(frames) + notice("stream-position", history.newest, heartbeat=HEARTBEAT_S)


@dataclass(eq=False)
class Stream(stage5_selector.Stream):
    since: Since
    state: str = WAITING


class Relay(stage5_selector.Relay):
    def take(self, stream, kind, text):
        """A message that comes before the answer is in the answer. One that comes later is for the stream."""
        if kind is None:
            stream.state = LIVE
            history = History(**json.loads(text))
            self.send(stream, missed_by(stream.since, history))
        elif stream.state is LIVE:
            super().take(stream, kind, text)


class Handler(stage5_selector.Handler):
    def answer_stream(self):
        query = parse_qs(urlsplit(self.path).query)
        channels = dict.fromkeys(query.get("channel", ["sse"]))  # each once
        since = self.since(query)
        self.start("text/event-stream")
        subscriber = Subscriber()
        self.ask(subscriber, ["SUBSCRIBE", *channels], question(channels, since))
        self.hand_over(Stream, subscriber, since)

    def ask(self, subscriber, subscribe, question):
        """First SUBSCRIBE, then the question: what is published in between is in the answer."""
        subscriber.send(*subscribe)
        sleep(PAUSE_S)
        subscriber.send(*question)

    def since(self, query):
        """A browser that reconnects sends its last event ID; our page puts it in the URL when it opens a new stream."""
        event_id = self.headers.get("Last-Event-ID") or query.get("lastEventId", [""])[-1]
        if event_id:
            return Since(event_id if EVENT_ID.fullmatch(event_id) else "")
        if "last" in query:
            return Since("0", int(query["last"][-1]))
        return Since()

    def publish(self, message):
        channel = str(json.loads(message).get("channel", "sse"))
        frame = frame_of(event_of(message))
        keys = [COUNTER_KEY, NEWEST_KEY, HISTORY_KEY + channel]
        return REDIS.eval(PUBLISH_LUA, len(keys), *keys, channel, message, frame).decode()


if __name__ == "__main__":
    start(Handler, Relay(), 5006)
