import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstate.jsontext import MAX_DEPTH, first_repeated, json_fault, shown

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@given(values)
def test_what_json_writes_is_sound(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert json_fault(text.encode(errors="surrogatepass")) in (None, "is not UTF-8 at byte 1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a":1,"a":1}', "has the key 'a' twice in one object"),
        (b'[{"b":{"a":1,"\\u0061":2}}]', "has the key 'a' twice in one object"),
        (b'{"a":"\xff"}', "is not UTF-8 at byte 6"),
        (b"\xed\xa0\x80", "is not UTF-8 at byte 0"),
        (b"[" * 65 + b"]" * 65, "nests 65 deep, expected at most 64"),
        (b"[" * 1_000_000, "nests 1000000 deep, expected at most 64"),
        (b'{"a":' * 100_000, "nests 100000 deep"),
        (b"[1" + b"0" * 400 + b"]", "has a number of more than 400 digits: 10000000000000000000…"),
        (b"[NaN]", "is not JSON: NaN is no JSON number"),
        (b"[-Infinity]", "is not JSON: -Infinity is no JSON number"),
        (b"", "is not JSON: Expecting value"),
        (b"{}{}", "is not JSON: Extra data"),
        (b'{"a', "is not JSON: Unterminated string"),
        (b"\xef\xbb\xbf{}", "is not JSON: Unexpected UTF-8 BOM"),
        (b'["\n"]', "is not JSON: Invalid control character"),
    ],
)
def test_what_is_hostile_is_told(text, says):
    assert str(json_fault(text)).startswith(says)


def test_brackets_and_digits_in_strings_are_text():
    text = json.dumps(["[" * 1000 + '\\"' + "{" * 1000, "9" * 5000, "\\"]).encode()
    assert json_fault(text) is None
    assert json_fault(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) is None


def test_constants_are_let_through_where_asked_for():
    assert json_fault(b'{"a":NaN,"b":-Infinity}', constants=True) is None


@pytest.mark.parametrize(
    "grow",
    [
        lambda n: b'"' + b"\\u0061" * n + b'"',
        lambda n: b'"' * n,
        lambda n: b"[" + b"1," * n,
        lambda n: b"{" + b'"a":1,' * n,
        lambda n: b"{" + b",".join(b'"%d":1' % i for i in range(n)) + b',"0":1}',
        lambda n: b"[" * n + b"]" * n,
        lambda n: b"9" * n,
        lambda n: b"\\" * n,
    ],
    ids=["escapes", "quotes", "items", "unclosed", "last twice", "brackets", "digits", "slashes"],
)
def test_time_grows_no_faster_than_the_text(grow):
    def seconds(n):
        text = grow(n)
        began = time.perf_counter()
        json_fault(text)
        return time.perf_counter() - began

    seconds(1000)
    short, long = min(seconds(10_000) for _ in range(3)), seconds(320_000)
    assert long < 32 * 12 * short + 0.05  # 32 × as long; quadratic would be 1,024 ×


def test_texts_in_errors_are_short():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10**6)) < 120
    assert first_repeated(["a", "b", "b", "a"]) == "b"
    assert first_repeated(["a"]) is None
