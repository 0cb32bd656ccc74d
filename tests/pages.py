"""Pages as tests read them."""

import html.parser

_VOID = {"meta", "br"}


class Reader(html.parser.HTMLParser):
    """Tags that are opened and closed in pairs, and the text of each row's cells."""

    def __init__(self, page):
        super().__init__()
        self.open, self.rows, self.tags = [], [], set()
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
