"""Personal data: e-mail and IP addresses and phone numbers are masked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from ..document import Document
from .filter import Filter, Judge

# A domain after "@". Its labels may have letters with accents, Greek and Cyrillic; its last one is a top-level domain.
_LABEL = "[A-Za-z0-9\u00c0-\u04ff](?:[A-Za-z0-9\u00c0-\u04ff-]{0,61}[A-Za-z0-9\u00c0-\u04ff])?"
_DOMAIN = re.compile(
    rf"(?!\d+\.\d)((?:{_LABEL}\.){{1,8}})(xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z]{{2,24}})(?![A-Za-z0-9_@(-]|\.[A-Za-z0-9])"
)
_LOCAL = re.compile(r"[A-Za-z0-9._%+~-]+")  # before "@", on the reversed text
_LONGEST_LOCAL = 64
_RESERVED = re.compile(r"(?:^|\.)(?:example\.(?:com|net|org)|example|test|invalid|localhost|local)$", re.IGNORECASE)
_FILE = frozenset(("png", "jpg", "jpeg", "gif", "svg", "webp", "avif", "css", "js"))  # logo@2x.png

_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!\w|-[A-Za-z]|\.\w)", re.ASCII)
_BEFORE_IPV4 = re.compile(  # what an IPv4 address does not follow: the rest of a number or word, a version, a price
    r"(?:[\w.+]|[A-Za-z_]-|[$€£¥₹§]\s?|\bv\.?\s?|\b(?:ver|version|release|rev|revision|build|firmware|section|chapter|clause|oid)"
    r"[\s.:=]{0,2})\Z",
    re.ASCII | re.IGNORECASE,
)
_PRICE = re.compile(r"[ \u00a0]?(?:[$€£¥₹%]|(?:EUR|USD|GBP|CHF|Rp|VND)\b)")
# Global unicast addresses are in 2000::/3.
_IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,33}(?:[0-9A-Fa-f]|(?<=:):)(?!\w|:[\w:]|\.\d)", re.ASCII)

_COUNTRY = (
    r"(?:7|2(?:[07]|[1-689]\d)|3(?:[0-469]|[578]\d)|4(?:[013-9]|2\d)|5(?:[1-8]|[09]\d)|6(?:[0-6]|[789]\d)"
    r"|8(?:[1246]|[0358789]\d)|9(?:[0-58]|[679]\d))"
)
_GAP = "[ \u00a0\u2009\u202f().\\-/\u2010\u2011\u2013]{0,3}"
# "+", a country code of the ITU, digits in groups: with the code 8 to 15; after +1, 10 of the North American plan.
_PHONE = re.compile(
    rf"\+(?:1{_GAP}[2-9]\d\d(?:{_GAP}\d){{7}}|(?={_COUNTRY})\d(?:{_GAP}\d){{7,14}})(?![\w+]|[.,]\d|{_PRICE.pattern})",
    re.ASCII,
)
_WORD = re.compile(r"\w", re.ASCII)  # Chinese text has no space before a number or address
_DECIMAL = re.compile(r"\+\d+\.\d+")  # +1.23456789
_THOUSANDS = re.compile(r"\+\d{1,3}(?:\.\d{3})+|\+\d{1,3}\D+00.*")  # +49.000.000, +20 000 000


@dataclass(frozen=True)
class Personal(Filter):
    """Masks e-mail addresses, IP addresses and phone numbers in international form, as FineWeb does the first two.

    FineWeb (Penedo et al. 2024, appendix) puts "email@example.com" or "firstname.lastname@example.org" for an e-mail
    address and one of six public addresses that did not answer for an IPv4 address. Here every address of a kind gets
    the same replacement, from what is reserved for documentation: RFC 2606, 5737, 3849, and the fictional 555-01xx.
    So the text alone decides, and masking twice changes nothing. An empty replacement leaves that kind alone.

    What stays: e-mail addresses at example.com, .net and .org, .example, .test, .invalid, .localhost and .local;
    addresses that are not global (private, loopback, link-local, documentation, multicast); IPv6 outside 2000::/3
    or with fewer than three groups; four numbers that follow "version", "v" or "section", or stand with a currency;
    phone numbers without "+" and a country code, decimals and thousands. An address with a mask or port loses the
    address alone.

    Web pages and tables are masked. In an encyclopaedia addresses are content, and people are public; so not there by
    default.
    """

    name: ClassVar[str] = "personal"
    kinds: tuple[str, ...] = ("web", "table")
    email: str = "email@example.com"
    ipv4: str = "192.0.2.1"
    ipv6: str = "2001:db8::1"
    phone: str = "+1 202 555 0123"

    def build(self) -> Judge:
        maskers: list[tuple[str, str, Callable[[str, str], tuple[str, int]]]] = [
            ("emails", self.email, mask_emails),
            ("ipv6", self.ipv6, mask_ipv6),
            ("ipv4", self.ipv4, mask_ipv4),
            ("phones", self.phone, mask_phones),
        ]

        def judge(document: Document) -> str:
            counts = {}
            for name, replacement, mask in maskers:
                if replacement:
                    document.text, counts[name] = mask(document.text, replacement)
            if any(counts.values()):
                document.metadata[self.name] = {name: count for name, count in counts.items() if count}
            return ""

        return judge


def mask_emails(text: str, replacement: str) -> tuple[str, int]:
    """The text with its e-mail addresses masked, and their number.

    Each "@" is looked at from both sides, at most 64 characters back: linear in the text.
    """
    at = text.find("@")
    parts: list[str] = []
    done = 0  # up to here the text is in the parts
    free = 0  # up to here it belongs to an address
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        if domain and domain[2].lower() not in _FILE:
            local = _LOCAL.match(text[max(free, at - _LONGEST_LOCAL - 1) : at][::-1])
            address = local[0][::-1].lstrip("._%+~-") if local else ""
            if 0 < len(address) <= _LONGEST_LOCAL and address[-1] != ".":
                free = domain.end()
                if not _RESERVED.search(domain[0]):
                    parts += (text[done : at - len(address)], replacement)
                    done = free
        at = text.find("@", max(at + 1, free))
    return "".join(parts) + text[done:], len(parts) // 2


def _mask(
    text: str, pattern: re.Pattern[str], replacement: str, personal: Callable[[re.Match[str]], bool]
) -> tuple[str, int]:
    count = 0

    def masked(found: re.Match[str]) -> str:
        nonlocal count
        if not personal(found) or found[0] == replacement:
            return found[0]
        count += 1
        return replacement

    return pattern.sub(masked, text), count


def mask_ipv4(text: str, replacement: str) -> tuple[str, int]:
    """The text with its global IPv4 addresses masked, and their number."""
    if not any(map(str.isdecimal, text.split("."))):  # no second and third number: a fast look that most texts pass
        return text, 0
    return _mask(text, _IPV4, replacement, _is_global_ipv4)


def _is_global_ipv4(found: re.Match[str]) -> bool:
    if _BEFORE_IPV4.search(found.string[max(0, found.start() - 12) : found.start()]):
        return False
    return not _PRICE.match(found.string, found.end()) and _is_global(found[0])


def mask_ipv6(text: str, replacement: str) -> tuple[str, int]:
    """The text with its global IPv6 addresses masked, and their number."""
    if "::" not in text and text.count(":") < 7:
        return text, 0
    return _mask(text, _IPV6, replacement, _is_global_ipv6)


def _is_global_ipv6(found: re.Match[str]) -> bool:
    before = found.string[max(0, found.start() - 1) : found.start()]
    if _WORD.match(before) or before in (":", "."):
        return False
    return sum(map(bool, found[0].split(":"))) >= 3 and _is_global(found[0])


def _is_global(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def mask_phones(text: str, replacement: str) -> tuple[str, int]:
    """The text with its phone numbers in international form masked, and their number."""
    return _mask(text, _PHONE, replacement, _is_phone) if "+" in text else (text, 0)


def _is_phone(found: re.Match[str]) -> bool:
    before = found.string[max(0, found.start() - 1) : found.start()]
    if _WORD.match(before) or before == "+":
        return False
    return not _DECIMAL.fullmatch(found[0]) and not _THOUSANDS.fullmatch(found[0])
