"""Wikitext to plain text, by mwparserfromhell: nothing in a page is executed."""

from __future__ import annotations

import html
import re
from collections import Counter
from typing import Any

from .base import Skipped, words

TEXT_LIMIT = 2 * 2**20  # characters of a page; MediaWiki's own limit in bytes
MOST_OPEN = 3e7  # characters of a page times the marks that are open at a time: the parser's time grows with both
DEEPEST_TABLES = 20  # in each other: its time grows faster with them

# What these hold is no text of the article.
_DROPPED = words(
    "ref references gallery math chem ce score timeline hiero graph imagemap mapframe maplink section categorytree "
    "inputbox templatestyles table style script noinclude indicator"
)
_CODE = words("syntaxhighlight source")
_BLOCKS = words("p div br li ul ol dl dt dd blockquote center h1 h2 h3 h4 h5 h6 hr poem pre")
# Namespaces of links that show a picture or file a page, in the languages of the largest Wikipedias.
_FILE_LINKS = re.compile(
    r"\s*(?:file|image|media|category|datei|bild|kategorie|fichier|catégorie|archivo|imagen|categoría|immagine|"
    r"categoria|ficheiro|imagem|bestand|afbeelding|categorie|plik|grafika|kategoria|файл|изображение|категория|"
    r"зображення|категорія|fil|kategori|tiedosto|kuva|luokka|soubor|dosya|resim|tập tin|hình|thể loại|berkas|"
    r"ファイル|画像|カテゴリ|文件|图像|檔案|圖像|分类|分類|파일|그림|분류|ملف|صورة|تصنيف|پرونده|رده|קובץ|תמונה|קטגוריה|"
    r"चित्र|श्रेणी)\s*:",
    re.IGNORECASE,
)
_INTERWIKI = re.compile(r"[a-z]{2,3}(?:-[a-z]{2,10})?\s*:")  # a link to the article in another language
_QUOTES = re.compile(r"'{2,}")
_MAGIC_WORDS = re.compile(r"__[A-Z]{3,30}__")
_CONVERSION = re.compile(r"-\{[^{}]{0,2000}?\}-")  # variants of Chinese and others
_LIST_MARK = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_TABLE_REST = re.compile(r"^[ \t:]*(?:\{\||\|\}|\|-|[|!]).*$", re.MULTILINE)
_EMPTY_BRACKETS = re.compile(r"[ \t]*[(（]\s*(?:[,;、，；]\s*)*[)）]")
_LEADING_MARKS = re.compile(r"([(（])\s*(?:[,;、，；]\s*)+")
_SPACES = re.compile(r"[ \t\xa0]{2,}")
_BLANK_LINES = re.compile(r"[ \t]*\n(?:[ \t]*\n)+")
_MARKS = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)([^<>]*)(>?)|(\{\||\|\}|\{\{|\}\}|<!--|-->|\[\[?|\]\]?)")
_PAIRS = {"|}": "{|", "}}": "{{", "-->": "<!--", "]]": "[[", "]": "["}
_WEIGHTS = {"{{": 10, "half a tag": 20}  # of an open mark, by how long the parser takes
_SINGLE = words("br wbr hr meta link img li dt dd th td tr")  # elements without an end


def plain_text(wikitext: str) -> str:
    """What a reader of the article sees, without templates, references, tables, pictures and markup.

    Headings are lines of their own, those of empty sections left out.

    Raises:
        Skipped: the page is too long, or nested so that parsing it would take very long.
    """
    import mwparserfromhell

    if len(wikitext) > TEXT_LIMIT:
        raise Skipped(f"page of more than {TEXT_LIMIT >> 20} MiB")
    _check(wikitext)
    try:
        code = mwparserfromhell.parse(_CONVERSION.sub(_variant, wikitext), skip_style_tags=True)
        out: list[str] = []
        _write(code.nodes, out)
    except RecursionError:
        raise Skipped("wikitext nested too deeply") from None
    except mwparserfromhell.parser.ParserError:
        raise Skipped("wikitext that can't be parsed") from None
    return _tidy("".join(out))


