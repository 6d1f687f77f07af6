"""How the tasks of ruler.py are said: in English for real models, in a closed vocabulary for the test model.

A wording makes names and values, states facts and asks questions; which facts a task has and how often is ruler.py's.
"""

import random
import uuid
from abc import ABC, abstractmethod

from momentkv_vllm.calibrate import items


def _words(text: str) -> list[str]:
    return text.split()


class Wording(ABC):
    """One language of the tasks. Every method returns text whose pieces are joined by a space.

    `answer_*` is the form the test model is trained on; scores look only for the references inside what a model says.
    """

    @abstractmethod
    def keys(self, rng: random.Random, count: int, long: bool = False) -> list[str]:
        """Different names of needles; fewer if the vocabulary has no more."""

    @abstractmethod
    def value(self, rng: random.Random, long: bool = False) -> str:
        """What a needle holds: a number, or something of a UUID's length."""

    @abstractmethod
    def needle(self, key: str, value: str) -> str: ...

    @abstractmethod
    def ask_needles(self, keys: list[str], all_values: bool) -> str:
        """Question for the value of each key, or for all values of the only key."""

    @abstractmethod
    def answer_needles(self, keys: list[str], values: list[str]) -> str: ...

    @abstractmethod
    def variables(self, rng: random.Random, count: int) -> list[str]: ...

    @abstractmethod
    def assign(self, variable: str, source: str, is_value: bool) -> str:
        """`variable` gets the value, or the value of the variable `source`."""

    @abstractmethod
    def ask_variables(self, value: str) -> str: ...

    @abstractmethod
    def answer_variables(self, variables: list[str]) -> str: ...

    @abstractmethod
    def counted(self, rng: random.Random, count: int, coded: bool) -> list[str]:
        """Different words to be counted, `coded`: without meaning."""

    @abstractmethod
    def listed(self, word: str, number: int) -> str:
        """One entry of the list to be counted."""

    @abstractmethod
    def ask_counted(self, count: int, coded: bool) -> str: ...

    @abstractmethod
    def people(self, rng: random.Random, count: int) -> list[str]: ...

    @abstractmethod
    def relations(self) -> list[str]: ...

    @abstractmethod
    def fact(self, person: str, relation: str, value: str) -> str: ...

    @abstractmethod
    def friend(self, person: str, friend: str) -> str: ...

    @abstractmethod
    def attribute(self, rng: random.Random) -> str:
        """A value of a relation."""

    @abstractmethod
    def ask_fact(self, person: str, relation: str, of_friend: bool) -> str: ...

    @abstractmethod
    def answer_fact(self, friend: str | None, relation: str, value: str) -> str: ...

    @abstractmethod
    def noise(self) -> str:
        """A sentence that says nothing, repeated as haystack."""

    @abstractmethod
    def text(self, rng: random.Random, words: int) -> list[str]:
        """Running text of about so many words, in units between which needles may stand."""


