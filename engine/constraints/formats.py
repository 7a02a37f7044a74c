"""The formats of strings that JSON Schema names, as regular expressions: draft 2020-12, section 7.3.

A format is asserted here, which the standard leaves open: clients that name one want answers that are of it. Formats
whose rules no regular expression can say are refused.
"""

from __future__ import annotations

_UCS = "".join(
    f"{chr(first)}-{chr(last)}"
    for first, last in [
        (0xA0, 0xD7FF), (0xF900, 0xFDCF), (0xFDF0, 0xFFEF),
        *((plane << 16, (plane << 16) + 0xFFFD) for plane in range(1, 14)), (0xE1000, 0xEFFFD),
    ]
)  # fmt: skip
_PRIVATE = "".join(
    f"{chr(first)}-{chr(last)}" for first, last in [(0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)]
)

# RFC 3339, section 5.6: a day that is in the calendar, and seconds below 60.
_DAY = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])"
    "|(?:[02468][048]|[13579][26])00)-02-29)"
)
_HOUR, _MINUTE, _FRACTION = "(?:[01][0-9]|2[0-3])", "[0-5][0-9]", r"(?:\.[0-9]+)?"
_USUAL_TIME = f"{_HOUR}:{_MINUTE}:{_MINUTE}{_FRACTION}(?:[Zz]|[+-]{_HOUR}:{_MINUTE})"