def _check(text: str) -> None:
    """Raise Skipped for a page on which the parser, which tries each open mark to the end, would take very long."""
    opened: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for end, name, rest, whole, mark in _MARKS.findall(text):
        if not mark:
            mark = name.lower() if whole else "half a tag"
            if mark in _SINGLE or rest.endswith("/"):
                continue
            end = mark if end else ""
        else:
            end = _PAIRS.get(mark, "")
        if end:
            opened[end] = max(0, opened[end] - 1)
        else:
            opened[mark] += 1
            most[mark] = max(most[mark], opened[mark])
    if most["{|"] > DEEPEST_TABLES:
        raise Skipped("wikitext nested too deeply")
    if sum(_WEIGHTS.get(mark, 1) * n for mark, n in most.items()) * len(text) > MOST_OPEN:
        raise Skipped("wikitext with too many open tags")


def _variant(match: re.Match[str]) -> str:
    """The text of ``-{zh-cn:A;zh-tw:B}-``: the first variant."""
    inner = match.group()[2:-2]
    if "|" in inner.split(";")[0].split(":")[0]:
        flags, _, inner = inner.partition("|")
        if flags.strip() not in ("", "R", "S"):
            return ""
    first = inner.split(";")[0]
    return re.sub(r"^\s*[a-z]{2,3}(?:-[a-z]{2,8})?\s*:", "", first)


def _write(nodes: Any, out: list[str]) -> None:
    from mwparserfromhell import nodes as kinds

    for node in nodes:
        if isinstance(node, kinds.Text):
            out.append(_QUOTES.sub("", str(node.value)))
        elif isinstance(node, kinds.HTMLEntity):
            out.append(_entity(node))
        elif isinstance(node, kinds.Wikilink):
            _link(node, out)
        elif isinstance(node, kinds.ExternalLink):
            if node.title is not None:
                _write(node.title.nodes, out)
            elif not node.brackets:
                out.append(str(node.url))
        elif isinstance(node, kinds.Heading):
            title: list[str] = []
            _write(node.title.nodes, title)
            out.append(f"\n\x01{node.level}{' '.join(''.join(title).split())}\n")
        elif isinstance(node, kinds.Tag):
            _tag(node, out)


def _entity(node: Any) -> str:
    try:
        return str(node.normalize())
    except (ValueError, OverflowError):
        return html.unescape(str(node))


def _link(node: Any, out: list[str]) -> None:
    target = str(node.title)
    if _FILE_LINKS.match(target):
        return
    shown = node.text
    if shown is None:
        if not _INTERWIKI.match(target):
            _write(node.title.nodes, out) if not target.startswith(":") else out.append(target[1:])
        return
    if str(shown).strip():
        _write(shown.nodes, out)
    else:  # the pipe trick: without namespace and brackets
        out.append(re.sub(r"\s*\([^()]*\)$", "", target.partition(":")[2] or target))


def _tag(node: Any, out: list[str]) -> None:
    name = str(node.tag).strip().lower()
    if name == "nowiki" and node.contents is not None:
        out.append(html.unescape(str(node.contents)))
    elif name in _CODE and node.contents is not None:
        out.append(f"\n{node.contents}\n")
    elif name in _DROPPED:
        return
    elif name in ("li", "dd", "dt") and node.wiki_markup:
        return  # the mark of a list's line
    else:
        if name in _BLOCKS:
            out.append("\n")
        if node.contents is not None:
            _write(node.contents.nodes, out)
        if name in _BLOCKS and not node.self_closing:
            out.append("\n")


def _tidy(text: str) -> str:
    text = _MAGIC_WORDS.sub("", text)
    text = _TABLE_REST.sub("", text)
    text = _LIST_MARK.sub("", text)
    text = _LEADING_MARKS.sub(r"\1", _EMPTY_BRACKETS.sub("", text))
    text = _BLANK_LINES.sub("\n\n", _SPACES.sub(" ", text)).strip()
    return _without_empty_sections(text)


def _without_empty_sections(text: str) -> str:
    """The headings as lines of their own; those with nothing under them are left out."""
    kept: list[str] = []
    waiting: list[tuple[int, str]] = []
    for line in text.split("\n"):
        if line[:1] == "\x01":
            level = int(line[1])
            waiting = [(other, title) for other, title in waiting if other < level] + [(level, line[2:])]
        elif line.strip():
            for _, title in waiting:
                kept += ["", title, ""]
            waiting = []
            kept.append(line.strip())
        else:
            kept.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
