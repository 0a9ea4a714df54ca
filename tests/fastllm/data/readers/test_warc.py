"""WARC and WET files, whole, odd and damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib

import pytest
import zstandard
from fastwarc import GzipWriter, WarcRecord, WarcRecordType
from fastwarc.stream_io import BrotliWriter

from fastllm.data.readers import warc

from .reading import PAGE, read, record, response


def page(name: str, **options) -> bytes:
    return record(response(PAGE.format(name).encode()), f"http://example.org/{name}", **options)


def write(path, *members: bytes, compress=gzip.compress):
    path.write_bytes(b"".join(map(compress, members)))
    return path


def urls(found) -> list[str]:
    return [document.metadata["url"].rpartition("/")[2] for document in found.documents]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress, bz2.compress])
def test_records_of_every_compression(compress, tmp_path):
    found = read(write(tmp_path / "odd name", page("lake"), page("hill"), page("wood"), compress=compress))
    assert urls(found) == ["lake", "hill", "wood"]
    assert found.formats == ["warc"]
    document = found.documents[0]
    assert document.text.startswith("The lake\n\nA paragraph about the lake")
    assert "About us" not in document.text and "Copyright" not in document.text
    assert document.metadata == {"url": "http://example.org/lake", "date": "2024-01-02T03:04:05Z", "title": "The lake"}
    assert document.kind == "web" and document.source == str(tmp_path / "odd name")
    assert not found.problems and not found.passed_over


def test_what_fastwarc_writes(tmp_path):
    path = tmp_path / "a.warc.gz"
    with open(path, "wb") as file, GzipWriter(file) as stream:
        for name in ("lake", "hill"):
            entry = WarcRecord()
            entry.init_headers(WarcRecordType.response)
            entry.headers["WARC-Target-URI"] = f"http://example.org/{name}"
            entry.headers["Content-Type"] = "application/http; msgtype=response"
            entry.set_bytes_content(response(PAGE.format(name).encode()))
            entry.write(stream)
    found = read(path)
    assert urls(found) == ["lake", "hill"]
    assert len(found.documents[0].id) == 36  # the record's UUID
    assert not found.problems


def test_what_is_passed_over_is_counted(tmp_path):
    path = write(
        tmp_path / "a.warc.gz",
        record(b"software: x", kind="warcinfo", mime="application/warc-fields"),
        record(b"GET / HTTP/1.1\r\n\r\n", kind="request", mime="application/http; msgtype=request"),
        page("lake"),
        record(b"x: y", kind="metadata", mime="application/warc-fields"),
        record(b"HTTP/1.1 200 OK\r\n\r\n", kind="revisit"),
        record(b"example.org A 1.2.3.4", "dns:example.org", mime="text/dns"),
        record(b"?", kind="SOMETHING new"),
        record(response(b"%PDF-1.4", "application/pdf")),
        record(response(b"<p>gone", status="HTTP/1.1 404 Not Found")),
        record(response(b"<p>moved", status="HTTP/1.0 301 Moved")),
        record(b"\x16\x03\x01 no HTTP at all"),
        record(response(b"<html><body></body></html>")),
        record(response(b"")),
    )
    found = read(path)
    assert urls(found) == ["lake"]
    assert found.passed_over == {
        "warcinfo record": 1,
        "request record": 1,
        "metadata record": 1,
        "revisit record": 1,
        "DNS record": 1,
        "unknown record": 1,
        "not HTML": 1,
        "HTTP status 404": 1,
        "HTTP status 301": 1,
        "not an HTTP response": 1,
        "no text": 2,
    }
    assert not found.problems


def test_text_of_a_wet_file(tmp_path):
    text = "A line of text.\nÜbersetzung und 日本語\n"
    entries = (record(text.encode(), f"http://x/{i}", "conversion", "text/plain") for i in range(3))
    found = read(write(tmp_path / "a.gz", record(b"a: b", kind="warcinfo", mime="application/warc-fields"), *entries))
    assert found.formats == ["wet"]
    assert found.texts == [text.strip()] * 3
    assert found.passed_over == {"warcinfo record": 1}


def test_headers_of_http_2(tmp_path):
    body = PAGE.format("lake").encode()
    for status in ("HTTP/2 200", "HTTP/2.0 200 ", ":status: 200", "HTTP/1.1 200 OK\r\n:status: 200"):
        assert urls(read(write(tmp_path / "a", record(response(body, status=status), "http://x/lake")))) == ["lake"]
    found = read(write(tmp_path / "a", record(response(body, status=":status: 503"))))
    assert found.passed_over == {"HTTP status 503": 1}


def brotli(body: bytes) -> bytes:
    out = io.BytesIO()
    writer = BrotliWriter(out)
    writer.write(body)
    writer.close()
    return out.getvalue()


def raw_deflate(body: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(body) + deflater.flush()


ENCODINGS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": raw_deflate,
    "zstd": zstandard.ZstdCompressor().compress,
    "br": brotli,
    "identity": bytes,
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("stored_decoded", [False, True])
def test_encoded_bodies(encoding, chunked, stored_decoded, tmp_path):
    plain = PAGE.format("lake").encode()
    body = plain if stored_decoded else ENCODINGS[encoding](plain)
    headers = f"Content-Encoding: {encoding}\r\n"
    if chunked:
        headers += "Transfer-Encoding: chunked\r\n"
        if not stored_decoded:
            parts = [body[i : i + 100] for i in range(0, len(body), 100)]
            body = b"".join(b"%X;a=b\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\nX: y\r\n\r\n"
    found = read(write(tmp_path / "a", record(response(body, headers=headers)), page("hill")))
    assert found.texts[0].startswith("The lake\n\nA paragraph about the lake")
    assert "says more about it than the first." in found.texts[0]
    assert len(found.documents) == 2


def test_a_body_that_is_cut_or_lies_about_its_encoding(tmp_path):
    body = gzip.compress(PAGE.format("lake").encode() + bytes(range(256)) * 40)
    cut = record(response(body[: len(body) // 2], headers="Content-Encoding: gzip\r\n"))
    unknown = record(response(body, headers="Content-Encoding: secret\r\n"))
    found = read(write(tmp_path / "a", cut, unknown))
    assert "A paragraph about the lake" in found.texts[0]
    assert found.passed_over == {"unknown content encoding": 1}


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate"])
def test_a_bomb_is_bounded(encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(warc, "RECORD_LIMIT", 2**20)
    bomb = ENCODINGS[encoding](bytes(2**23))
    found = read(write(tmp_path / "a", record(response(bomb, headers=f"Content-Encoding: {encoding}\r\n"))))
    assert found.passed_over == {"page of more than 1 MiB": 1}


META = '<meta http-equiv=Content-Type content="text/html; charset=euc-jp">'
CHARSETS = [
    ("utf-8", "Größe und naïve Übersetzung", "text/html; charset=UTF-8", ""),
    ("utf-8", "Größe und naïve Übersetzung", "text/html; charset=iso-8859-1", ""),  # the header lies
    ("cp1252", "Größe und “naïve” Übersetzung", "text/html; charset=ISO-8859-1", ""),  # as browsers read it
    ("cp1252", "Größe und naïve Übersetzung", "text/html", '<meta charset="windows-1252">'),
    ("koi8-r", "Съешь ещё этих мягких французских булок", "text/html; charset=koi8-r", ""),
    ("cp1251", "Обыкновенный русский текст, по которому кодировка определяется. ", "text/html", ""),  # by detection
    ("shift_jis", "吾輩は猫である。名前はまだ無い。", "text/html; charset=Shift_JIS", ""),
    ("euc_jp", "吾輩は猫である。名前はまだ無い。", "text/html", META),
    ("iso2022_jp", "吾輩は猫である。名前はまだ無い。", "text/html; charset=iso-2022-jp", ""),
    ("gb18030", "学而时习之，不亦说乎？", "text/html; charset=gb2312", ""),
    ("big5", "學而時習之，不亦說乎？", "text/html; charset=big5", ""),
    ("euc_kr", "나랏말싸미 듕귁에 달아", "text/html; charset=euc-kr", ""),
    ("utf-16", "Größe und naïve Übersetzung", "text/html", ""),
    ("cp1255", "בראשית ברא אלהים את השמים", "text/html; charset=windows-1255", ""),
    ("utf-8", "في البدء خلق الله السماوات", "text/html; charset=nonsense", ""),
    ("utf-8", "Größe und naïve Übersetzung", "text/html; charset=unicode_escape", ""),
]  # fmt: skip


@pytest.mark.parametrize(("encoding", "text", "header", "meta"), CHARSETS)
def test_character_sets(encoding, text, header, meta, tmp_path):
    html = f"<html><head>{meta}<title>{text}</title></head><body><main><p>{text * 5}</p></main></body></html>"
    found = read(write(tmp_path / "a", record(response(html.encode(encoding), header))))
    assert found.texts == [(text * 5).strip()]
    assert found.documents[0].metadata["title"] == text.strip()


def test_broken_utf_8_keeps_the_page(tmp_path):
    html = b"<html><body><main><p>" + "日本語の文章です。".encode() * 20 + b"\xff\xfe</p></main>"
    (text,) = read(write(tmp_path / "a", record(response(html)))).texts
    assert text.count("日本語の文章です。") == 20


def test_html_as_crawls_have_it(tmp_path):
    html = (
        "<html><head><style>p {color: red}</style><script>var x = '<p>no text</p>';</script></head><body><main>"
        "<h1>Ti\xadtle</h1><p>First <b>bold</b> para\xadgraph of the text, which is long enough.</p>"
        "<table><tr><td>outer<table><tr><td>inner</td></tr></table></td></tr></table>"
        "<p dir=rtl>שלום עולם</p><p>&lt;escaped&gt; &amp; done&hellip;</p><p>unclosed <i>tags<p>and no end"
    )
    (text,) = read(write(tmp_path / "a", record(response(html.encode())))).texts
    assert "Title" in text and "First bold paragraph of the text" in text
    for words in ("outer", "inner", "שלום עולם", "<escaped> & done…", "unclosed tags"):
        assert words in text
    assert "color" not in text and "var x" not in text and "\xad" not in text


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        ("<div>" * 30_000 + "text", "HTML nested too deeply"),
        ("<article><div>" * 3000 + "text" + "</div></article>" * 3000, "HTML nested too deeply"),
        ("<div " + " ".join(f"a{i}=1" for i in range(100_000)) + ">text", "HTML element with too many attributes"),
        ("<div x='<'/" + "/".join(f"a{i}" for i in range(100_000)) + ">text", "HTML element with too many attributes"),
    ],
)
def test_pages_that_would_take_very_long(html, reason, tmp_path):
    found = read(write(tmp_path / "a", record(response(html.encode())), page("hill")))
    assert found.passed_over == {reason: 1}
    assert urls(found) == ["hill"]


def test_deep_and_large_pages_are_read(tmp_path):
    picture = f"<main><img src='data:image/png;base64,{'abc/def+ ' * 50_000}'><p>A text beside a picture.</main>"
    assert read(write(tmp_path / "b", record(response(picture.encode())))).texts == ["A text beside a picture."]
    deep = "<p>" + "<span><b>" * 50_000 + "text of it"
    large = "<main>" + "<p>A paragraph of a page that is large, with several words in it.</p>\n" * 100_000
    found = read(write(tmp_path / "a", record(response(deep.encode())), record(response(large.encode()))))
    assert found.texts[0] == "text of it"
    assert found.texts[1].count("A paragraph") == 100_000


# ---- damage ----


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("lie", [-20, 30, 10**12, "x", "", -5])
def test_a_length_that_lies(lie, compress, tmp_path):
    length = len(response(PAGE.format("hill").encode())) + lie if isinstance(lie, int) and lie != -5 else lie
    path = write(tmp_path / "a", page("lake"), page("hill", length=length), page("wood"), compress=compress)
    found = read(path)
    assert urls(found) == ["lake", "wood"]
    (problem,) = found.problems
    assert problem[0] == f"byte {len(page('lake')):,} of the content"


def test_garbage_between_records(tmp_path):
    data = page("lake") + b"garbage\r\n" * 9000 + page("hill") + b"\r\n" * 5 + page("wood") + b"rest"
    found = read(write(tmp_path / "a", data, compress=bytes))
    assert urls(found) == ["lake", "hill", "wood"]
    assert [where for where, _ in found.problems] == [
        f"byte {len(page('lake')):,} of the content",
        f"byte {len(data) - 4:,} of the content",
    ]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_every_cut_is_told(compress, tmp_path):
    members = [compress(page(name)) for name in ("lake", "hill")]
    data, first = b"".join(members), len(members[0])
    path = tmp_path / "a.warc"
    for size in [*range(first + 1, len(data), 23), len(data) - 5, len(data) - 9]:
        path.write_bytes(data[:size])
        found = read(path)
        assert urls(found)[:1] == ["lake"]
        assert found.problems or (compress is bytes and urls(found) == ["lake", "hill"] and size >= len(data) - 4), size
        if compress is not bytes:
            assert found.problems[0][0] == f"byte {first:,}"


def test_a_damaged_member_costs_itself(tmp_path):
    members = [gzip.compress(page(name)) for name in ("lake", "hill", "wood", "moor")]
    for place in (3, 40, len(members[1]) // 2, len(members[1]) - 6):
        damaged = bytearray(members[1])
        damaged[place] ^= 0xFF
        path = write(tmp_path / "a.warc.gz", members[0], bytes(damaged), *members[2:], compress=bytes)
        found = read(path)
        assert [url for url in urls(found) if url != "hill"] == ["lake", "wood", "moor"], place
        assert found.problems[0][0] == f"byte {len(members[0]):,}"
        assert len(found.problems) == 1


def test_a_long_record_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(warc, "RECORD_LIMIT", 2**20)
    long = record(response(b"x" * 3 * 2**20))
    found = read(write(tmp_path / "a", page("lake"), long, page("hill")))
    assert urls(found) == ["lake", "hill"]
    assert found.passed_over == {"record of more than 1 MiB": 1}
    assert not found.problems


def test_zeros_behind_a_gzip_file(tmp_path):
    found = read(write(tmp_path / "a", gzip.compress(page("lake")), bytes(100_000), compress=bytes))
    assert urls(found) == ["lake"]
    assert not found.problems


def test_a_zstd_file_with_its_dictionary(tmp_path):
    dictionary = zstandard.train_dictionary(4096, [page(f"{i * 7919}") for i in range(300)])
    compressor = zstandard.ZstdCompressor(dict_data=dictionary)
    content = dictionary.as_bytes()
    for stored in (content, zstandard.ZstdCompressor().compress(content)):
        frame = b"\x5d\x2a\x4d\x18" + len(stored).to_bytes(4, "little") + stored
        members = [compressor.compress(page(name)) for name in ("lake", "hill")]
        found = read(write(tmp_path / "a.warc.zst", frame, *members, compress=bytes))
        assert urls(found) == ["lake", "hill"]
        assert not found.problems