# RFC 5321, section 4.1.2.
_IPV4 = r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])(?:\.(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])){3})"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_QUOTED = r'"(?:[ !#-\[\]-~]|\\[ -~])*"'


def _leap_seconds() -> tuple[str, str]:
    """Two expressions that both match a time with second 60 only if it is 23:59:60 in UTC.

    The first ties the minutes of the time and of its offset together, the second the hours.
    """
    last = f"60{_FRACTION}"
    minutes = ["59:" + last + f"(?:[Zz]|[+-]{_HOUR}:00)"]
    for minute in range(59):
        minutes.append(rf"{minute:02}:{last}(?:\+{_HOUR}:{minute + 1:02}|-{_HOUR}:{59 - minute:02})")

    hours = [f"23:{_MINUTE}:{last}[Zz]"]
    for hour in range(24):
        exact, below = f"59:{last}", f"(?:[0-4][0-9]|5[0-8]):{last}"
        ahead, behind = f"{(hour + 1) % 24:02}", f"{23 - hour:02}"
        hours.append(rf"{hour:02}:(?:{exact}(?:\+{ahead}:00|-{behind}:00)|{below}(?:\+{hour:02}|-{behind}):{_MINUTE})")
    return f"{_HOUR}:(?:{'|'.join(minutes)})", f"(?:{'|'.join(hours)})"


def _ipv6() -> str:
    """RFC 4291 as RFC 3986, appendix A, writes it: eight groups, of which `::` stands for one and more zeros."""
    group = "[0-9A-Fa-f]{1,4}"
    last = f"(?:{group}:{group}|{_IPV4})"
    forms = [f"(?:{group}:){{6}}{last}", f"::(?:{group}:){{5}}{last}"]
    for before, after in enumerate(range(4, -1, -1)):
        forms.append(f"(?:(?:{group}:){{0,{before}}}{group})?::(?:{group}:){{{after}}}{last}")
    forms += [f"(?:(?:{group}:){{0,5}}{group})?::{group}", f"(?:(?:{group}:){{0,6}}{group})?::"]
    return f"(?:{'|'.join(forms)})"


def _resource(ucs: str, private: str) -> tuple[str, str]:
    """The expressions of a URI (RFC 3986, appendix A) and a reference; with more letters, of IRIs (RFC 3987)."""
    percent = "%[0-9A-Fa-f]{2}"
    plain, delimiters = f"A-Za-z0-9._~{ucs}", "!$&'()*+,;="
    letter = f"(?:[{plain}{delimiters}:@-]|{percent})"
    no_colon = f"(?:[{plain}{delimiters}@-]|{percent})"
    user = f"(?:(?:[{plain}{delimiters}:-]|{percent})*@)?"
    literal = rf"\[(?:{_ipv6()}|[vV][0-9A-Fa-f]+\.[A-Za-z0-9._~{delimiters}:-]+)\]"
    host = f"(?:{literal}|(?:[{plain}{delimiters}-]|{percent})*)"
    network = f"//{user}{host}(?::[0-9]*)?(?:/{letter}*)*"
    absolute = f"/(?:{letter}+(?:/{letter}*)*)?"
    query = f"(?:[{plain}{private}{delimiters}:@/?-]|{percent})*"
    rest = rf"(?:\?{query})?(?:#(?:[{plain}{delimiters}:@/?-]|{percent})*)?"

    whole = f"[A-Za-z][A-Za-z0-9+.-]*:(?:{network}|{absolute}|{letter}+(?:/{letter}*)*)?{rest}"
    relative = f"(?:{network}|{absolute}|{no_colon}+(?:/{letter}*)*)?{rest}"
    return whole, f"(?:{whole}|{relative})"


def _duration() -> str:
    """RFC 3339, appendix A."""
    second = "[0-9]+S"
    minute = f"[0-9]+M(?:{second})?"
    hour = f"[0-9]+H(?:{minute})?"
    day = "[0-9]+D"
    month = f"[0-9]+M(?:{day})?"
    year = f"[0-9]+Y(?:{month})?"
    time = f"T(?:{hour}|{minute}|{second})"
    return f"P(?:(?:{day}|{month}|{year})(?:{time})?|{time}|[0-9]+W)"


def _uri_template() -> str:
    """RFC 6570, section 2: literals, and expressions in braces."""
    literal = rf"(?:[!#$&(-;=?-\[\]_a-z~{_UCS}{_PRIVATE}]|%[0-9A-Fa-f]{{2}})"
    letter = "(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2})"
    variable = rf"{letter}(?:\.?{letter})*(?::[1-9][0-9]{{0,3}}|\*)?"
    return rf"(?:{literal}|\{{[+#./;?&=,!@|]?{variable}(?:,{variable})*\}})*"


_MINUTES, _HOURS = _leap_seconds()
_URI, _URI_REFERENCE = _resource("", "")
_IRI, _IRI_REFERENCE = _resource(_UCS, _PRIVATE)
_POINTER = "(?:/(?:[^~/]|~[01])*)*"

_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "date": (_DAY,),
    "time": (f"(?:{_USUAL_TIME}|{_MINUTES})", f"(?:{_USUAL_TIME}|{_HOURS})"),
    "date-time": (f"{_DAY}[Tt](?:{_USUAL_TIME}|{_MINUTES})", f"{_DAY}[Tt](?:{_USUAL_TIME}|{_HOURS})"),
    "duration": (_duration(),),
    "email": (
        rf"(?:{_ATOM}(?:\.{_ATOM})*|{_QUOTED})@(?:{_HOST}|\[(?:{_IPV4}|IPv6:{_ipv6()})\])",
        '(?:[^@]{1,64}|".{0,62}")@.*',  # section 4.5.3.1, and erratum 1690 of RFC 3696
        ".{3,254}",
    ),
    "hostname": (_HOST, "[A-Za-z0-9.-]{1,253}"),
    "ipv4": (_IPV4,),
    "ipv6": (_ipv6(),),
    "uri": (_URI,),
    "uri-reference": (_URI_REFERENCE,),
    "iri": (_IRI,),
    "iri-reference": (_IRI_REFERENCE,),
    "uri-template": (_uri_template(),),
    "uuid": ("[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",),
    "json-pointer": (_POINTER,),
    "relative-json-pointer": (f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",),
}

FORMATS: dict[str, tuple[str, ...]] = {
    name: tuple(f"^(?:{expression})$" for expression in expressions) for name, expressions in _EXPRESSIONS.items()
}
"""Regular expressions by format: a string is of the format if all of them match it."""
INTEGERS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
"""OpenAPI's formats of integers: the least and the largest."""
ANNOTATIONS = {"float", "double", "password"}
"""OpenAPI's formats that allow every number, and every text."""


def why_refused(schema: dict[str, object]) -> str | None:
    """Why a schema's format cannot be asserted; None if it can."""
    name = schema.get("format")
    if name is None or (isinstance(name, str) and (name in FORMATS or name in ANNOTATIONS)):
        return None
    if isinstance(name, str) and name in INTEGERS:
        kinds = schema.get("type")
        right = kinds == "integer" or (isinstance(kinds, list) and set(kinds) <= {"integer", "null"})
        return None if right else f'is for {{"type": "integer"}} alone, not for type={kinds!r}'
    return f"is not supported: it must be one of {', '.join([*FORMATS, *INTEGERS, *sorted(ANNOTATIONS)])}"


def as_schemas(name: object) -> list[dict[str, object]]:
    """Schemas that together say what a format says that why_refused() did not refuse."""
    if not isinstance(name, str):
        return []
    if name in INTEGERS:
        least, most = INTEGERS[name]
        return [{"minimum": least, "maximum": most}]
    return [{"pattern": expression} for expression in FORMATS.get(name, ())]