class Compact(Wording):
    """The closed vocabulary of the test model: one word is one token, names of a kind are equally long."""

    KEYS = [f"k{i:03}" for i in range(256)]
    VALUES = [f"v{i:03}" for i in range(256)]
    TOPIC = [f"t{i:03}" for i in range(128)]
    RARE = [f"r{i:02}" for i in range(48)]
    COUNTED = [f"c{i:02}" for i in range(48)]
    VARIABLES = [f"x{i:02}" for i in range(32)]
    PEOPLE = [f"p{i:02}" for i in range(48)]
    RELATIONS = [f"a{i}" for i in range(6)]
    MARKS = ["remember", "all", "are", ".", ",", "?", "let", "#", "common", "frequent", "friend", "copy", "[", "]"]
    SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
    WORDS = SPECIAL + MARKS + KEYS + VALUES + TOPIC + RARE + COUNTED + VARIABLES + PEOPLE + RELATIONS
    TOPICS = 8

    def __init__(self) -> None:
        self.chains = [self._chain(t) for t in range(self.TOPICS)]

    def _chain(self, topic: int) -> dict[str, str]:
        order = self.TOPIC[:]
        random.Random(1000 + topic).shuffle(order)
        return dict(zip(order, order[1:] + order[:1], strict=True))

    def keys(self, rng: random.Random, count: int, long: bool = False) -> list[str]:
        if long:
            return list(dict.fromkeys(" ".join(rng.sample(self.KEYS, 2)) for _ in range(count)))
        return rng.sample(self.KEYS, min(count, len(self.KEYS)))

    def value(self, rng: random.Random, long: bool = False) -> str:
        return " ".join(rng.choices(self.VALUES, k=8 if long else 1))

    def needle(self, key: str, value: str) -> str:
        return f"remember {key} {value} ."

    def ask_needles(self, keys: list[str], all_values: bool) -> str:
        return f"? {'all ' * all_values}{keys[0]}" if len(keys) == 1 else f"? {' , '.join(keys)} are"

    def answer_needles(self, keys: list[str], values: list[str]) -> str:
        if len(keys) == 1:
            return " , ".join(values)
        return " , ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))

    def variables(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample(self.VARIABLES, count)

    def assign(self, variable: str, source: str, is_value: bool) -> str:
        return f"let {source} {variable} ."

    def ask_variables(self, value: str) -> str:
        return f"? let {value}"

    def answer_variables(self, variables: list[str]) -> str:
        return " ".join(variables)

    def counted(self, rng: random.Random, count: int, coded: bool) -> list[str]:
        return rng.sample(self.COUNTED, min(count, len(self.COUNTED)))

    def listed(self, word: str, number: int) -> str:
        return f"# {word}"

    def ask_counted(self, count: int, coded: bool) -> str:
        return "? frequent" if coded else "? common"

    def people(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample(self.PEOPLE, count)

    def relations(self) -> list[str]:
        return self.RELATIONS

    def fact(self, person: str, relation: str, value: str) -> str:
        return f"{person} {relation} {value} ."

    def friend(self, person: str, friend: str) -> str:
        return f"{person} friend {friend} ."

    def attribute(self, rng: random.Random) -> str:
        return rng.choice(self.VALUES)

    def ask_fact(self, person: str, relation: str, of_friend: bool) -> str:
        return f"? {relation} , {person} friend" if of_friend else f"? {person} {relation}"

    def answer_fact(self, friend: str | None, relation: str, value: str) -> str:
        return f"{friend} {relation} {value}" if friend else value

    def noise(self) -> str:
        return " ".join(self.TOPIC[:12]) + " ."

    def text(self, rng: random.Random, words: int) -> list[str]:
        """A topic's chain (65 %), this document's favourite topic words (10 %) and rare words (25 %), both by Zipf's law.

        The favourites can only be predicted by averaging over the whole document: what keeps heads from being all sharp.
        """
        chain = self.chains[rng.randrange(self.TOPICS)]
        zipf = [1 / (i + 1) for i in range(12)]
        rare, favourite = rng.sample(self.RARE, 12), rng.sample(self.TOPIC, 12)
        out, word = [], rng.choice(self.TOPIC)
        kinds = rng.choices(("chain", "favourite", "rare"), (65, 10, 25), k=words)
        rares, favourites = iter(rng.choices(rare, zipf, k=words)), iter(rng.choices(favourite, zipf, k=words))
        for kind in kinds:
            if kind == "rare":
                out.append(next(rares))
                continue
            word = chain[word] if kind == "chain" else next(favourites)
            out.append(word)
        return out

    def copy_task(self, rng: random.Random, words: int) -> tuple[str, str, str]:
        """(piece, question, answer) of copying a stretch of text: not RULER's, but what summaries and code need."""
        copied = " ".join(rng.choices(self.VALUES + self.TOPIC, k=words))
        return f"copy [ {copied} ]", "? copy [", copied


class English(Wording):
    """Plain English for real models; the haystack's text comes from a file if one is given, else from a small grammar."""

    ADJECTIVES, NOUNS = items.ADJECTIVES, items.NOUNS
    FIRST = _words(
        "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Kira Leon Mina Nils Olga Pavel Rosa Sami Tessa Viktor"
    )
    LAST = _words(
        "Abelson Brandt Castel Dorfman Egger Falk Grunwald Hale Ibarra Jansen Kovac Lund Moreau Novak Okoye Petrov"
    )
    FACTS = {
        "city": ("lives in the city of", "In which city does {} live?"),
        "job": ("earns a living as a", "What does {} do for a living?"),
        "drink": ("drinks nothing but", "What does {} drink?"),
        "pet": ("shares a home with a pet", "Which pet does {} keep?"),
        "instrument": ("plays the", "Which instrument does {} play?"),
    }

    def __init__(self, essay: str = "") -> None:
        """essay: running text for the haystack; empty: sentences are made up."""
        self.sentences = [s.strip() + "." for s in essay.replace("\n", " ").split(". ") if s.strip()]

    def keys(self, rng: random.Random, count: int, long: bool = False) -> list[str]:
        if long:
            return [self._uuid(rng) for _ in range(count)]
        return list(dict.fromkeys(items.key(rng) for _ in range(count)))

    def value(self, rng: random.Random, long: bool = False) -> str:
        return self._uuid(rng) if long else items.code(rng)

    @staticmethod
    def _uuid(rng: random.Random) -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def needle(self, key: str, value: str) -> str:
        return items.sentence(key, value)

    def ask_needles(self, keys: list[str], all_values: bool) -> str:
        if len(keys) > 1:
            return f"\nWhat are the secret codes of {', '.join(keys)}, as the text gives them? The secret codes are"
        if all_values:
            return f"\nWhat are all the secret codes of {keys[0]} in the text? The secret codes of {keys[0]} are"
        return items.question(keys[0])

    def answer_needles(self, keys: list[str], values: list[str]) -> str:
        return ", ".join(values)

    def variables(self, rng: random.Random, count: int) -> list[str]:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        return list({"".join(rng.choices(letters, k=5)): 0 for _ in range(4 * count)})[:count]

    def assign(self, variable: str, source: str, is_value: bool) -> str:
        return f"Set {variable} to {source}." if is_value else f"Set {variable} to the value of {source}."

    def ask_variables(self, value: str) -> str:
        return f"\nWhich variables hold the value {value}, directly or through others? The variables are"

    def answer_variables(self, variables: list[str]) -> str:
        return ", ".join(variables)

    def counted(self, rng: random.Random, count: int, coded: bool) -> list[str]:
        if coded:
            letters = "abcdefghijklmnopqrstuvwxyz"
            return list({"".join(rng.choices(letters, k=6)): 0 for _ in range(2 * count)})[:count]
        pool = [*self.NOUNS, *self.ADJECTIVES, *(a + n for a in self.ADJECTIVES for n in self.NOUNS)]
        return rng.sample(pool, min(count, len(pool)))

    def listed(self, word: str, number: int) -> str:
        return f"{number}. {word}"

    def ask_counted(self, count: int, coded: bool) -> str:
        return f"\nWhich {count} words stand most often in the list above? The {count} most frequent words are"

    def people(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample([f"{f} {n}" for f in self.FIRST for n in self.LAST], count)

    def relations(self) -> list[str]:
        return list(self.FACTS)

    def fact(self, person: str, relation: str, value: str) -> str:
        return f"{person} {self.FACTS[relation][0]} {value}."

    def friend(self, person: str, friend: str) -> str:
        return f"The best friend of {person} is {friend}."

    def attribute(self, rng: random.Random) -> str:
        return f"{rng.choice(self.ADJECTIVES)}{rng.choice(self.NOUNS)}"

    def ask_fact(self, person: str, relation: str, of_friend: bool) -> str:
        who = f"the best friend of {person}" if of_friend else person
        return f"\n{self.FACTS[relation][1].format(who)} Answer with one word. Answer:"

    def answer_fact(self, friend: str | None, relation: str, value: str) -> str:
        return value

    def noise(self) -> str:
        return "The hills are wide. The river is slow. Clouds pass by. Off we walk, and home again."

    def text(self, rng: random.Random, words: int) -> list[str]:
        out: list[str] = []
        count, start = 0, rng.randrange(max(1, len(self.sentences)))
        while count < words:
            if self.sentences:
                sentence = self.sentences[(start + len(out)) % len(self.sentences)]
            else:
                a, b = (f"{rng.choice(self.ADJECTIVES)} {rng.choice(self.NOUNS)}" for _ in range(2))
                link = rng.choice(("stood beside", "was found near", "looked like", "came before", "outlived"))
                sentence = f"The {a} {link} the {b}."
            out.append(sentence)
            count += sentence.count(" ") + 1
        return out
