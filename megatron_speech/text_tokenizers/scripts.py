"""Unicode scripts of characters and of texts."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterable

import regex

from megatron_speech.errors import InputError
from megatron_speech.wording import nearest

COMMON = frozenset({"Common", "Inherited", "Unknown"})  # digits, punctuation, joiners, marks of any script, unassigned

# Property value names of Unicode 15's Scripts.txt.
SCRIPTS = tuple(
    "Latin Common Inherited Devanagari Han Cyrillic Arabic Greek Hebrew Bengali Tamil Telugu Kannada Malayalam "
    "Gujarati Gurmukhi Oriya Sinhala Ethiopic Thai Lao Tibetan Myanmar Khmer Georgian Armenian Hangul Hiragana "
    "Katakana Bopomofo "
    "Adlam Ahom Anatolian_Hieroglyphs Avestan Balinese Bamum Bassa_Vah Batak Bhaiksuki Brahmi Braille Buginese Buhid "
    "Canadian_Aboriginal Carian Caucasian_Albanian Chakma Cham Cherokee Chorasmian Coptic Cuneiform Cypriot "
    "Cypro_Minoan Deseret Dives_Akuru Dogra Duployan Egyptian_Hieroglyphs Elbasan Elymaic Glagolitic Gothic Grantha "
    "Gunjala_Gondi Hanifi_Rohingya Hanunoo Hatran Imperial_Aramaic Inscriptional_Pahlavi Inscriptional_Parthian "
    "Javanese Kaithi Kawi Kayah_Li Kharoshthi Khitan_Small_Script Khojki Khudawadi Lepcha Limbu Linear_A Linear_B Lisu "
    "Lycian Lydian Mahajani Makasar Mandaic Manichaean Marchen Masaram_Gondi Medefaidrin Meetei_Mayek Mende_Kikakui "
    "Meroitic_Cursive Meroitic_Hieroglyphs Miao Modi Mongolian Mro Multani Nabataean Nag_Mundari Nandinagari "
    "New_Tai_Lue Newa Nko Nushu Nyiakeng_Puachue_Hmong Ogham Ol_Chiki Old_Hungarian Old_Italic Old_North_Arabian "
    "Old_Permic Old_Persian Old_Sogdian Old_South_Arabian Old_Turkic Old_Uyghur Osage Osmanya Pahawh_Hmong Palmyrene "
    "Pau_Cin_Hau Phags_Pa Phoenician Psalter_Pahlavi Rejang Runic Samaritan Saurashtra Sharada Shavian Siddham "
    "SignWriting Sogdian Sora_Sompeng Soyombo Sundanese Syloti_Nagri Syriac Tagalog Tagbanwa Tai_Le Tai_Tham Tai_Viet "
    "Takri Tangsa Tangut Tifinagh Tirhuta Toto Ugaritic Vai Vithkuqi Wancho Warang_Citi Yezidi Yi "
    "Zanabazar_Square".split()
)


@functools.cache
def _any_script() -> regex.Pattern[str]:
    return regex.compile("|".join(rf"(?P<{name}>\p{{Script={name}}})" for name in SCRIPTS))


@functools.cache
def script_of(character: str) -> str:
    """Unicode's Script property of one character; "Unknown" for unassigned and private ones."""
    match = _any_script().match(character)
    return match.lastgroup if match and match.lastgroup else "Unknown"


@functools.cache
def _extensions(script: str) -> regex.Pattern[str]:
    return regex.compile(rf"\p{{Script_Extensions={script}}}")


@functools.cache
def shared_with(character: str, script: str) -> bool:
    """Whether a common or inherited character (a danda, a vedic accent) is one of `script`, by property or name."""
    named = unicodedata.name(character, "").startswith(script.replace("_", " ").upper() + " ")
    return named or _extensions(script).match(character) is not None


def scripts_of_counts(counts: Counter[str]) -> Counter[str]:
    """Characters by script, of characters by themselves; common and inherited ones are of no script."""
    scripts: Counter[str] = Counter()
    for character, count in counts.items():
        script = script_of(character)
        if script not in COMMON:
            scripts[script] += count
    return scripts


def main_script(text: str) -> str:
    """The script of most letters of a text; "Common" for a text without any."""
    scripts = scripts_of_counts(Counter(text))
    return min(scripts, key=lambda name: (-scripts[name], name)) if scripts else "Common"


def parse_scripts(names: Iterable[str]) -> tuple[str, ...]:
    """Script names as Unicode spells them, in the order given.

    Raises:
        InputError: no such script, or one of those that belong to no script in particular.
    """
    known = {name.lower(): name for name in SCRIPTS if name not in COMMON}
    found = []
    for name in names:
        key = name.strip().replace(" ", "_").lower()
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {known[near]!r}?" if near else "needed: names such as Ethiopic, Devanagari or Tamil"
            raise InputError(f"--scripts: {name!r} is no Unicode script; {hint}")
        if known[key] not in found:
            found.append(known[key])
    return tuple(found)


def is_assigned(character: str) -> bool:
    """Whether Unicode (of this Python) has given the code point a meaning; surrogates have none."""
    return unicodedata.category(character) not in ("Cn", "Cs")
