"""Parse an HTML page, for tests."""

from __future__ import annotations

from html.parser import HTMLParser

EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self._sections: dict[str, list[str]] = {"": []}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self._open and self._open[-1] == "h2":
            self._sections[data] = []
        list(self._sections.values())[-1].append(data)

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]

    @property
    def headings(self) -> list[str]:
        return list(self._sections)[1:]

    def section(self, heading: str) -> str:
        """Return the text below a heading."""
        return " ".join(" ".join(self._sections[heading]).split())

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())
