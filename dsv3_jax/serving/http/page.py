"""The page at `/`, and what a browser may do on it."""

import base64
import functools
import hashlib
import re
from pathlib import Path


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers under which only its own style and script run and only this server is asked."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    rules = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "style-src": _hash_of("style", html),
        "script-src": _hash_of("script", html),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    return html.encode(), headers


def _hash_of(tag: str, html: str) -> str:
    """The source expression that allows the page's one <style> or <script>."""
    [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
