from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data.cleaning import Personal
from tests.fastllm.data.cleaning.samples import TEXTS, document

PHONE = "+1 202 555 0123"


def masked(text, **options):
    doc = document(text)
    assert Personal(**options).build()(doc) == ""
    return doc.text


@pytest.mark.parametrize(
    "text",
    [
        # versions, numbers of sections and object identifiers
        "1.2.3", "10.4.5.6789", "version 1.2.3.4", "Version: 5.6.7.8", "v1.2.3.4", "V 2.0.0.1", "release 8.8.8.8",
        "openssl-1.0.2.4", "section 3.2.1.4", "1.3.6.1.4.1", "8.8.8.8.8", "08.08.08.08", "8.8.8.8-rc1", "1.2.3.4.tar",
        # prices and other numbers
        "$1.200.100.250", "1.200.100.250 €", "1.000.000.000", "+1.23456789", "+1,000,000", "+49.000.000", "+20 000 000",
        "+33 12 345 678 €", "+12.5%", "1 + 2 + 34567890123", "3+4915112345678", "+49 30", "+1 2345678", "+1234567890",
        # books, dates, times
        "978-3-16-148410-0", "doi:10.1038/nphys1170", "10.1000/xyz.123.4.5", "2024-05-06T12:30:45+0200", "25.12.2024",
        "UTC +10 2024-05-06", "12:30:45", "2023:12:31 12:30:45", "030 1234567", "(555) 123-4567",
        # code and handles
        "@property", '@app.route("/x")', "@jane", "@jane.doe", "medium.com/@jane.doe", "a@b.T", "foo@1.2.3",
        "user@host", "react@18.3.0-canary.abc", "logo@2x.png", "std::vector<int>", "a::b", "dead::beef", "2001::",
        "f(x)@g(y)", "x@y.dot(z)", "aa:bb:cc:dd:ee:ff", "C++11 1234567", "foo::2001:4860:4860::8888",
        # addresses for documentation or inside a network
        "x@example.com", "y@mail.example.org", "z@a.test", "joe@localhost", "192.168.0.1", "10.0.0.1", "127.0.0.1",
        "203.0.113.9", "224.0.0.1", "0.0.0.0", "255.255.255.255", "2001:db8::5", "fe80::1", "::1", "fd00::1:2",
        "256.1.1.1", "1.2.3.256",
        *TEXTS.values(),
    ],
)  # fmt: skip
def test_what_stays(text):
    for around in (text, f"See {text}.", f"({text})", f"one\n{text}\ntwo", f"„{text}“", f"这是{text}。"):
        assert masked(around) == around


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("jane@company.de", "email@example.com"),
        ("Mail: Jane.Doe+x@mail.company.co.uk.", "Mail: email@example.com."),
        ("<jane@x.org>, 'JOE@X.ORG'", "<email@example.com>, 'email@example.com'"),
        ("mailto:jane@x.org?subject=a", "mailto:email@example.com?subject=a"),
        ("jane@müller.de", "email@example.com"),
        ("邮箱abc@qq.com或电话", "邮箱email@example.com或电话"),
        ("jane@163.com", "email@example.com"),
        ("a@b.com~c@d.com,e@f.com", "email@example.com~email@example.com,email@example.com"),
        ("at 8.8.8.8.", "at 192.0.2.1."),
        ("http://8.8.8.8:53/x, [8.8.8.8], 8.8.8.8/24", "http://192.0.2.1:53/x, [192.0.2.1], 192.0.2.1/24"),
        ("8.8.8.8-8.8.4.4", "192.0.2.1-192.0.2.1"),
        ("服务器8.8.8.8是", "服务器192.0.2.1是"),
        ("::ffff:8.8.8.8", "::ffff:192.0.2.1"),
        ("2001:4860:4860::8888: a", "2001:db8::1: a"),
        ("http://[2A00:1450:4001:81b::200e]:80/", "http://[2001:db8::1]:80/"),
        ("2001:4860:4860:0:0:0:0:8888.", "2001:db8::1."),
        ("+49 30 1234567", PHONE),
        ("call +49 (0)30 123456-78, now", f"call {PHONE}, now"),
        ("+1 (415) 555-2671. +14155552671", f"{PHONE}. {PHONE}"),
        ("tel:+4930123456", f"tel:{PHONE}"),
        ("+420 123 456 789\n+44.20.7946.0958", f"{PHONE}\n{PHONE}"),
        ("+33\u00a01\u00a023\u00a045\u00a067\u00a089", PHONE),
        ("电话+8613800138000。", f"电话{PHONE}。"),
        ("+49 30 1234567 / +49 30 7654321", f"{PHONE} / {PHONE}"),
    ],
)
def test_what_is_masked(text, result):
    assert masked(text) == result
    assert masked(result) == result


@given(
    st.lists(
        st.sampled_from(
            ["jane@x.org", "@", "a", "b.com", "8.8.8.8", "1.2", ".", "-", "~", "+49 30 1234567", "+", "7", " ", ":",
             "::", "2a00:1450:4001::1", "2001", "email@example.com", "192.0.2.1", "€", "v", "\n", "é", "中", "(", "_",
             "/", PHONE]
        ),
        max_size=12,
    ).map("".join)
)  # fmt: skip
@settings(max_examples=300)
def test_twice_is_once(text):
    once = masked(text)
    assert masked(once) == once


def test_figures():
    doc = document("a@b.com, c@d.com, 8.8.8.8, 2a00:1450:4001::1 and +49 30 1234567")
    Personal().build()(doc)
    assert doc.metadata == {"personal": {"emails": 2, "ipv6": 1, "ipv4": 1, "phones": 1}}
    doc = document("none")
    Personal().build()(doc)
    assert doc.metadata == {}


def test_replacements():
    text = "a@b.com 8.8.8.8 2a00:1450:4001::1 +49 30 1234567"
    assert masked(text, email="", ipv4="", ipv6="", phone="") == text
    assert masked(text, email="<E>", ipv4="<4>", ipv6="<6>", phone="<P>") == "<E> <4> <6> <P>"
