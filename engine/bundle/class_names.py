"""Match labels to classes: by name, in any case, or by an alias of public data sets."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# names of the method's classes in public data sets, in clinical order
VOCABULARY = {
    "normal": ("normal", "healthy", "0"),
    "osteopenia": ("osteopenia", "op", "1"),
    "osteoporosis": ("osteoporosis", "os", "2"),
}
CANONICAL = {alias: name for name, aliases in VOCABULARY.items() for alias in aliases}
DIGITS = {"0", "1", "2"}
_GROUPS = {"bone_loss": ("osteopenia", "osteoporosis")}  # classes that are also evaluated as one


class ClassNames:
    """The classes and their aliases. `digits`: whether 0, 1 and 2 are aliases."""

    def __init__(self, classes: Sequence[str], *, digits: bool) -> None:
        self.classes = tuple(classes)
        self._known = {label_key(name): position for position, name in enumerate(self.classes)}
        self.aliases: set[str] = set()  # aliases that were found in labels
        for name, aliases in VOCABULARY.items():
            if name in self._known:
                for alias in aliases:
                    if digits or alias not in DIGITS:
                        self._known.setdefault(alias, self._known[name])

    @classmethod
    def of(cls, classes: Sequence[str]) -> ClassNames:
        """Return the names of `classes`; digits are aliases if all classes of the method are there."""
        return cls(classes, digits=set(VOCABULARY) <= {label_key(name) for name in classes})

    def find(self, name: str) -> int | None:
        """Return the position of the class that a label names, None for an unknown label."""
        if name in self.classes:  # another class may differ only in case
            return self.classes.index(name)
        position = self._known.get(label_key(name))
        if position is not None and label_key(name) != label_key(self.classes[position]):
            self.aliases.add(name)
        return position

    def error_for(self, label: str) -> str:
        """Describe the error in a label that names no class."""
        near = difflib.get_close_matches(label.casefold(), self.classes, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"label {label[:80]!r} is not one of {', '.join(self.classes)}{hint}"

    def aliases_used(self) -> list[str]:
        """Return the aliases that were used, as texts for messages."""
        return [f"{name} as {self.classes[self._known[label_key(name)]]}" for name in sorted(self.aliases)]


def label_key(name: str) -> str:
    return name.strip().casefold()


def class_groups(classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the groups, by name, that can be formed of `classes`."""
    by_key = {label_key(name): name for name in classes}
    return {
        group: tuple(by_key[name] for name in names)
        for group, names in _GROUPS.items()
        if set(names) <= by_key.keys() and len(names) < len(classes) and group not in by_key
    }
