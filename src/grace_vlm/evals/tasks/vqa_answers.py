"""Short answers of VQAv2, TextVQA, VizWiz and GQA: what counts as the same words, and the accuracy over ten people.

The words are made alike first: punctuation, numbers up to ten, articles, and apostrophes that people leave out. Two
programs differ in small things: EvalAI's processor (the challenges' server, LLaVA, lmms-eval) and VLMEvalKit's.
"""

from __future__ import annotations

from collections.abc import Sequence

from grace_vlm.evals.tasks.yes_no import strip_punctuation

_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1)
}
_ARTICLES = ("a", "an", "the")
_WITH_APOSTROPHE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Each of the words without one of its apostrophes -> the word. The evaluator's table, which is turned round for
    ``somebody'd``."""
    table = {"somebody'd": "somebodyd"}
    for word in _WITH_APOSTROPHE.split():
        for place, char in enumerate(word):
            if char == "'":
                table[word[:place] + word[place + 1 :]] = word
    return table


_CONTRACTIONS = _contractions()
_EVALAI_PERIOD, _EVALAI_THOUSANDS = r"\.(?!\d)", r"\d,+\d"


def _words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def kit_normal(text: str) -> str:
    """VLMEvalKit's ``process_answer``."""
    return _words(strip_punctuation(_one_line(text)))


def vqav2_normal(text: str) -> str:
    """lmms-eval's ``vqav2``: EvalAI's processor without its first step."""
    return _words(strip_punctuation(_one_line(text), _EVALAI_PERIOD, _EVALAI_THOUSANDS))


def evalai_normal(text: str) -> str:
    """EvalAI's processor: commas and question marks go, ``'s`` becomes a word, then as VQAv2."""
    return vqav2_normal(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def consensus(said: str, golds: Sequence[str]) -> float:
    """VQA accuracy: for each person left out, min(1, others who said the same / 3); the mean of these."""
    matches = sum(gold == said for gold in golds)
    shares = [min(1.0, (matches - (gold == said)) / 3) for gold in golds]
    return sum(shares) / len(shares)
