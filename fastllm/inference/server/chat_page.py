"""The chat page and the policy under which browsers show it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")
STYLE = re.compile(r'<link rel="stylesheet" href="(\w+\.css)">')
SCRIPTS = re.compile(r'(?:<script src="\w+\.js"></script>\s*)+')


def page() -> Response:
    """The page, which may run and show what its own files have, and talk to its own server alone."""
    html = (FOLDER / "index.html").read_text()
    html = STYLE.sub(lambda found: f"<style>\n{(FOLDER / found[1]).read_text()}</style>", html)
    html = SCRIPTS.sub(lambda found: f"<script>\n{_scripts(found[0])}</script>\n", html)
    content = html.encode()
    sources: dict[str, str] = {}
    for kind in ("script", "style"):
        codes = re.findall(rf"<{kind}>(.*?)</{kind}>".encode(), content, re.S)
        digests = [base64.b64encode(hashlib.sha256(code).digest()).decode() for code in codes]
        sources[kind] = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"',
    }
    return Response(content, media_type="text/html", headers=headers)


def _scripts(tags: str) -> str:
    """The scripts of these tags, one after another."""
    return "\n".join((FOLDER / name).read_text() for name in re.findall(r'src="(\w+\.js)"', tags))
