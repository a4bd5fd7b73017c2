"""Bytes that differ from those of a file, and overrides that are nearly right; hypothesis chooses them."""

import re

from hypothesis import strategies as st

TOKEN = re.compile(rb'"[^"\n]*"|[\w.+-]+|[][{}:,]')
TOKENS = b'null|-1|0|1e999|NaN|""|[]|{}|true|text|99999999999999999999|,|\n'.split(b"|")
PARTS = 1 << 16  # into which a file is divided to say where
OPERATIONS = ("flip", "set", "cut", "delete", "insert", "repeat", "token")
VALUES = ["", "null", "none", "-1", "0", "16", "2.5", "1e30", "9" * 30, "nan", "inf", "true", "auto", "text"]
VALUES += ["'a b'", "[]", "[1,2]", "{}", "{a:1}", "${seed}", "${foo}", "${oc.env:NOWHERE}"]
VALUES += ["a=b", "[1", "'", "\\", "é", "???"]

changes = st.lists(
    st.tuples(
        st.sampled_from(OPERATIONS),
        st.integers(0, PARTS - 1),  # where
        st.binary(min_size=1, max_size=8),
        st.sampled_from(TOKENS),
    ),
    min_size=1,
    max_size=3,
)
Changes = list[tuple[str, int, bytes, bytes]]


def mutated(content: bytes, changes: Changes, limit: int | None = None) -> bytes:
    """The content with the changes, one after the other.

    Args:
        content: of a file.
        changes: of the strategy of this name.
        limit: number of first bytes that they are confined to; None = all.
    """
    for operation, where, some, token in changes:
        position = where * min(len(content), limit or len(content)) // PARTS
        content = _changed(content, operation, position, some, token)
    return content


def _changed(content: bytes, operation: str, i: int, some: bytes, token: bytes) -> bytes:
    before, after = content[:i], content[i:]
    match operation:
        case "flip":
            return before + bytes([after[0] ^ 1 << some[0] % 8]) + after[1:] if after else content
        case "set":
            return before + some + after[len(some) :]
        case "cut":
            return before
        case "delete":
            return before + after[some[0] + 1 :]
        case "insert":
            return before + some + after
        case "repeat":
            return before + after[: some[0] + 1] + after
    found = TOKEN.search(content, i)
    return content[: found.start()] + token + content[found.end() :] if found else content + token


def overrides(keys: list[str], groups: dict[str, list[str]]) -> st.SearchStrategy[list[str]]:
    """Up to three overrides of a command line: values of keys, options of groups, and either with a slip of the pen.

    Args:
        keys: dotted names of the config.
        groups: their options.
    """
    of_key = st.tuples(st.sampled_from(keys), st.sampled_from(VALUES))
    options = [(group, option) for group, names in groups.items() for option in [*names, "nothing", "null", "-1"]]
    right = st.one_of(of_key, st.sampled_from(options)).map("=".join)
    slip = st.tuples(right, st.integers(0, 30), st.sampled_from(["", ".", "=", "[", "+", "~", "@", " ", "x"]))
    slipped = slip.map(lambda made: made[0][: made[1]] + made[2] + made[0][made[1] + 1 :])
    one = st.one_of(right, right, slipped).filter(lambda text: text.strip() and not text.startswith("-"))
    return st.lists(one, min_size=1, max_size=3)
