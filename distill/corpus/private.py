"""Personal data in a text, replaced by the name of what it is: [mail], [phone], [key], [card].

What is found is what can be told by its form; a name or a street can't. Where a form is also that of something
harmless (a long number that Luhn's rule finds sound, 32 letters and digits of a digest) it is replaced, too.
"""

import re

MAIL, PHONE, KEY, CARD = "[mail]", "[phone]", "[key]", "[card]"
_KNOWN = "|".join(  # keys that say by their beginning whose they are
    (
        r"(?:sk|pk|rk)[-_](?:[A-Za-z0-9]{1,20}[-_]){0,4}[A-Za-z0-9_-]{16,}",
        r"gh[pousr]_\w{20,}",
        r"github_pat_\w{20,}",
        r"(?:hf|npm|pypi|dop_v1|shpat)[_-][\w-]{20,}",
        r"glpat-[\w-]{16,}",
        r"xox[a-z]-[\w-]{10,}",
        r"A[KS]IA[0-9A-Z]{16}",
        r"AIza[\w-]{30,}",
        r"ya29\.[\w-]{20,}",
        r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # JSON Web Tokens
    )
)
_SECRET = r"(?:api|access|private|secret)[ _-]?(?:access[ _-]?)?key|secret|token|passw(?:or)?d|pwd|passphrase"
_KEYS = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----|\Z)"
    rf"|(?<!\w)(?:{_KNOWN})"
    r"|(?<=://)[^\s/:@]{1,99}:[^\s/@]{1,99}(?=@)"
    r"|(?i:(?<=bearer )[\w.~+/=-]{16,})"
    r"|(?<![A-Za-z0-9])(?=[A-Za-z0-9]*[0-9])(?=[A-Za-z0-9]*[A-Za-z])[A-Za-z0-9]{32,}",
    re.DOTALL,
)
_NAMED = re.compile(
    rf"((?<![A-Za-z])(?:{_SECRET})['\"]?\s{{0,3}}(?:=\s{{0,3}}|:\s{{0,3}}(?=\S*\d)))"
    r"(?:(['\"])[^'\"\n]{4,200}(?=\2)|(['\"]?)[^\s'\"]{4,}?(?=[,;)]?(?:[\s'\"]|\Z)))",
    re.IGNORECASE,
)
_MAILS = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?!\w)")
_DIGITS = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,40}(?!\w)")
_PHONES = re.compile(
    r"(?:(?<!\w)\+|(?<![\w+.,])00)[1-9](?:[ ()./-]{0,3}\d){6,13}(?!\w)"
    r"|(?<![\w.-])(?:1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"
    r"|(?<![\w.,:/-])(?:\(0[1-9]\d{1,4}\)|0[1-9]\d{1,4})(?:[ /-]{1,3}\d{2,9}){1,4}(?!\w)"
    r"|(?<![\w.,:/-])0[1-9](?:[ .]\d\d){4}(?!\w)"
    r"|(?<![\w.,:/-])0[1-9]\d{8,9}(?!\w)"
)
_CALLED = re.compile(
    r"((?<!\w)(?:tel|phone|mobile|cell|fax|whatsapp)\b\.?(?: number)?(?: is)?[:\s]{1,3})(\d[\d ().-]{4,16}\d)(?!\w)",
    re.IGNORECASE,
)
LEAST_DIGITS = 8
"""Of a phone number that no word announces."""


def masked(text: str) -> str:
    """The text without what is personal in it; twice is once."""
    text = _KEYS.sub(KEY, text)
    text = _NAMED.sub(rf"\1\2\3{KEY}", text)
    text = _MAILS.sub(MAIL, text)
    text = _DIGITS.sub(_cards, text)
    text = _CALLED.sub(rf"\1{PHONE}", text)
    return _PHONES.sub(_phone, text)


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it (ISO/IEC 7812-1)."""
    doubled = (2 * int(digit) for digit in digits[-2::-2])
    return (sum(int(digit) for digit in digits[::-2]) + sum(twice - 9 * (twice > 9) for twice in doubled)) % 10 == 0


def _cards(found: re.Match[str]) -> str:
    """A row of digits in groups, less those neighbouring groups that are a card's number: 13 to 19 digits, the first
    2 to 6. What stands before or after it, such as its date, is kept."""
    groups = re.findall(r"\d+|\D", found[0])
    for start in range(0, len(groups), 2):
        for end in range(len(groups), start, -2):
            number = "".join(groups[start:end:2])
            if 13 <= len(number) <= 19 and "2" <= number[0] <= "6" and luhn(number):
                return "".join([*groups[:start], CARD, *groups[end:]])
    return found[0]


def _phone(found: re.Match[str]) -> str:
    return PHONE if sum(map(str.isdigit, found[0])) >= LEAST_DIGITS else found[0]
