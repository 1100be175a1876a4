import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core import where
from fusion_core.where import BadFilter
from schemas.index import META

Row = dict[str, Any]
Truth = Callable[[Row], bool | None]  # by SQL's three-valued logic

INTEGERS, FLOATS, TEXTS = ("id", "row", "offset", "width", "height"), ("similarity",), ("key", "caption", "url")
COMPARISONS = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<>": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip

whole = st.integers(-3, 3) | st.sampled_from([2**31 - 1, -(2**31)])
fractions = st.sampled_from([0.0, -0.0, 0.28, 0.5, 1.5, -2.0, 1e30, 3.0])
words = st.text(st.sampled_from("ab%_'\\\nÄ€"), max_size=4)
rows = st.lists(
    st.fixed_dictionaries(
        {
            "key": words,
            "shard": words,
            "row": whole,
            "offset": st.none() | whole | st.sampled_from([2**53 + 1, -(2**63)]),
            "length": st.none() | whole,
            "caption": st.none() | words,
            "url": st.none() | words,
            "width": st.none() | whole,
            "height": st.none() | whole,
            "sha256": st.none() | st.sampled_from([b"\0" * 32, b"\xab" * 32]),
            "similarity": st.none() | fractions | st.just(float("nan")) | st.just(float("inf")),
        }
    ),
    max_size=12,
)


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def number_of(name: str, row: Row, others: list[Any]) -> Any:
    """The value of a column as it is compared with `others`: float32 beside literals, float64 beside fractions."""
    value = row[name]
    if value is None or name in FLOATS:
        return None if value is None else np.float32(value)
    return np.float64(value) if any(isinstance(other, float) for other in others) else value


@st.composite
def numeric(draw: st.DrawFn) -> tuple[str, Truth]:
    name = draw(st.sampled_from(INTEGERS + FLOATS))
    literals = draw(st.lists(whole | fractions, min_size=1, max_size=3))
    as_compared = [np.float32(value) if name in FLOATS else value for value in literals]
    form = draw(st.sampled_from([*COMPARISONS, "in"]))

    def truth(row: Row) -> bool | None:
        value = number_of(name, row, literals if form == "in" else literals[:1])
        if value is None:
            return None
        if form == "in":
            return any(bool(value == other) for other in as_compared)
        return bool(COMPARISONS[form](value, as_compared[0]))

    def turned(row: Row) -> bool | None:
        value = number_of(name, row, literals[:1])
        return None if value is None else bool(COMPARISONS[form](as_compared[0], value))

    if form == "in":
        return f"{name} IN ({', '.join(map(repr, literals))})", truth
    if draw(st.booleans()):
        return f"{literals[0]!r}{form}{name}", turned
    return f"{name}{form} {literals[0]!r}", truth


@st.composite
def of_columns(draw: st.DrawFn) -> tuple[str, Truth]:
    pairs = [(a, b) for names in (INTEGERS + FLOATS, TEXTS) for a in names for b in names]
    a, b = draw(st.sampled_from(pairs))
    sign = draw(st.sampled_from(list(COMPARISONS)))

    def truth(row: Row) -> bool | None:
        x, y = row[a], row[b]
        if x is None or y is None:
            return None
        if (a in FLOATS) != (b in FLOATS):
            x, y = (np.float64(np.float32(v) if name in FLOATS else v) for name, v in ((a, x), (b, y)))
        return bool(COMPARISONS[sign](x, y))

    return f"{a} {sign} {b}", truth


@st.composite
def textual(draw: st.DrawFn) -> tuple[str, Truth]:
    name = draw(st.sampled_from(TEXTS))
    values = draw(st.lists(words, min_size=1, max_size=3))
    form = draw(st.sampled_from([*COMPARISONS, "in", "not in"]))
    given = values if "in" in form else values[:1]

    def truth(row: Row) -> bool | None:
        if row[name] is None:
            return None
        if "in" in form:
            return bool((row[name] in given) != (form == "not in"))
        return bool(COMPARISONS[form](row[name], given[0]))

    right = ", ".join(map(quoted, given))
    return f"{name} {form} " + (f"({right})" if "in" in form else right), truth


@st.composite
def like(draw: st.DrawFn) -> tuple[str, Truth]:
    name, negated = draw(st.sampled_from(TEXTS)), draw(st.booleans())
    form = draw(st.sampled_from(["like", "ilike"]))
    pieces = draw(st.lists(st.sampled_from(["a", "b", "A", "%", "_", r"\%", r"\_", r"\\", "'", "\n", "€"]), max_size=5))
    regex = "".join({"%": ".*", "_": "."}.get(piece, re.escape(piece[-1])) for piece in pieces)
    pattern = re.compile(regex, re.DOTALL | (re.IGNORECASE if form == "ilike" else 0))

    def truth(row: Row) -> bool | None:
        return None if row[name] is None else (pattern.fullmatch(row[name]) is not None) != negated

    return f"{name} {'not ' if negated else ''}{form} {quoted(''.join(pieces))}", truth


@st.composite
def null(draw: st.DrawFn) -> tuple[str, Truth]:
    name, negated = draw(st.sampled_from(META.names)), draw(st.booleans())
    return f"{name} is {'not ' if negated else ''}null", lambda row: (row[name] is None) != negated


@st.composite
def hashed(draw: st.DrawFn) -> tuple[str, Truth]:
    digest, negated = draw(st.sampled_from(["00" * 32, "aB" * 32])), draw(st.booleans())

    def truth(row: Row) -> bool | None:
        return None if row["sha256"] is None else (row["sha256"] == bytes.fromhex(digest)) != negated

    return f"sha256 {'!=' if negated else '='} '{digest}'", truth


