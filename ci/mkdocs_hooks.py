"""MkDocs hooks: show the Sphinx roles of docstrings (``:class:`~a.B```) as plain code (``B``)."""

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Return the page without roles."""
    return _ROLE.sub(r"<code>\1</code>", html)
