"""Dumps of MediaWiki, and wikitext as articles have it."""

from __future__ import annotations

import bz2
import contextlib
import gzip
from html import escape

import pytest

from fastllm.data.readers import Skipped, mediawiki
from fastllm.data.readers.wikitext import plain_text

from .reading import read

SITE = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
 xsi:schemaLocation="http://www.mediawiki.org/xml/export-0.11/ http://www.mediawiki.org/xml/export-0.11.xsd"
 version="0.11" xml:lang="en">
  <siteinfo><sitename>Wikipedia</sitename><dbname>enwiki</dbname><base>https://en.wikipedia.org/wiki/Main_Page</base>
    <generator>MediaWiki 1.43</generator><case>first-letter</case><namespaces>
      <namespace key="0" case="first-letter" /><namespace key="1" case="first-letter">Talk</namespace>
      <namespace key="10" case="first-letter">Template</namespace></namespaces></siteinfo>
"""
END = "</mediawiki>\n"


def page(title: str, text: str, ns: int = 0, extra: str = "", number: int = 7, model: str = "wikitext") -> str:
    return f"""  <page><title>{escape(title)}</title><ns>{ns}</ns><id>{number}</id>{extra}
    <revision><id>1</id><parentid>0</parentid><timestamp>2024-01-02T03:04:05Z</timestamp>
      <contributor><username>A</username><id>1</id></contributor><comment>c</comment><origin>1</origin>
      <model>{model}</model><format>text/x-wiki</format>
      <text bytes="{len(text)}" sha1="abc" xml:space="preserve">{escape(text)}</text><sha1>abc</sha1></revision></page>
"""


PAGES = [
    page("Lake", "A '''lake''' is a [[body of water]].", number=12),
    page("Talk:Lake", "Nonsense.", 1),
    page("Template:Lake", "{{{1}}}", 10),
    page("Loch", "#REDIRECT [[Lake]]", extra='<redirect title="Lake" />'),
    page("Star Trek: The Motion Picture", "It's a ''film''."),
    page("Lua", "return {}", model="Scribunto"),
    page("Empty", ""),
    page("Seen", "#WEITERLEITUNG [[Lake]]"),
    page("Hill", "Under < and & over.\n== See also =="),
]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lambda data: multistream(data)])
def test_a_dump(compress, tmp_path):
    path = tmp_path / "dump"
    path.write_bytes(compress((SITE + "".join(PAGES) + END).encode()))
    found = read(path)
    assert found.formats == ["mediawiki"]
    assert [(d.metadata["title"], d.text) for d in found.documents] == [
        ("Lake", "A lake is a body of water."),
        ("Star Trek: The Motion Picture", "It's a film."),
        ("Hill", "Under < and & over."),
    ]
    assert found.documents[0].id == "12" and found.documents[0].kind == "wiki"
    assert found.documents[0].metadata["date"] == "2024-01-02T03:04:05Z"
    assert found.passed_over == {"page of another namespace": 2, "redirect": 2, "page without wikitext": 2}
    assert not found.problems


def multistream(data: bytes) -> bytes:
    """As Wikipedia's: the site and each few pages are a stream of their own."""
    parts = data.split(b"  <page>")
    return b"".join(bz2.compress(part) for part in [parts[0], *(b"  <page>" + part for part in parts[1:])])


def test_the_last_revision_counts(tmp_path):
    first = page("Lake", "old").replace("</page>\n", "").rstrip()
    second = page("Lake", "new").partition("<revision>")[2]
    path = tmp_path / "a.xml"
    path.write_text(SITE + first + "<revision>" + second + END)
    assert read(path).texts == ["new"]


def test_a_dump_that_was_cut(tmp_path):
    data = SITE + "".join(page(f"Page {i}", f"Text of page {i}.", number=i) for i in range(50))
    path = tmp_path / "a.xml"
    path.write_text(data[:-300])
    found = read(path)
    assert len(found.documents) == 49
    assert "not well-formed" in found.problems[0][1] and found.problems[0][0].startswith("byte ")
    compressed = gzip.compress((data + END).encode())
    path.write_bytes(compressed[:-20])
    found = read(path)
    assert len(found.documents) >= 48
    assert found.problems == [("byte 0", "the file ends inside the gzip member that begins here")]