def both(a: bool | None, b: bool | None) -> bool | None:
    return False if a is False or b is False else None if a is None or b is None else True


def no(a: bool | None) -> bool | None:
    return None if a is None else not a


def joined(parts: st.SearchStrategy[tuple[str, Truth]]) -> st.SearchStrategy[tuple[str, Truth]]:
    @st.composite
    def build(draw: st.DrawFn) -> tuple[str, Truth]:
        form = draw(st.sampled_from(["and", "or", "not", "OR"]))
        (a, is_a), (b, is_b) = draw(parts), draw(parts)
        if form == "not":
            return f"not ({a})", lambda row: no(is_a(row))
        if form == "and":
            return f"({a}) and ({b})", lambda row: both(is_a(row), is_b(row))
        return f"({a}) {form} ({b})", lambda row: no(both(no(is_a(row)), no(is_b(row))))

    return build()


conditions = st.recursive(numeric() | of_columns() | textual() | like() | null() | hashed(), joined, max_leaves=6)


def batch_of(found: list[Row]) -> pa.RecordBatch:
    for number, row in enumerate(found):
        row["id"] = number
    return pa.RecordBatch.from_pylist(found, schema=META)


@given(rows, conditions)
@settings(max_examples=200, deadline=None)
def test_a_filter_passes_the_rows_that_its_meaning_passes(found: list[Row], condition: tuple[str, Truth]) -> None:
    text, truth = condition
    batch = batch_of(found)
    expected = [row["id"] for row in found if truth(row) is True]
    assert where.ids(where.parse(text, META), batch).tolist() == expected, text


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        ("width = 1 or width = 2 and height = 9", [0]),  # and binds closer
        ("not width = 1 and height = 2", [1]),  # not binds closest
        ("not (width = 1 and height = 9)", [0, 1]),
        ("width = 1 or width = 2 or height = 2", [0, 1]),
        ("url is null", [1]),
        ("caption like '%''s%'", [0]),
        ("caption ilike 'DOG%'", [1]),
        (" \n width\t>=1 ", [0, 1]),
    ],
)
def test_precedence_and_spelling(text: str, passing: list[int]) -> None:
    always = {"key": "k", "shard": "s", "row": 0}
    found = [
        {**always, "width": 1, "height": 2, "url": "u", "caption": "the dog's"},
        {**always, "width": 2, "height": 2, "url": None, "caption": "Dogs"},
    ]
    assert where.ids(where.parse(text, META), batch_of(found)).tolist() == passing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at character 1 of the filter, found the end"),
        ("widht > 3", r"no column 'widht' \(character 1 of the filter\); there are id, key, .* similarity"),
        ("width > 3 and hight > 2", r"'hight' \(character 15"),
        ("width > 'a'", "'a' at character 9 of the filter is not a number, as 'width' is"),
        ("caption > 3", "3 at character 11 of the filter is not text"),
        ("caption < width", "width at character 11 of the filter is not text"),
        ("width like '3%'", "width at character 1 of the filter is not text"),
        ("caption like 3", "pattern"),
        ("caption like key", "expected a number or a 'text' at character 14 of the filter, found the column 'key'"),
        ("key in ('a', 1)", "1 at character 14 of the filter is not text"),
        ("key in ()", "found '\\)'"),
        ("3 in (3)", "expected a column at character 1"),
        ("'a' like 'a'", "expected a column at character 1"),
        ("3 is null", "expected a column at character 1"),
        ("1 = 1", "comparison at character 3 of the filter has no column"),
        ("width >", "character 8 of the filter, found the end"),
        ("width", "expected a comparison .* character 6"),
        ("(width > 3", "expected '\\)' at character 11 of the filter, found the end"),
        ("width > 3)", "expected 'and', 'or' or the end at character 10 of the filter, found '\\)'"),
        ("1 < width < 3", "expected 'and', 'or' or the end at character 11"),
        ("width is 3", "expected 'null' at character 10"),
        ("caption = 'it", r"from character 11 on \(\"'\"\): a text has no closing quote"),
        ('caption = "it"', "single quotes"),
        ("width > 3; drop", "from character 10 on"),
        ("sha256 = 'ab'", "'ab' at character 10 of the filter is not 64 hexadecimal digits"),
        ("sha256 = 3", "not 64 hexadecimal"),
        ("id = 9223372036854775808", "too large"),
        (f"id = {'9' * 41}", "too many digits"),
        ("(" * 5000, "nested deeper than 100"),
        ("not " * 5000, "nested deeper than 100"),
        ("width > 3 or " * 6000, "at most 65,536"),
        ("caption = '\ud800'", "surrogate"),
    ],
)
def test_what_cannot_be_understood_is_told_with_its_place(text: str, message: str) -> None:
    with pytest.raises(BadFilter, match=message):
        where.parse(text, META)


def test_a_long_filter_is_no_deep_one() -> None:
    text = " or ".join(f"id={number}" for number in range(0, 12_000, 2))
    batch = batch_of([{"key": "k", "shard": "s", "row": 0} for _ in range(100)])
    assert where.ids(where.parse(text[: where.MAX_CHARACTERS].rpartition(" or ")[0], META), batch).tolist() == list(
        range(0, 100, 2)
    )


TOKENS = (
    *("width", "caption", "sha256", "and", "or", "not", "in", "like", "ilike", "is", "null"),
    *("(", ")", ",", "<", "=", "1", "-2.5e3", "'a%'", "nowhere"),
)


@given(st.text(max_size=30) | st.lists(st.sampled_from(TOKENS), max_size=10).map(" ".join))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_filter_or_a_bad_one(text: str) -> None:
    try:
        passes = where.parse(text, META)
    except BadFilter:
        return
    where.ids(passes, batch_of([{"key": "k", "shard": "s", "row": 0, "width": 1}]))
