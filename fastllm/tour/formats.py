"""Raw files as crawls, dumps and books are: WARC of HTML pages, a MediaWiki dump, EPUB."""

from __future__ import annotations

import bz2
import gzip
import random
import uuid
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..files import atomic, write_atomic
from .documents import Text

DATE = "2024-01-02T03:04:05Z"
SITES = ("www.wanderer.example", "blog.hilltop.example", "news.valley.example", "the-almanac.example")

_PAGE = """<!DOCTYPE html>
<html lang="{language}"><head><meta charset="utf-8"><title>{title}</title><script>var visits = 1;</script></head><body>
<header><nav><a href="/">Home</a> <a href="/archive">Archive</a> <a href="/about">About us</a></nav></header>
<div class="cookie-banner">This site uses cookies. <a href="/accept">Accept all cookies</a></div>
<main><article><h1>{title}</h1>
{body}
</article></main>
<footer>Copyright the authors. Write to <a href="mailto:editor@{site}">editor@{site}</a>. Privacy policy</footer>
</body></html>
"""
_WIKI = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
  <siteinfo><sitename>The Country</sitename><dbname>country</dbname><namespaces>
    <namespace key="0" case="first-letter" /><namespace key="1" case="first-letter">Talk</namespace>
  </namespaces></siteinfo>
"""
_ARTICLE = """  <page><title>{title}</title><ns>{namespace}</ns><id>{number}</id>{redirect}
    <revision><id>{number}</id><timestamp>{date}</timestamp><model>wikitext</model><format>text/x-wiki</format>
      <text xml:space="preserve">{text}</text></revision></page>
"""
_CONTAINER = (
    '<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)
_CHAPTER = (
    '<?xml version="1.0" encoding="utf-8"?>\n<html xmlns="http://www.w3.org/1999/xhtml"><head><title>{title}</title>'
    "</head><body>{body}</body></html>"
)


@dataclass(frozen=True)
class Response:
    """What a server sent for an address."""

    body: bytes
    mime: str = "text/html; charset=utf-8"
    status: str = "200 OK"


def html_page(text: Text, numbers: random.Random, language: str = "en") -> Response:
    """A page with the text in it, among what pages have beside their text."""
    body = "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in text.paragraphs)
    page = _PAGE.format(title=escape(text.title), body=body, language=language, site=numbers.choice(SITES))
    return Response(page.encode())


def write_warc(path: Path, responses: Iterable[Response], numbers: random.Random) -> None:
    """A WARC file as crawlers write it: request and response of each address, each record a gzip member."""
    with atomic(path) as part, part.open("wb") as file:
        file.write(_record("warcinfo", "", b"software: fastllm tour\r\n", "application/warc-fields", numbers))
        for number, response in enumerate(responses):
            address = f"http://{numbers.choice(SITES)}/{number}"
            request = f"GET /{number} HTTP/1.1\r\n\r\n".encode()
            answer = f"HTTP/1.1 {response.status}\r\nContent-Type: {response.mime}\r\n\r\n".encode() + response.body
            file.write(_record("request", address, request, "application/http; msgtype=request", numbers))
            file.write(_record("response", address, answer, "application/http; msgtype=response", numbers))


def _record(kind: str, address: str, block: bytes, mime: str, numbers: random.Random) -> bytes:
    target = f"WARC-Target-URI: {address}\r\n" if address else ""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{uuid.UUID(int=numbers.getrandbits(128))}>\r\n"
        f"WARC-Date: {DATE}\r\n{target}Content-Type: {mime}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + block + b"\r\n\r\n", mtime=0)


def write_dump(path: Path, articles: Sequence[Text]) -> None:
    """A dump with markup in the articles, and beside them what dumps have: redirects, and pages of discussions."""
    pages = []
    for number, article in enumerate(articles):
        pages.append(_wiki_page(article.title, number, wikitext(article)))
        if number % 5 == 0:
            redirect = f'<redirect title="{escape(article.title)}" />'
            text = f"#REDIRECT [[{article.title}]]"
            pages.append(_wiki_page(f"{article.title} (name)", 10_000 + number, text, redirect=redirect))
        if number % 7 == 0:
            text = "Who wrote this? ~~~~"
            pages.append(_wiki_page(f"Talk:{article.title}", 20_000 + number, text, namespace=1))
    write_atomic(path, bz2.compress((_WIKI + "".join(pages) + "</mediawiki>\n").encode()))


def _wiki_page(title: str, number: int, text: str, *, namespace: int = 0, redirect: str = "") -> str:
    return _ARTICLE.format(
        title=escape(title), number=number, text=escape(text), namespace=namespace, redirect=redirect, date=DATE
    )


def wikitext(article: Text) -> str:
    """The article in MediaWiki's markup."""
    first, *others = article.paragraphs
    first = first.replace(article.title, f"'''{article.title}'''", 1)
    return "\n".join(
        [
            f"{{{{Infobox|name={article.title}|image=none.jpg}}}}",
            f"{first}<ref>{{{{cite web|url=http://{SITES[0]}/|title={article.title}}}}}</ref>",
            *(f"\n== More ==\n{paragraph}" for paragraph in others),
            "\n[[Category:The country]]",
        ]
    )


def write_epub(path: Path, title: str, chapters: Sequence[Text]) -> None:
    """A book: a cover, a table of contents and the chapters."""
    files = {"cover.xhtml": _CHAPTER.format(title="Cover", body="<p>Cover page</p>")}
    links = []
    for number, chapter in enumerate(chapters):
        body = "".join(f"<p>{escape(paragraph).replace(chr(10), '<br/>')}</p>" for paragraph in chapter.paragraphs)
        name = f"chapter{number:03}.xhtml"
        files[name] = _CHAPTER.format(title=escape(chapter.title), body=f"<h1>{escape(chapter.title)}</h1>{body}")
        links.append(f'<li><a href="{name}">{escape(chapter.title)}</a></li>')
    files["nav.xhtml"] = _CHAPTER.format(
        title="Contents", body=f'<nav epub:type="toc" xmlns:epub="http://www.idpf.org/2007/ops">{"".join(links)}</nav>'
    )
    with atomic(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as book:
        for name, content in {"META-INF/container.xml": _CONTAINER, "content.opf": _package(title, files)}.items():
            book.writestr(_entry(name), content)
        for name, content in files.items():
            book.writestr(_entry(name), content)


def _entry(name: str) -> zipfile.ZipInfo:
    """With a fixed time: the same book is the same file."""
    return zipfile.ZipInfo(name, (2024, 1, 2, 3, 4, 4))


def _package(title: str, files: Iterable[str]) -> str:
    names = list(files)
    items = "".join(
        f'<item id="i{number}" href="{name}" media-type="application/xhtml+xml"'
        f"{' properties=' + chr(34) + 'nav' + chr(34) if name == 'nav.xhtml' else ''}/>"
        for number, name in enumerate(names)
    )
    spine = "".join(f'<itemref idref="i{number}"/>' for number in range(len(names)))
    return (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{escape(title)}</dc:title>'
        f"<dc:language>en</dc:language></metadata><manifest>{items}</manifest><spine>{spine}</spine></package>"
    )
