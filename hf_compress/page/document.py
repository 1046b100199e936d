"""Put a page together: template, style, scripts and data in one file that asks nothing of the network.

Names in a manifest come from strangers. They reach the page as JSON in a block that no browser runs, the scripts write
them with textContent alone, and the page's policy lets no other script run, whatever it holds.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

PAGE = "index.html"
_FOLDER = Path(__file__).parent
_SCRIPTS = ("plot.js", "table.js", "page.js")


def render_document(title: str, content: dict[str, Any]) -> str:
    """The page as text.

    Args:
        title: of the document.
        content: what `page.js` shows; JSON without NaN.
    """
    style = _read("page.css")
    library = _read("chart.umd.min.js").rpartition("//# sourceMappingURL=")[0]  # a map would be asked for
    script = "(() => {\n'use strict';\n" + "\n".join(_read(name) for name in _SCRIPTS) + "})();\n"
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_read(PAGE)).substitute(
        policy=policy,
        title=html.escape(title).encode("ascii", "xmlcharrefreplace").decode(),
        style=style,
        library=library,
        script=script,
        content=_json_in_html(content),
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a policy names what may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json_in_html(content: dict[str, Any]) -> str:
    """JSON that cannot end its block, nor start a tag or an entity; all of it is ASCII."""
    text = json.dumps(content, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
