"""Reads a page more strictly than a browser: tags close, nothing is fetched or run."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

EVIL = '<script>alert("1")</script> & </style> {{ 7 * 7 }} "\'>'


class Page(HTMLParser):
    """Checks that tags close in order and that nothing is fetched or run."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.words: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "srcset", "action")
            if name == "src":
                assert value.startswith("data:image/webp;base64,")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        elif data.strip():
            self.words.append(data.strip())
