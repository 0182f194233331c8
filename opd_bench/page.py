"""Markdown as one HTML page that needs nothing else: images are part of it, nothing is fetched.

page = html("# Title\n\n![a](a.png)", "Title", folder_of_the_images)
"""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top }
img { max-width: 100%; background: #fff }
pre, code { font-size: 13px }
"""


def html(markdown: str, title: str, folder: Path) -> str:
    """``markdown`` (CommonMark with tables; raw HTML in it is shown, not obeyed) as a page, with the PNG files it names in ``folder``."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inlined(match: re.Match[str]) -> str:
        path = folder / match[1]
        return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"' if path.is_file() else match[0]

    body = re.sub(r'src="([\w.-]+\.png)"', inlined, body)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n'
