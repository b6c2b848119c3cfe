"""Messages that all ways to a page are tried with: what is published, and what a page then reads."""

from __future__ import annotations

import json
import re
from typing import Any

AS_PUBLISHED: dict[str, Any] = {
    "Chinese": "哪种编程语言最好？绝对是 PHP",
    "emoji": "👍🏽 🇨🇳 👩‍💻 🦄",
    "U+2028 and U+2029 inside a line": "one\u2028still one\u2029still one",
    "U+0085, VT, FF and separators inside a line": "a\x85b\x0bc\x0cd\x1ce\x1df\x1eg",
    "lines with LF": "one\ntwo\nthree",
    "lines with CR LF": "one\r\ntwo\r\nthree",
    "lines with CR": "one\rtwo\rthree",
    "lines with all of them": "\r\none\n\rtwo\r\r\n\n",
    "a line end alone": "\n",
    "ends in a line end": "one\n",
    "empty": "",
    "a space": " ",
    "leading space": " one\n  two",
    "trailing space": "one \ntwo  ",
    "colons": ":one\n: two",
    "what looks like fields": "one\nevent: forged\nid: 7\nretry: 1\n\ndata: two",
    "control characters": "a\tb\x00c\x07d\x7f",
    "byte order mark": "\ufeffone",
    "the last character of all": "\uffff\U0010ffff",
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "a large number": 2**64 + 1,
    "a fraction": -1.5,
    "an empty object": {},
    "nested JSON": {"问": [1, None, {"deep": [[["x\ny"]], True]}], "e": "👍", "separator": "\u2028"},
    "500 KB": "数据 " * 71_000,
}


def as_read(value: Any) -> str:
    """What a browser reads when this is published as `data`: each line end is LF to it."""
    if isinstance(value, str):
        return re.sub("\r\n|\r", "\n", value)
    return json.dumps(value, ensure_ascii=False)


NO_EVENT_OBJECTS = {
    "a word": b"hello",
    "lines": b"hello\nworld",
    "a number": b"42",
    "null": b"null",
    "a JSON string": b'"hello"',
    "an array": b'[{"data": 1}]',
    "an object without data": b'{"type": "greet", "id": "7", "retry": 1}',
    "JSON that breaks off": b'{"data": "hello"',
    "JSON and more": b'{"data": 1} {"data": 2}',
    "single quotes": b"{'data': 1}",
    "nothing": b"",
    "NUL": b"\0",
    "what looks like fields": b"data: 1\nevent: forged",
    "an array of arrays": b"[" * 50_000 + b"]" * 50_000,
    "an object of objects": b'{"data": ' * 50_000 + b"1" + b"}" * 50_000,
    "an object with too many digits": b'{"data": ' + b"1" * 5000 + b"}",
}


POISON = {
    "type with LF": (b'{"data": 1, "type": "a\\nevent: b"}', "type must not hold a line break"),
    "type with CR": (b'{"data": 1, "type": "a\\rb"}', "type must not hold a line break"),
    "type that ends in LF": (b'{"data": 1, "type": "a\\n"}', "type must not hold a line break"),
    "type is a number": (b'{"data": 1, "type": 7}', "type must be a string"),
    "type is an object": (b'{"data": 1, "type": {}}', "type must be a string"),
    "type is false": (b'{"data": 1, "type": false}', "type must be a string"),
    "id with LF": (b'{"data": 1, "id": "a\\ndata: b"}', "id must not hold a line break or NUL"),
    "id with CR": (b'{"data": 1, "id": "a\\rb"}', "id must not hold a line break or NUL"),
    "id with NUL": (b'{"data": 1, "id": "a\\u0000b"}', "id must not hold a line break or NUL"),
    "id is too long": (json.dumps({"data": 1, "id": "é" * 65}).encode(), "id must not be longer than 128 bytes"),
    "id is true": (b'{"data": 1, "id": true}', "id must be a string"),
    "id is a fraction": (b'{"data": 1, "id": 1.5}', "id must be a string"),
    "id is an array": (b'{"data": 1, "id": []}', "id must be a string"),
    "retry is text": (b'{"data": 1, "retry": "3000"}', "retry must be a whole number of milliseconds"),
    "retry is a fraction": (b'{"data": 1, "retry": 1.5}', "retry must be a whole number of milliseconds"),
    "retry is negative": (b'{"data": 1, "retry": -1}', "retry must be a whole number of milliseconds"),
    "retry is true": (b'{"data": 1, "retry": true}', "retry must be a whole number of milliseconds"),
    "NaN": (b'{"data": [NaN]}', "Out of range float values are not JSON compliant"),
    "a number beyond all": (b'{"data": 1e999}', "Out of range float values are not JSON compliant"),
    "invalid UTF-8": (b"\xff\xfe", "message is not UTF-8"),
    "invalid UTF-8 inside JSON": (b'{"data": "\xc3\x28"}', "message is not UTF-8"),
    "a surrogate in UTF-8": (b'{"data": "\xed\xa0\x80"}', "message is not UTF-8"),
    "a lone surrogate in data": (b'{"data": "\\ud800"}', "a lone surrogate cannot be sent as UTF-8"),
    "a lone surrogate in nested data": (b'{"data": [{"a": "\\udc00"}]}', "a lone surrogate cannot be sent as UTF-8"),
    "a lone surrogate in type": (b'{"data": 1, "type": "\\ud83d"}', "a lone surrogate cannot be sent as UTF-8"),
    "a lone surrogate in id": (b'{"data": 1, "id": "\\ud83d"}', "a lone surrogate cannot be sent as UTF-8"),
}


NEW_ANSWERS = {"question": "which programming is the best?", "value": "Absolutely, PHP", "who": "allen"}
