"""Replies that models give and some that none does, for comparing two programs' parsers: forms, then seeded noise."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

_LETTER_FORMS = (
    *("{}", "{}.", "{},", "{}:", "{})", "({})", "[{}]", "({}).", "{}).", ":{}", ":{}.", "**{}**", "**{}.**", "*{}*"),
    *("`{}`", '"{}"', "'{}'", "<b>{}</b>", "<answer>{}</answer>", "&nbsp;{}", "\\boxed{{{}}}", '{{"answer": "{}"}}'),
    *(" {}", "{} ", "\n{}", "{}\n", "\t{}\t", "{}\u00a0", "\u3000{}", "{}\u200b", "{}..", "{} .", "{}!", "{}?"),
    *("Answer: {}", "answer:{}", "Answer is {}", "The answer is {}.", "The answer is ({}).", "the answer is: {}"),
    *("The correct answer is {}", "Correct answer is **{}**", "The best option is {}."),
    *("My choice is {}", "I choose {}"),
    *("I pick {} because", "Option {}", "option {}.", "Choice {}", "{} is correct", "It is {}", "So {}", "Hence, {}!"),
    *("정답은 {}", "답: {}", "답은 {}입니다", "答案是{}", "答案为 {}。", "选{}", "答えは{}です", "옵션 {}"),
    *("It is not A, so {}", "A cat is shown, so {}", "A. or {}.", "(A) or ({})", "{} or B", "B, not {}", "{} and C"),
    *("Let me think.\nA is wrong.\nTherefore, {}", "Final answer\n\n{}", "1. {}", "- {}", "{}\n\nBecause.", "{}\n{}"),
    *("Sorry, I cannot say; maybe {}", "{}{}", "x{}", "{}x", "{}1", "The letter {} stands here and there, {}"),
    *("Failed to obtain answer via API {}", "a {} b c d", "{} A quick brown fox", "none of them, or {}"),
)
_OPTION_FORMS = (
    *("{text}", "{letter}. {text}", "({letter}) {text}", "{letter}: {text}", "{text}.", "It is {text}", "The {text}"),
    *("I think that the thing in the picture is {text}", "not {text}, so {letter}", "{text} ({letter})", "**{text}**"),
    *("{upper}", "{lower} it is, as everybody can see there", "the answer is {text}", "<p>{text}</p>", '"{text}"'),
)
_LETTER_TOKENS = (
    *"ABCDEFGHIJabcdez",
    *("A.", "B.", "C)", "(D)", "(B)", "A:", "answer is", "the answer is", "I choose", "so", "a", "an", "nan", "None"),
    *(",", ".", ";", "!", "'", '"', "\n", "\t", "  ", "**", "é", "ß", "Ａ", "①", "选", "答案是", "🙂"),
    *("&amp;", "<b>", "1"),
)
_EMPTY = ("", " ", "\n", ".", "...", "?", "\u00a0", "\u200b", "-", "0", "None", "nan", "N/A", "unknown", "null", "\x00")


def choice_replies(options: Mapping[str, str], seed: int, number: int) -> list[str]:
    """To a question with letters."""
    letters = (*options, "E", "a", "c", "Z")
    replies = [form.format(*[letter] * form.count("{}")) for form in _LETTER_FORMS for letter in letters]
    for letter, text in options.items():
        cases = {"letter": letter, "text": text, "upper": text.upper(), "lower": text.lower()}
        replies += [form.format(**cases) for form in _OPTION_FORMS]
    replies += [f"{one} and {other}" for one in options.values() for other in options.values()]
    return [*_EMPTY, *replies, *_noise((*_LETTER_TOKENS, *options.values()), seed, number)]


_YES_NO_FORMS = (
    *("{}", "{}.", "{}!", "{},", "**{}**", "({})", '"{}"', "<b>{}</b>", " {}", "{}\n", "\n{}", "\u00a0{}", "{} ."),
    *("{}, there is a dog", "The answer is {}", "Answer: {}", "{} or no", "not {}", "It is {}", "{}{}", "{}. Yes"),
    *("I say {}", "a {}", "ab{}", "abc{}", "...{}", "{}\n\nIt is red.", "{} no", "no, {}", ". {}"),
    *("y. {}", "{}?", "{}'s"),
)
_YES_NO_WORDS = (
    *("yes", "Yes", "YES", "no", "No", "NO", "not", "Not", "y", "n", "Y", "N", "yeah", "nope", "none", "now", "know"),
    *("yesterday", "eyes", "true", "false", "right", "wrong", "oui", "ja", "はい", "ｙｅｓ", "YeS"),
    *("nO", "yes.", "n.o."),
)
_YES_NO_MARKS = (".", ",", "!", "\n", "\t", "é", "🙂", "is", "it", "the")


def yes_no_replies(seed: int, number: int) -> list[str]:
    """To a question of yes or no."""
    replies = [form.format(*[word] * form.count("{}")) for form in _YES_NO_FORMS for word in _YES_NO_WORDS]
    return [*_EMPTY, *replies, *_noise((*_YES_NO_WORDS, *_YES_NO_MARKS), seed, number)]


_OPEN_FORMS = (
    *("{}", "{}.", "{}!", " {}", "{}\n", "a {}", "The {}", "an {}", "It is {}", "the answer is {}", "{} {}", "{},{}"),
    *("so {}", "x = {}", "x = {}\ny = {}", "could be {}", "Final answer: {}.", "is is {}", "{}?"),
    *("{};", "{} .", "{} ,"),
    *("<b>{}</b>", "{} &amp; {}", '"{}"', "({})", "[{}]", "{}/{}", "{}-{}", "{}_{}", "**{}**"),
    *("thus {}. So {}", "{}'s"),
    *("{}\t{}", "{}\nis {}", "therefore {},", "answer ", "result {}\n", "$ {}", "{}%", "{} V"),
    *("about {}", "-{}", "{}e3"),
)
_OPEN_WORDS = (
    *("cat", "Cat", "a cat", "dog", "two", "2", "none", "zero", "ten", "0", "10", "1,200", "1200"),
    *("3.14", ".5", "-3.5"),
    *("1e3", "1.0", "8.4", "8.4 V", "10 V", "Bar chart", "traffic light", "t-shirt", "yes", "no"),
    *("left", "unanswerable"),
    *("dont", "don't", "whats", "oclock", "somebody'd", "couldnt've", "ma'am", "youve", "y'all"),
    *("let's", "its", "he's"),
    *("é", "naïve", "Zürich", "猫", "２", "½", "3,5", "1,2,3", "U.S.A.", "3.", "a.b", "B", "b"),
    *("inf", "nan", "1_000", "x"),
)
_OPEN_MARKS = (*(",", ".", ";", "/", "?", "!", "-", "\n", "\t", "is", "so", "=", "the", "a", "an", "'", '"', "(", ")"),)


def open_replies(golds: Sequence[str], seed: int, number: int) -> list[str]:
    """To a question that asks for a word or a number."""
    words = (*golds, *_OPEN_WORDS)
    replies = [form.format(*[word] * form.count("{}")) for form in _OPEN_FORMS for word in words]
    return [*_EMPTY, *replies, *_noise((*words, *_OPEN_MARKS), seed, number)]


def _noise(tokens: Iterable[str], seed: int, number: int) -> list[str]:
    """So many rows of tokens, half of them with spaces between."""
    drawn, known = random.Random(seed), list(tokens)
    return [
        drawn.choice(("", " ")).join(drawn.choices(known, k=drawn.choice((1, 2, 2, 3, 4, 6, 9)))) for _ in range(number)
    ]
