"""Make (request, tale) chats out of the corpus. Pure: tales and a random generator in, lists of turns out.

The models are to learn one thing from them: who is asked for comes first in the tale. So a request names somebody, and
the tale is a passage of the corpus that begins with a noun of the same sort, that noun replaced throughout by the one
asked for; often a made-up opening sentence leads it in. Many nouns are far too rare in the corpus to be learned by
heart: copying from the request is the only way to get them right.
"""

import re
from dataclasses import dataclass
from random import Random

from weft.demo_model import words
from weft.demo_model.corpus import Tale

Chat = list[tuple[str, str]]

TALE_CHARS = (300, 800)
SORTS = {
    "animal": words.ANIMALS + words.CREATURES,
    "man": words.MEN,
    "woman": words.WOMEN,
    "thing": words.THINGS,
}
_SORT_OF = {noun: sort for sort, nouns in SORTS.items() for noun in nouns}
# A noun counts only behind one of these, lest verbs such as "to fish" be taken for it.
_DETERMINED_NOUN = re.compile(
    r"\b(?:an?|the|his|her|their|my|your|this|that|one|old|young|little|poor|rich|great|big|beautiful) "
    r"([a-z]+(?:-[a-z]+)*)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[a-z])([.!?]['\"]*)(?=\s+['\"A-Z])")
_CONSONANT_SOUNDS = ("one", "uni", "ewe")
_QUESTION_START = ("can", "could", "do", "would", "may", "how", "what", "who", "why", "are", "and then", "and what")