@pytest.mark.parametrize(
    "start",
    [
        '<!DOCTYPE mediawiki [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>',
        '<!DOCTYPE mediawiki SYSTEM "file:///etc/passwd">',
        '<?xml version="1.0" encoding="utf-16"?>',
        '<?xml version="1.0" encoding="utf-7"?>',
    ],
)
def test_entities_and_other_encodings_are_refused(start, tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(start + SITE + page("Lake", "x").replace(">x<", ">&b;<") + END)
    found = read(path)
    assert not found.documents
    assert len(found.problems) == 1


def test_a_declaration_between_two_blocks(tmp_path, monkeypatch):
    path = tmp_path / "a.xml"
    path.write_text("<!DOCTYPE mediawiki>" + SITE + END)
    whole = mediawiki.blocks

    def small(path, log):
        for block in whole(path, log):
            yield from (block[i : i + 3] for i in range(0, len(block), 3))

    monkeypatch.setattr(mediawiki, "blocks", small)
    found = read(path)
    assert "document type" in found.problems[0][1]


def test_a_page_that_is_not_as_the_schema_has_it(tmp_path):
    odd = page("Odd", "x").replace("<revision>", "<new/><revision>")
    upload = page("Lake", "A lake.").replace("</page>", "<upload><filename>x</filename></upload></page>")
    path = tmp_path / "a.xml"
    path.write_text(SITE + odd + upload + page("Hill", "A hill.") + END)
    found = read(path)
    assert found.texts == ["A lake.", "A hill."]
    assert len(found.problems) == 1


def test_a_damaged_siteinfo(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(SITE.replace("<namespaces>", "<namespaces><other/>") + page("Lake", "A lake.") + END)
    found = read(path)
    assert found.texts == ["A lake."]
    assert found.problems[0][0] == "the siteinfo"


def test_a_text_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(mediawiki, "PAGE_LIMIT", 2**20)
    path = tmp_path / "a.xml"
    path.write_text(SITE + page("Long", "é&<word> " * 2**19) + page("Lake", "A lake.") + END)
    found = read(path)
    assert found.texts[-1] == "A lake."
    assert [message for _, message in found.problems] == ["a text of more than 1 MiB is cut"]


ARTICLE = """{{short description|Large body}}
{{Infobox lake
| name = Lake {{nowrap|Victoria}}
| image = [[File:A.jpg|thumb|{{a|b}}]]
}}
[[File:Lake.jpg|thumb|left|A caption with a [[link]] and {{a template}}.]]
'''Lake Victoria''' ({{lang|sw|Nam Lolwe}}; {{IPA|x}}) is one of the [[African Great Lakes|great lakes]].<ref name="a">
{{cite web |url=http://x.org |title=T}}</ref><ref name="b" /> It has a surface of {{convert|59947|km2}}&nbsp;or so.<!--
comment -->

== Geology ==
The lake is 400,000&nbsp;years old.<sup>[''citation needed'']</sup> See [https://example.org the source], https://b.org
and ''[[Lake Tanganyika (lake)|Tanganyika]]''s.

{| class="wikitable"
|-
! A !! B
|-
| 1 || {|
| inner
|}
|}

=== Empty section ===

== Fish ==
* [[Cichlid]]s
* '''Nile perch''', ''Lates niloticus''
# One
: indented <nowiki>''not italic'' [[x]]</nowiki>

<gallery>
A.jpg|Gallery caption
</gallery>
<math>\\frac{1}{2}</math> H<sub>2</sub>O <br/> E = mc<sup>2</sup>
{{Authority control}}
[[Category:Lakes]] [[de:Victoriasee]] [[:Category:Rivers]]
__NOTOC__
"""


def test_an_article():
    assert plain_text(ARTICLE) == (
        "Lake Victoria is one of the great lakes. It has a surface of or so.\n\n"
        "Geology\n\n"
        "The lake is 400,000\xa0years old.[citation needed] See the source, https://b.org\nand Tanganyikas.\n\n"
        "Fish\n\n"
        "Cichlids\nNile perch, Lates niloticus\nOne\nindented ''not italic'' [[x]]\n\nH2O\nE = mc2\n\n"
        "Category:Rivers"
    )


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("[[Datei:X.jpg|mini|Bild]] Text [[Kategorie:Y]]", "Text"),
        ("[[ファイル:X.jpg]]日本語[[カテゴリ:Y]]", "日本語"),
        ("[[Help (film)|]] and [[Wikipedia:Help|]]", "Help and Help"),
        ("a [[b]]c [[d#e|f]] [[g", "a bc f [[g"),
        ("{{a|{{b|c}}}}x{{d", "x{{d"),
        ("l''''' bold italic '''''", "l bold italic"),
        ("-{zh-hans:简体;zh-hant:繁體}-字", "简体字"),
        ("&lt;b&gt; &eacute; &#x41;", "<b> é A"),
        ("<syntaxhighlight lang=c>int x[[1]] = {{2}};</syntaxhighlight>", "int x[[1]] = {{2}};"),
        ("<script>alert(1)</script><style>p {}</style>ok", "ok"),
        ("<div class=x>in <span style='y'>a</span> div</div>", "in a div"),
        ("== H ==\n=== I ===\ntext\n== J ==\n", "H\n\nI\n\ntext"),
        ("", ""),
    ],
)
def test_wikitext(wikitext, text):
    assert plain_text(wikitext) == text


@pytest.mark.parametrize(
    "part",
    ["{{", "[[", "<ref>", "{|\n|-\n|\n", "{|\n|", "''", "''a", "{{a|", "{{{", "{{[[", "[http://a ", "<b ", "<div>a ",
     "<ref name=a>{{cite|[[a]]}} ", "''a''' [[b|\n\n", "<!--", "<nowiki>", "-{", "=", "\n=", "(", "*:#", "&", "<b a=",
     "{{a|[[b|<c>", "http://", "__A", "|-\n", "<math>", "(, "],
)  # fmt: skip
@pytest.mark.parametrize("size", [3000, 200_000])
def test_no_wikitext_takes_very_long_or_ends_the_process(part, size):
    with contextlib.suppress(Skipped):
        plain_text("A text. " + part * (size // len(part)))
