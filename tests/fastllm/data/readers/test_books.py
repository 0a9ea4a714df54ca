"""EPUBs and the books of Project Gutenberg."""

from __future__ import annotations

import zipfile

import pytest

from fastllm.data.readers import epub
from fastllm.errors import UserError

from .reading import read

CONTAINER = (
    '<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)
XHTML = (
    '<?xml version="1.0" encoding="utf-8"?><!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml" '
    'xmlns:epub="http://www.idpf.org/2007/ops"><head><title/><script src="x.js"/></head><body{1}>{0}</body></html>'
)
FILES = {
    "cover.xhtml": XHTML.format("<img src='a.jpg' alt='Cover'/>Cover page", ""),
    "nav.xhtml": XHTML.format("<nav epub:type='toc'>Table of contents</nav>", ""),
    "copyright.xhtml": XHTML.format("All rights reserved", ""),
    "a.xhtml": XHTML.format("<a id='x'/><h1>One</h1><p>The first chapter.</p><p/>", ""),
    "text/b%20c.xhtml": XHTML.format("<h1>Two</h1><p>The second chapter &#8212; é.</p>", ""),
    "front.xhtml": XHTML.format("Title page of it", " epub:type='titlepage'"),
    "license-a.xhtml": XHTML.format("Licence", ""),
    "guide.xhtml": XHTML.format("By the guide a cover", ""),
    "unused.xhtml": XHTML.format("Not in the spine", ""),
}
SPINE = ["cover.xhtml", "nav.xhtml", "front.xhtml", "copyright.xhtml", "text/b%20c.xhtml", "a.xhtml", "guide.xhtml",
         "license-a.xhtml"]  # fmt: skip


def write(path, files=FILES, spine=SPINE, extra=None, container=CONTAINER, opf=None):
    items = "".join(f'<item id="i{i}" href="{n}" media-type="application/xhtml+xml"/>' for i, n in enumerate(files))
    order = "".join(f'<itemref idref="i{list(files).index(name)}"/>' for name in spine)
    opf = opf or (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata '
        'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>The Book</dc:title><dc:creator>An Author</dc:creator>'
        f"<dc:language>en</dc:language></metadata><manifest>{items}</manifest><spine>{order}</spine>"
        '<guide><reference type="cover" href="guide.xhtml#x"/></guide></package>'
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        book.writestr("META-INF/container.xml", container)
        book.writestr("OEBPS/content.opf", opf)
        for name, content in files.items():
            book.writestr(f"OEBPS/{name.replace('%20', ' ')}", content)
        for name, content in (extra or {}).items():
            book.writestr(name, content)
    return path


def test_chapters_in_the_order_of_the_spine(tmp_path):
    found = read(write(tmp_path / "odd name"))
    assert found.formats == ["epub"]
    assert found.texts == ["Two\n\nThe second chapter — é.\n\nOne\n\nThe first chapter."]
    document = found.documents[0]
    assert document.kind == "book"
    assert document.metadata == {"title": "The Book", "author": "An Author", "book_language": "en"}
    assert not found.problems


def test_a_missing_and_a_large_chapter(tmp_path, monkeypatch):
    monkeypatch.setattr(epub, "CHAPTER_LIMIT", 2**16)
    files = {**FILES, "bomb.xhtml": "<p>" + "\0" * 2**22, "z.xhtml": XHTML.format("Last", "")}
    path = write(tmp_path / "a.epub", files, ["a.xhtml", "bomb.xhtml", "z.xhtml"])
    found = read(path)
    assert found.texts == ["One\n\nThe first chapter.\n\nLast"]
    assert found.problems == [("OEBPS/bomb.xhtml", "OEBPS/bomb.xhtml has more than 0 MiB")]


def test_a_book_of_many_bombs_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(epub, "TEXT_LIMIT", 2**20)
    files = {f"{i}.xhtml": "<p>" + "word " * 2**16 for i in range(20)}
    found = read(write(tmp_path / "a.epub", files, list(files)))
    assert len(found.texts[0]) <= 2**20
    assert found.problems == [("OEBPS/3.xhtml", "the book is cut here: its chapters have more than 1 MiB")]


def error_of(path) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_encrypted_books_are_refused(tmp_path):
    drm = '<encryption><EncryptedData><EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"/>'
    assert "DRM" in error_of(write(tmp_path / "a.epub", extra={"META-INF/encryption.xml": drm}))
    fonts = '<EncryptionMethod Algorithm="http://www.idpf.org/2008/embedding"/>'
    assert read(write(tmp_path / "b.epub", extra={"META-INF/encryption.xml": fonts})).texts
    data = bytearray(write(tmp_path / "c.epub").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "c.epub").write_bytes(data)
    assert "password" in error_of(tmp_path / "c.epub")


@pytest.mark.parametrize("size", [30, 500, -10])
def test_a_book_that_was_cut(size, tmp_path):
    path = write(tmp_path / "a.epub")
    path.write_bytes(path.read_bytes()[:size])
    assert "damaged zip file" in error_of(path)


def test_other_zip_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.txt", "text")
    assert "is a zip file: unpack it" in error_of(tmp_path / "a.zip")


def test_a_package_with_entities_or_damage(tmp_path):
    for opf in ("<!DOCTYPE p [<!ENTITY a 'x'>]><package>&a;</package>", "<package><", "\0\0"):
        found = read(write(tmp_path / "a.epub", opf=opf))
        assert not found.documents
        assert found.problems[0][0] == "the book"
    found = read(write(tmp_path / "b.epub", container=CONTAINER.replace("content.opf", "gone.opf")))
    assert found.problems == [("the book", "it has no 'OEBPS/gone.opf'")]


def test_a_damaged_chapter(tmp_path):
    path = write(tmp_path / "a.epub", {**FILES, "z.xhtml": XHTML.format("Last " * 99, "")}, ["a.xhtml", "z.xhtml"])
    data = bytearray(path.read_bytes())
    place = data.index(b"OEBPS/z.xhtml") + 30
    data[place : place + 8] = b"\xff" * 8
    path.write_bytes(data)
    found = read(path)
    assert found.texts == ["One\n\nThe first chapter."]
    assert found.problems[0][0] == "OEBPS/z.xhtml"


# ---- Project Gutenberg ----

HEADER = """The Project Gutenberg eBook of A Book

This eBook is for the use of anyone anywhere at no cost.

Title: A Book

Author: An Author

Release date: July 1, 2003 [eBook #1]

Language: English

*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***


Produced by Somebody and the
Online Proofreaders


"""
BOOK = "CHAPTER I\n\nIt was a dark night. *** The stars.\n\nEnd of it."
FOOTER = """


*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***

Updated editions will replace the previous one.
START: FULL LICENSE
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_header_and_footer_are_cut(newline, mark, tmp_path):
    path = tmp_path / "pg1.txt"
    path.write_bytes((mark + HEADER + BOOK + FOOTER).replace("\n", newline).encode())
    found = read(path)
    assert found.formats == ["gutenberg"]
    assert found.texts == [BOOK]
    assert found.documents[0].metadata == {"title": "A Book", "author": "An Author"}


def test_the_older_form_and_latin_1(tmp_path):
    path = tmp_path / "pg2.txt"
    head = "Title: Été\n\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n"
    path.write_bytes((head + "Café.\n\nEnd of the Project Gutenberg Etext of Été\n").encode("latin-1"))
    found = read(path)
    assert found.texts == ["Café."]
    assert found.documents[0].metadata == {"title": "Été"}


def test_html(tmp_path):
    html = (
        "<!DOCTYPE html><html><head><title>A Book</title></head><body><section class='pg-boilerplate' id=\"pg-header\">"
        "<p><strong>Title</strong>: A Book</p><div>*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***</div></section>"
        "<h2>Chapter I</h2><p>It was a <i>dark</i> night.</p>"
        '<section id="pg-footer"><div>*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***</div><p>Licence</p></section>'
    )
    (tmp_path / "pg3.html").write_text(html)
    found = read(tmp_path / "pg3.html")
    assert found.formats == ["gutenberg"]
    assert found.texts == ["Chapter I\n\nIt was a dark night."]