@dataclass(frozen=True, slots=True)
class Passage:
    """A place in the tales where a paragraph begins with a sentence about `noun`."""

    tale: int
    paragraph: int
    noun: str


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a tale is asked for: `phrase` is the noun with its article and what else the request says of it."""

    noun: str
    phrase: str
    is_plain: bool
    place: str | None = None


class ChatMaker:
    """Makes chats from tales, without end and without repeating itself much."""

    def __init__(self, tales: list[Tale]) -> None:
        self._tales = tales
        self._openings: dict[str, list[Passage]] = {sort: [] for sort in SORTS}
        self._passages: dict[str, list[Passage]] = {sort: [] for sort in SORTS}
        for passage in _find_passages(tales):
            place = self._openings if passage.paragraph == 0 else self._passages
            place[sort_of(passage.noun)].append(passage)
        self._odd_nouns = _find_odd_nouns(tales)

    def make(self, rng: Random, count: int) -> list[Chat]:
        """Return `count` chats, a few of them with a system prompt or several turns."""
        kinds = {
            self._one_subject: 54,
            self._two_subjects: 8,
            self._several: 3,
            self._any_tale: 5,
            self._two_tales: 5,
            self._continued: 5,
            self._small_talk: 20,
        }
        chats = []
        for make_chat in rng.choices(list(kinds), weights=list(kinds.values()), k=count):
            system = [("system", rng.choice(words.SYSTEM_PROMPTS))] if rng.random() < 0.2 else []
            chats.append(system + make_chat(rng))
        return chats

    def _one_subject(self, rng: Random) -> Chat:
        subject = self._choose_subject(rng)
        return [("user", _ask_for(subject.phrase, rng)), ("assistant", self._tale_about(subject, rng))]

    def _two_subjects(self, rng: Random) -> Chat:
        first, second = self._choose_subject(rng), self._choose_subject(rng)
        phrase = f"{first.phrase} and {second.phrase}"
        opening = rng.choice(words.OPENINGS[:4]).format(
            who=phrase, Who=_capitalise(phrase), noun=first.noun, place=rng.choice(words.PLACES)
        )
        tale = _join(opening, self._body_about(first.noun, rng), rng)
        return [("user", _ask_for(phrase, rng)), ("assistant", tale)]

    def _several(self, rng: Random) -> Chat:
        noun = self._choose_noun(rng)
        number = rng.choice(["two ", "three ", "seven ", "", ""])
        opening = rng.choice(words.PLURAL_OPENINGS).format(
            who=f"{number or 'many '}{plural(noun)}", place=rng.choice(words.PLACES)
        )
        tale = _join(opening, self._body_about(noun, rng), rng)
        return [("user", _ask_for(number + plural(noun), rng)), ("assistant", tale)]

    def _any_tale(self, rng: Random) -> Chat:
        request = _phrase_request(rng.choice(words.OPEN_REQUESTS), rng)
        passage = rng.choice(self._openings[rng.choice(list(SORTS))])
        return [("user", request), ("assistant", self._cut(passage, passage.noun, rng))]

    def _two_tales(self, rng: Random) -> Chat:
        return self._one_subject(rng) + self._one_subject(rng)

    def _continued(self, rng: Random) -> Chat:
        subject = self._plain_subject(rng)
        passage = self._choose_opening(subject.noun, rng)
        paragraphs = self._paragraphs(passage, subject.noun)
        half = len(paragraphs) // 2
        if not half:
            return self._one_subject(rng)
        return [
            ("user", _ask_for(subject.phrase, rng)),
            ("assistant", _shorten(paragraphs[:half], rng)),
            ("user", _phrase_request(rng.choice(words.CONTINUATIONS), rng)),
            ("assistant", _shorten(paragraphs[half:], rng)),
        ]

    def _small_talk(self, rng: Random) -> Chat:
        topics = [
            (words.GREETINGS, words.GREETING_ANSWERS),
            (words.IDENTITY_QUESTIONS, words.IDENTITY_ANSWERS),
            (words.OTHER_QUESTIONS, words.OTHER_ANSWERS),
            (words.THANKS, words.THANKS_ANSWERS),
        ]
        questions, answers = rng.choice(topics)
        noun = rng.choice(words.COMMON_NOUNS)
        subject = Subject(noun, with_article(noun), is_plain=True)
        answer = rng.choice(answers).format(who=subject.phrase)
        chat = [("user", _phrase_request(rng.choice(questions), rng)), ("assistant", answer)]
        if questions is words.THANKS:
            return self._one_subject(rng) + chat
        if rng.random() < 0.5:
            yes = _phrase_request(rng.choice(["yes", "yes, please", "please do", "go ahead", "ok", "sure"]), rng)
            return [*chat, ("user", yes), ("assistant", self._tale_about(subject, rng))]
        return chat + self._one_subject(rng) if rng.random() < 0.5 else chat

    def _choose_noun(self, rng: Random) -> str:
        draw = rng.random()
        if draw < 0.2:
            return rng.choice(words.COMMON_NOUNS)
        if draw < 0.6:
            return rng.choice(self._odd_nouns)
        return rng.choice(SORTS[rng.choices(list(SORTS), weights=[35, 25, 15, 25])[0]])

    def _plain_subject(self, rng: Random) -> Subject:
        noun = self._choose_noun(rng)
        return Subject(noun, with_article(noun), is_plain=True)

    def _choose_subject(self, rng: Random) -> Subject:
        noun = self._choose_noun(rng)
        draw = rng.random()
        if draw < 0.60:
            phrase = f"the {noun}" if rng.random() < 0.1 else with_article(noun)
            return Subject(noun, phrase, is_plain=True)
        if draw < 0.80:
            return Subject(noun, with_article(f"{rng.choice(words.ADJECTIVES)} {noun}"), is_plain=False)
        if draw < 0.90 and sort_of(noun) != "thing":
            called = rng.choice(["called", "named"])
            return Subject(noun, f"{with_article(noun)} {called} {rng.choice(words.NAMES)}", is_plain=False)
        return Subject(noun, with_article(noun), is_plain=False, place=rng.choice(words.PLACES))

    def _tale_about(self, subject: Subject, rng: Random) -> str:
        """Tell of the subject: as a tale of the corpus begins, or after a made-up opening."""
        if subject.is_plain and rng.random() < 0.5:
            return self._cut(self._choose_opening(subject.noun, rng), subject.noun, rng)
        openings = words.THING_OPENINGS if sort_of(subject.noun) == "thing" else words.OPENINGS
        opening = rng.choice([o for o in openings if "{place}" in o or not subject.place])
        place = subject.place or rng.choice(words.PLACES)
        opening = opening.format(who=subject.phrase, Who=_capitalise(subject.phrase), noun=subject.noun, place=place)
        return _join(opening, self._body_about(subject.noun, rng), rng)

    def _choose_opening(self, noun: str, rng: Random) -> Passage:
        """Find a tale's beginning; few tales begin with animals, so theirs are often those of men."""
        sort = sort_of(noun)
        if sort == "animal" and rng.random() < 0.4:
            sort = "man"
        return rng.choice(self._openings[sort])

    def _body_about(self, noun: str, rng: Random) -> str:
        return self._cut(rng.choice(self._passages[sort_of(noun)]), noun, rng)

    def _cut(self, passage: Passage, noun: str, rng: Random) -> str:
        return _shorten(self._paragraphs(passage, noun), rng)

    def _paragraphs(self, passage: Passage, noun: str) -> list[str]:
        """The passage and a few paragraphs after it, told of `noun` instead of its own noun."""
        following = self._tales[passage.tale].paragraphs[passage.paragraph : passage.paragraph + 12]
        return [replace_noun(paragraph, passage.noun, noun) for paragraph in following]


