"""Conditions on a row's columns, written as in SQL's WHERE, as pyarrow expressions:

    width >= 512 and (similarity > 0.28 or caption ilike '%dog%') and url is not null and not key in ('a', 'b')

Compared are columns, numbers and 'texts' (a quote inside is doubled) by `= != <> < <= > >=` (`==` is `=`). `in (…)`
takes a list; `like` a pattern in which % stands for any text and _ for one character (`\\%` for the sign itself);
`ilike` is the same without regard to case. There are `is null`, `is not null`, `and`, `or`, `not` and parentheses; a
hash is text in hex. As in SQL, a comparison with null is neither true nor false; rows pass where the whole is true.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from schemas.errors import UserError

MAX_CHARACTERS = 65_536
_MAX_DEPTH = 100
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(?P<text>'(?:[^']|'')*')"
    r"|(?P<word>[A-Za-z_]\w*)|(?P<sign><=|>=|<>|!=|==|[=<>(),])|(?P<end>$))"
)
_KEYWORDS = {"and", "or", "not", "in", "like", "ilike", "is", "null"}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


class BadFilter(UserError):
    """A condition that cannot be understood: what is wrong, at which character, and what is possible."""


@dataclass(frozen=True)
class _Token:
    kind: str  # number, text, word, keyword, sign or end
    text: str
    position: int  # of its first character, from 1

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else f"{self.text[:40]!r}"


@dataclass(frozen=True)
class _Operand:
    """A column, or a literal value."""

    token: _Token
    value: int | float | str | None = None
    type: pa.DataType | None = None  # of a column

    @property
    def kind(self) -> str:
        if self.type is None:
            return "text" if isinstance(self.value, str) else "number"
        if pat.is_integer(self.type) or pat.is_floating(self.type):
            return "number"
        return "text" if pat.is_string(self.type) else "hash" if pat.is_fixed_size_binary(self.type) else str(self.type)


def parse(text: str, schema: pa.Schema) -> pc.Expression:
    """The expression, true for the rows that pass, over tables of `schema`. Raises BadFilter."""
    if len(text) > MAX_CHARACTERS:
        raise BadFilter(f"the filter has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadFilter(
            f"character {error.start + 1} of the filter is half a surrogate pair, which no text has"
        ) from None
    parser = _Parser(_tokens(text), schema)
    expression = parser.either()
    parser.expect("end", "", "'and', 'or' or the end")
    return expression


def ids(passes: pc.Expression, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """The values of the column `id` in the rows that pass, in their order. Raises BadFilter."""
    from pyarrow import acero  # imports pandas

    # Projected, not filtered: so no column is copied, and none is read that the expression does not name.
    steps = [
        acero.Declaration("table_source", acero.TableSourceNodeOptions(pa.Table.from_batches([batch]))),
        acero.Declaration("project", acero.ProjectNodeOptions([passes], ["passes"])),
    ]
    try:
        mask = acero.Declaration.from_sequence(steps).to_table(use_threads=False)["passes"]
    except pa.ArrowInvalid as error:
        raise BadFilter(f"the filter cannot be evaluated: {error}") from error
    found: npt.NDArray[np.int64] = batch["id"].filter(mask.combine_chunks()).to_numpy()
    return found


def _tokens(text: str) -> list[_Token]:
    found: list[_Token] = []
    at = 0
    while not found or found[-1].kind != "end":
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            position = at + len(text[at:]) - len(text[at:].lstrip())
            hint = "a text has no closing quote" if text[position] == "'" else "texts stand in 'single quotes'"
            raise BadFilter(f"the filter cannot be read from character {position + 1} on ({text[position]!r}): {hint}")
        kind, word = match.lastgroup, match[match.lastgroup]
        if kind == "word" and word.lower() in _KEYWORDS:
            kind, word = "keyword", word.lower()
        found.append(_Token(kind, word, match.start(match.lastgroup) + 1))
        at = match.end()
    return found


class _Parser:
    """By recursive descent; each method takes what it is named after from the tokens and gives its expression."""

    def __init__(self, tokens: Sequence[_Token], schema: pa.Schema):
        self._tokens = tokens
        self._schema = schema
        self._next = 0
        self._depth = 0

    def either(self) -> pc.Expression:
        terms = [self._both()]
        while self._take("keyword", "or"):
            terms.append(self._both())
        return _balanced(terms, lambda a, b: a | b)

    def expect(self, kind: str, text: str, what: str) -> _Token:
        token = self._tokens[self._next]
        if token.kind != kind or (text and token.text != text):
            raise BadFilter(f"expected {what} at character {token.position} of the filter, found {token}")
        self._next += 1
        return token

    def _both(self) -> pc.Expression:
        terms = [self._negated()]
        while self._take("keyword", "and"):
            terms.append(self._negated())
        return _balanced(terms, lambda a, b: a & b)

    def _negated(self) -> pc.Expression:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            position = self._tokens[self._next].position
            raise BadFilter(f"the filter is nested deeper than {_MAX_DEPTH} levels at character {position}")
        if self._take("keyword", "not"):
            found = ~self._negated()
        elif self._take("sign", "("):
            found = self.either()
            self.expect("sign", ")", "')'")
        else:
            found = self._condition()
        self._depth -= 1
        return found

    def _condition(self) -> pc.Expression:
        left = self._operand()
        token = self._tokens[self._next]
        if token.text in _COMPARISONS and token.kind == "sign":
            self._next += 1
            return _compare(left, token, self._operand())
        if self._take("keyword", "is"):
            negated = self._take("keyword", "not")
            self.expect("keyword", "null", "'null'")
            column = _column(left)
            return column.is_valid() if negated else column.is_null()
        negated = self._take("keyword", "not")
        found = self._membership(left) if self._take("keyword", "in") else self._likeness(left)
        return ~found if negated else found

    def _likeness(self, left: _Operand) -> pc.Expression:
        ignore_case = self._take("keyword", "ilike")
        if not ignore_case:
            self.expect("keyword", "like", "a comparison (= != < <= > >=), 'in', 'like', 'ilike' or 'is'")
        column, pattern = _column(left), self._literal()
        _check_same_kind(left, _Operand(left.token, ""), "is not text")
        _check_same_kind(pattern, _Operand(left.token, ""), "is not text: a pattern is, such as '%dog%'")
        return pc.match_like(column, pattern.value, ignore_case=ignore_case)

    def _membership(self, left: _Operand) -> pc.Expression:
        _column(left)
        self.expect("sign", "(", "'('")
        values = [self._literal()]
        while self._take("sign", ","):
            values.append(self._literal())
        self.expect("sign", ")", "',' or ')'")
        type_ = _common_type([left, *values])
        # isin calls null no member; here it is neither a member nor none
        column = _typed(left, type_)
        if pat.is_floating(type_):
            column = column + _scalar(0.0, type_)  # isin tells -0.0 from 0.0
        found = column.isin(pa.array([_value(value, type_) for value in values], type_))
        return pc.if_else(column.is_valid(), found, _scalar(None, pa.bool_()))

    def _literal(self) -> _Operand:
        operand = self._operand()
        if operand.type is not None:
            where = f"at character {operand.token.position} of the filter"
            raise BadFilter(f"expected a number or a 'text' {where}, found the column {operand.token.text!r}")
        return operand

    def _operand(self) -> _Operand:
        token = self._tokens[self._next]
        if token.kind not in ("number", "text", "word"):
            self.expect("word", "", "a column, a number or a 'text'")
        self._next += 1
        if token.kind == "number":
            return _Operand(token, _number(token))
        if token.kind == "text":
            return _Operand(token, token.text[1:-1].replace("''", "'"))
        if token.text not in self._schema.names:
            names = ", ".join(self._schema.names)
            raise BadFilter(f"no column {token.text!r} (character {token.position} of the filter); there are {names}")
        return _Operand(token, type=self._schema.field(token.text).type)

    def _take(self, kind: str, text: str) -> bool:
        token = self._tokens[self._next]
        taken = token.kind == kind and token.text == text
        self._next += taken
        return taken


def _compare(left: _Operand, sign: _Token, right: _Operand) -> pc.Expression:
    if left.type is None and right.type is None:
        raise BadFilter(f"the comparison at character {sign.position} of the filter has no column")
    type_ = _common_type([left, right])
    return _COMPARISONS[sign.text](_typed(left, type_), _typed(right, type_))


def _common_type(operands: Sequence[_Operand]) -> pa.DataType:
    """The type that a comparison is made in. Numbers beside a float column take its precision, so that
    `similarity = 0.28` finds the rows that show 0.28; integers and fractions meet as float64.
    """
    column = next(operand for operand in operands if operand.type is not None)
    for operand in operands:
        wanted = {"number": "a number", "text": "text", "hash": "a hash in hex"}.get(column.kind)
        if wanted is None:
            raise BadFilter(f"{column.token.text!r} is a column of {column.kind}, which a filter cannot compare")
        if not (column.kind == "hash" and operand.type is None):
            _check_same_kind(operand, column, f"is not {wanted}, as {column.token.text!r} is")
    if column.kind != "number":
        return column.type
    types = {operand.type for operand in operands if operand.type is not None}
    fractions = any(isinstance(operand.value, float) for operand in operands)
    if all(pat.is_integer(type_) for type_ in types):
        return pa.float64() if fractions else pa.int64()
    return types.pop() if len(types) == 1 else pa.float64()


def _check_same_kind(operand: _Operand, like: _Operand, message: str) -> None:
    if operand.kind != like.kind:
        raise BadFilter(f"{operand.token.text[:40]} at character {operand.token.position} of the filter {message}")


def _column(operand: _Operand) -> pc.Expression:
    if operand.type is None:
        raise BadFilter(f"expected a column at character {operand.token.position} of the filter, found {operand.token}")
    return pc.field(operand.token.text)


def _typed(operand: _Operand, type_: pa.DataType) -> pc.Expression:
    if operand.type is None:
        return _scalar(_value(operand, type_), type_)
    column = pc.field(operand.token.text)
    return column if operand.type == type_ else column.cast(type_, safe=False)


def _scalar(value: object, type_: pa.DataType) -> pc.Expression:
    return pc.scalar(pa.scalar(value, type_))


def _value(operand: _Operand, type_: pa.DataType) -> object:
    """The literal as a value of the type. Raises BadFilter where it is none."""
    where = f"{operand.token.text[:40]} at character {operand.token.position} of the filter"
    if pat.is_fixed_size_binary(type_):
        digits = operand.value if isinstance(operand.value, str) else ""
        if not re.fullmatch(r"[0-9a-fA-F]*", digits) or len(digits) != 2 * type_.byte_width:
            raise BadFilter(f"{where} is not {2 * type_.byte_width} hexadecimal digits in quotes")
        return bytes.fromhex(digits)
    if pat.is_integer(type_) and not -(2**63) <= int(operand.value or 0) < 2**63:
        raise BadFilter(f"{where} is too large")
    if pat.is_float32(type_):
        with np.errstate(over="ignore"):
            return np.float32(operand.value)
    return float(operand.value or 0) if pat.is_floating(type_) else operand.value


def _number(token: _Token) -> int | float:
    if len(token.text) > 40:
        raise BadFilter(f"the number at character {token.position} of the filter has too many digits")
    return int(token.text) if re.fullmatch(r"[-+]?\d+", token.text) else float(token.text)


def _balanced(terms: list[pc.Expression], join: Callable[[Any, Any], Any]) -> pc.Expression:
    """The terms joined in a tree of little depth: Arrow walks expressions by recursion."""
    while len(terms) > 1:
        pairs = [join(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(terms) // 2 * 2 :]
    return terms[0]
