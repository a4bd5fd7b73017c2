"""What one config key takes: its type and range, the test of a value, and the sentence for one that fails."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from omegaconf import OmegaConf

from ditune.errors import UserError

LARGEST_SEED = 2**63 - 1  # of torch's generators
NOUNS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
    dict: ("a group of keys", "groups of keys"),
}


class Misfit(Exception):
    """A value that its key does not take."""


@dataclass(frozen=True)
class Key:
    """One row of the table of keys.

    Args:
        pattern: dotted name of the key; `*` stands for any text, dots included.
        kind: int, float, str or bool; dict = a group of keys.
        at_least, above, at_most, below: the range of a number.
        choices: the only values; any other type or range is left out then.
        also: values that are taken besides, like "auto".
        null: whether the key may have no value.
        many: whether the value is a list whose items are of the kind and in the range.
        length: of the list; None = any.
        ascending: whether the list must be in ascending order.
    """

    pattern: str
    kind: type
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple = ()
    also: tuple = ()
    null: bool = False
    many: bool = False
    length: int | None = None
    ascending: bool = False

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)

    def read(self, value: object) -> object:
        """The value in the key's own type: whole floats as int, numbers of text keys as text.

        Raises:
            Misfit: the key does not take it.
        """
        if value is None and self.null:
            return None
        if not isinstance(value, bool) and value in self.also:
            return value
        if not self.many:
            return self._item(value)
        if not isinstance(value, list) or (self.length is not None and len(value) != self.length):
            raise Misfit
        items = [self._item(item) for item in value]
        if self.ascending and items != sorted(items):
            raise Misfit
        return items

    def _item(self, value: object) -> object:
        value = READERS[self.kind](value)
        if self.choices and value not in self.choices:
            raise Misfit
        if self.kind in (int, float):
            low = self.at_least is None or value >= self.at_least
            high = self.at_most is None or value <= self.at_most
            inside = (self.above is None or value > self.above) and (self.below is None or value < self.below)
            if not (low and high and inside):
                raise Misfit
        return value

    def wanted(self, value: object) -> str:
        """What the key takes, in words, for somebody who has set it to `value`."""
        one, several = NOUNS[self.kind]
        if self.choices:
            one = several = f"one of {', '.join(map(str, self.choices))}"
        if self.many:
            one = f"a list of {several}" if self.length is None else f"a list of {self.length} {several}"
        bounds = self._bounds(value)
        if not bounds and self.kind is float:
            one = one.replace("number", "finite number")
        order = ", in ascending order" if self.ascending else ""
        others = "".join(f", or {text}" for text in dict.fromkeys(map(shown, self.also + (None,) * self.null)))
        return one + bounds + order + others

    def _bounds(self, value: object) -> str:
        at_most = self.at_most
        if at_most == LARGEST_SEED and not (isinstance(value, int | float) and value > at_most):
            at_most = None  # nobody else needs to hear of it
        if self.at_least is not None and at_most is not None:
            return f" between {self.at_least:g} and {at_most:g}"
        limits = {"of at least": self.at_least, "above": self.above, "of at most": at_most, "below": self.below}
        found = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
        return f" {' and '.join(found)}" if found else ""


def first_fit(name: str, value: object, rows: Sequence[Key]) -> object:
    """The value as the first of the rows that takes it reads it.

    Raises:
        UserError: none does.
    """
    for row in rows:
        try:
            return row.read(value)
        except Misfit:
            continue
    if rows[0].choices:
        raise UserError(
            f"{name} is {shown(value)}, which it cannot be. Set one of {', '.join(map(str, rows[0].choices))}."
        )
    wanted = ", or ".join(row.wanted(value) for row in rows)
    raise UserError(f"{name} is {shown(value)}, but must be {wanted}.")


def shown(value: object) -> str:
    """The value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if value == "" or isinstance(value, dict) else str(value)


def _whole(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise Misfit
    return int(number)


def _number(value: object) -> float:
    if isinstance(value, str):  # what ${oc.env:...} gives
        try:
            value = float(value) if not value.isdecimal() else int(value)
        except ValueError:
            raise Misfit from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Misfit
    return value


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Misfit
    return str(value)  # a folder or a class may be called 7


def _truth(value: object) -> bool:
    if value not in (0, 1) or isinstance(value, float):
        raise Misfit
    return bool(value)


def _group(value: object) -> object:
    if not isinstance(value, dict) and not OmegaConf.is_dict(value):
        raise Misfit
    return value


READERS = {int: _whole, float: _number, str: _text, bool: _truth, dict: _group}