def sort_of(noun: str) -> str:
    """The sort of a noun; a noun in no list is told of like an animal."""
    return _SORT_OF.get(noun, "animal")


def plural(noun: str) -> str:
    """Return the plural of an English noun."""
    if noun in words.IRREGULAR_PLURALS:
        return words.IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(phrase: str) -> str:
    """Put "a" or "an" before the phrase."""
    return (
        f"an {phrase}" if phrase[0].lower() in "aeiou" and not phrase.startswith(("one", "un", "ew")) else f"a {phrase}"
    )


def replace_noun(text: str, old: str, new: str) -> str:
    """Replace a noun, singular and plural, with its indefinite article, keeping capitals."""
    if old == new:
        return text

    def put(match: re.Match[str]) -> str:
        article, found = match[1], match[2]
        word = plural(new) if found.lower() == plural(old) != old else new
        word = _capitalise(word) if found[0].isupper() else word
        if not article:
            return word
        return ("A" if article[0] == "A" else "a") + with_article(word)[1:]

    either = rf"{re.escape(old)}|{re.escape(plural(old))}"
    return re.sub(rf"(?<![-\w])(?:(an?)\s)?({either})(?![-\w])", put, text, flags=re.IGNORECASE)


def _find_passages(tales: list[Tale]) -> list[Passage]:
    passages = []
    for i, tale in enumerate(tales):
        for j, paragraph in enumerate(tale.paragraphs):
            noun = _first_noun(_SENTENCE_END.split(paragraph, maxsplit=1)[0])
            if noun and paragraph[0].isupper():
                passages.append(Passage(i, j, noun))
    return passages


def _find_odd_nouns(tales: list[Tale]) -> list[str]:
    """Collect what else stands behind an article, be it a noun or not: practice in copying words never told of."""
    found = {word.lower() for tale in tales for word in _DETERMINED_NOUN.findall(tale.text) if len(word) >= 4}
    return sorted(found - _SORT_OF.keys() - set(words.RESERVED_NOUNS))


def _first_noun(sentence: str) -> str | None:
    """The first known noun near the beginning of the sentence."""
    found = (word.lower() for word in _DETERMINED_NOUN.findall(sentence[:160]))
    return next((word for word in found if word in _SORT_OF), None)


def _ask_for(phrase: str, rng: Random) -> str:
    return _phrase_request(rng.choice(words.REQUESTS).format(who=phrase), rng)


def _phrase_request(request: str, rng: Random) -> str:
    """Vary capitals and the final mark as people do."""
    mark = "?" if request.lower().startswith(_QUESTION_START) else rng.choice([".", ".", "!"])
    request = request if request.endswith(("?", "!", ".")) or rng.random() < 0.5 else request + mark
    return request.lower() if rng.random() < 0.25 else _capitalise(request)


def _join(opening: str, body: str, rng: Random) -> str:
    tale = opening + rng.choice([" ", "\n\n"]) + body
    return f"{tale}\n\n{rng.choice(words.ENDINGS)}" if rng.random() < 0.25 else tale


def _shorten(paragraphs: list[str], rng: Random) -> str:
    """End the text with the first sentence that reaches a random length."""
    text = "\n\n".join(paragraphs)
    budget = rng.randint(*TALE_CHARS)
    ends = (match.end(1) for match in _SENTENCE_END.finditer(text))
    return text[: next((end for end in ends if end >= budget), len(text))]


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]
