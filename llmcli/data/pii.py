"""Personal data in text: e-mail addresses, phone and card numbers, IBANs, IP addresses, each replaced by its label.

Invariant: what has a checksum (card: Luhn, ISO/IEC 7812-1; IBAN: mod 97, ISO 13616) is replaced only where it holds.
Phone numbers have none, so they are taken in the forms that people write: international with `+` or `00`, North
American 3-3-4, national with a leading 0 and separators, Chinese mobile. A version number of four parts is taken for an
IP address. Names and postal addresses are not looked for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

LABELS = ("EMAIL", "PHONE", "CARD", "IBAN", "IP")

_BEFORE_AT = re.compile(r"[A-Za-z0-9._%+\-]{1,64}\Z")
_AFTER_AT = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])")
# Patterns that begin with a plain set of characters are four times as fast to search for as with a look behind.
_IBAN_START = re.compile(r"[A-Z]{2}[0-9]{2}[A-Z0-9 -]")
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6 = re.compile(r"(?<![0-9A-Za-z:.])[0-9A-Fa-f:]{6,39}(?![0-9A-Za-z:])")
# A run of digits with what people put between them; everything that is made of digits is looked for inside runs.
_RUN = re.compile(r"[0-9][0-9 ().\-/]{5,60}[0-9](?![0-9A-Za-z_])")
_IPV4 = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9.])")
_CARD = re.compile(r"(?<![0-9])[2-6][0-9]{3}(?:[ -]?[0-9]){9,15}(?![0-9])")
_PHONE = re.compile(
    r"""(?<![0-9+.])(?:
        (?:\+|00)[1-9](?:[ ./-]?\(?[0-9]\)?){7,14}          # +49 (0)30 1234-567
      | (?:1[ .-])?\(?[2-9][0-9]{2}\)?[ .-]{1,2}[2-9]?[0-9]{2,3}[.-][0-9]{4}   # (212) 555-0123
      | \(?0[1-9][0-9]{1,4}\)?[ /-]{1,3}[0-9](?:[ /-]?[0-9]){4,9}     # 030 / 123 45 67
      | 1[3-9][0-9]{9}                                          # 13800138000
    )(?![0-9])""",
    re.VERBOSE,
)

_IBAN_COUNTRIES = {  # by length: the IBAN registry of ISO 13616
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VA VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
_IBAN_LENGTHS = {country: length for length, countries in _IBAN_COUNTRIES.items() for country in countries.split()}

Span = tuple[int, int, str]


def scrub(text: str) -> tuple[str, dict[str, int]]:
    """(the text with labels such as [EMAIL] in place of what was found, how many of each)."""
    spans = sorted(_find(text))
    if not spans:
        return text, {}
    parts: list[str] = []
    counts: dict[str, int] = {}
    place = 0
    for start, end, label in spans:
        if start < place:  # inside the one before
            continue
        parts += (text[place:start], f"[{label}]")
        counts[label] = counts.get(label, 0) + 1
        place = end
    return "".join(parts) + text[place:], counts


def _find(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from _emails(text)
    for match in _IBAN_START.finditer(text):
        end = _iban_end(text, match.start())
        if end:
            yield match.start(), end, "IBAN"
    yield from _ipv6(text)
    for run in _RUN.finditer(text):
        start = run.start()
        while start > 0 and text[start - 1] in "+(" and start > run.start() - 2:
            start -= 1
        if start == 0 or not (text[start - 1].isalnum() or text[start - 1] in "_."):
            yield from _numbers(text[start : run.end()], start)


def _emails(text: str) -> Iterator[Span]:
    """From each @ to both sides: searching for what stands before an @ would look at every word."""
    place = text.find("@")
    while place >= 0:
        after = _AFTER_AT.match(text, place + 1)
        before = _BEFORE_AT.search(text[max(0, place - 64) : place]) if after else None
        if before and after:
            yield place - len(before.group().lstrip(".-")), after.end(), "EMAIL"
        place = text.find("@", place + 1)


def _iban_end(text: str, start: int) -> int:
    """Where the IBAN that begins at `start` ends; 0 when there is none."""
    length = _IBAN_LENGTHS.get(text[start : start + 2], 0)
    letters = ""
    place = start
    while len(letters) < length and place < len(text):
        character = text[place]
        if character.isascii() and character.isalnum():
            letters += character
        elif character not in " -" or not text[place - 1].isalnum():
            return 0
        place += 1
    if start and text[start - 1].isalnum():
        return 0
    if not length or len(letters) < length or text[place : place + 1].isalnum():
        return 0
    digits = "".join(str(int(character, 36)) for character in letters[4:] + letters[:4])
    return place if int(digits) % 97 == 1 else 0


def _ipv6(text: str) -> Iterator[Span]:
    """Addresses of three groups or more; `::1` and Python's `[::2]` point at nobody."""
    behind = 0
    for colons in _COLONS.finditer(text):
        if colons.start() < behind:
            continue
        first = max(0, colons.start() - 4)
        match = _IPV6.search(text, first, min(len(text), colons.start() + 45))
        if not match or match.start() > colons.start():
            continue
        behind = match.end()
        candidate = match.group().rstrip(":") if not match.group().endswith("::") else match.group()
        if sum(map(bool, candidate.split(":"))) >= 3:
            try:
                ipaddress.IPv6Address(candidate)
            except ValueError:
                continue
            yield match.start(), match.start() + len(candidate), "IP"


def _numbers(run: str, start: int) -> Iterator[Span]:
    """What a run of digits is: addresses first, then cards, then phone numbers in what is left."""
    found: list[Span] = []

    def free(match: re.Match[str]) -> bool:
        return all(match.end() <= begin or match.start() >= end for begin, end, _ in found)

    for match in _IPV4.finditer(run):
        if all(int(part) < 256 for part in match.group().split(".")):
            found.append((match.start(), match.end(), "IP"))
    for match in _CARD.finditer(run):
        if free(match) and _luhn(match.group()):
            found.append((match.start(), match.end(), "CARD"))
    for match in _PHONE.finditer(run):
        if free(match):
            found.append((match.start(), match.end(), "PHONE"))
    for begin, end, label in found:
        yield start + begin, start + end, label


def _luhn(number: str) -> bool:
    digits = [int(character) for character in reversed(number) if character.isdigit()]
    doubled = (digit * 2 - 9 * (digit > 4) for digit in digits[1::2])
    return 13 <= len(digits) <= 19 and (sum(digits[::2]) + sum(doubled)) % 10 == 0
