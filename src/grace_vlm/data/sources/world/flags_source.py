"""The part ``flags`` of the mix: one flag, two side by side, or four, and what one may know about their countries."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from grace_vlm.data.sources.world.drawn import SIDE_PX, Asked, Drawn, Kind, about, ask, said
from grace_vlm.data.sources.world.emoji_questions import PLACES_2, PLACES_PAIR
from grace_vlm.data.sources.world.flags import Atlas, Country, read_atlas
from grace_vlm.data.sources.world.grounds import choose_ground, read_cutout
from grace_vlm.media.collage import Collage, Ground, Pasted

NUM_QUESTIONS = 6
LAYOUTS = {"single": 10, "pair": 4, "mosaic": 3}
_SIDES = {"single": (1, 1), "pair": (1, 2), "mosaic": (2, 2)}
_FEWEST = 4
_FEWEST = 5
CONTINENTS = ("Africa", "Asia", "Europe", "North America", "Oceania", "South America")


@dataclass(frozen=True)
class FlagScene:
    """Flags row by row: one, two or four; and how each is drawn. ``others``: what else training knows, or does not."""

    layout: str
    ground: Ground
    countries: tuple[Country, ...]
    how: tuple[Pasted, ...]
    others: tuple[Country, ...]

    def places(self) -> list[str]:
        """The words for each flag's place."""
        return list((PLACES_PAIR if self.layout == "pair" else PLACES_2).values())


class FlagsSource:
    """Pictures of flags (``drawn.Source``)."""

    rows_per_unit: ClassVar[Mapping[str, float]] = {"train": 5.9, "test": 5.9, "unseen": 4.2}

    def __init__(self, folder: Path, rendered: Path, seed: int) -> None:
        self._seed = seed
        self._atlas = read_atlas(folder, rendered, seed)

    def unit(self, split: str, number: int) -> list[Drawn]:
        """One picture with up to six questions."""
        rng = random.Random(f"{self._seed}/world/flags/{split}/{number}")
        scene = compose(rng, self._atlas, split)
        questions = ask(rng, scene, KINDS[scene.layout], NUM_QUESTIONS)
        if split == "unseen" and scene.layout != "single":
            questions = about(questions, self._atlas.held_out & {country.name for country in scene.countries})
        return [Drawn((draw(scene, self._atlas),), ".jpg", tuple(questions), describe(scene))]


def compose(rng: random.Random, atlas: Atlas, split: str) -> FlagScene:
    """Different countries; of ``unseen`` one that training never shows, among others that it does."""
    layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    rows, columns = _SIDES[layout]
    known = [country for name, country in atlas.countries.items() if name not in atlas.held_out]
    unseen = [atlas.countries[name] for name in sorted(atlas.held_out)]
    if split == "unseen":
        chosen = [rng.choice(unseen), *rng.sample(known, rows * columns - 1)]
        rng.shuffle(chosen)
    else:
        chosen = rng.sample(known, rows * columns)
    cell_px = SIDE_PX / columns
    how = []
    for place in range(rows * columns):
        side = round(cell_px * rng.uniform(0.72, 0.94))
        slack, high = (cell_px - side) / 2, SIDE_PX / rows
        center = (
            (place % columns + 0.5) * cell_px + rng.uniform(-slack, slack),
            (place // columns + 0.5) * high + rng.uniform(-1, 1) * (high - 0.75 * side) / 2.4,
        )
        angle = round(rng.uniform(-10, 10), 1) if rng.random() < 0.3 else 0.0
        how.append(Pasted((round(center[0], 1), round(center[1], 1)), side, angle))
    # Wrong answers are as unknown to training as the right one, or their novelty would tell it.
    others = known if split != "unseen" else unseen if len(unseen) >= _FEWEST else [*unseen, *known]
    return FlagScene(layout, choose_ground(rng)[0], tuple(chosen), tuple(how), tuple(others))


def draw(scene: FlagScene, atlas: Atlas) -> bytes:
    """The scene as a JPEG of 192 x 192 pixels."""
    collage = Collage(SIDE_PX, scene.ground)
    for country, how in zip(scene.countries, scene.how, strict=True):
        collage.paste(read_cutout(atlas.pictures[country.name]), how)
    return collage.jpeg()


def describe(scene: FlagScene) -> str:
    """A sentence with all flags."""
    names = [country.name for country in scene.countries]
    if scene.layout == "single":
        where = scene.countries[0].continent
        return f"The flag of {names[0]}{f', in {where}' if where in CONTINENTS else ''}."
    parts = [f"{name} ({place})" for name, place in zip(names, scene.places(), strict=True)]
    return f"The flags of {', '.join(parts[:-1])} and {parts[-1]}."


def _near(rng: random.Random, scene: FlagScene, country: Country) -> list[Country]:
    """Other countries, half of them of the same continent."""
    others = [other for other in scene.others if other.name != country.name]
    same = [other for other in others if other.continent == country.continent]
    return [*rng.sample(same, min(3, len(same))), *rng.sample(others, min(3, len(others)))]


def _country(rng: random.Random, scene: FlagScene) -> Asked:
    (country,) = scene.countries
    text = rng.choice(("Which country has this flag?", "Whose flag is this?"))
    return Asked(text, country.name, tuple(other.name for other in _near(rng, scene, country)))


def _capital(rng: random.Random, scene: FlagScene) -> Asked | None:
    (country,) = scene.countries
    if not country.capital:
        return None
    wrong = tuple(other.capital for other in _near(rng, scene, country) if other.capital)
    return Asked("What is the capital of the country with this flag?", country.capital, wrong)


def _continent(rng: random.Random, scene: FlagScene) -> Asked | None:
    (country,) = scene.countries
    if country.continent not in CONTINENTS:
        return None
    return Asked("On which continent is the country with this flag?", country.continent, CONTINENTS)


def _is_it(rng: random.Random, scene: FlagScene) -> Asked:
    (country,) = scene.countries
    if rng.random() < 0.5:
        return Asked(f"Is this the flag of {country.name}?", "yes")
    return Asked(f"Is this the flag of {rng.choice(_near(rng, scene, country)).name}?", "no")


def _is_in(rng: random.Random, scene: FlagScene) -> Asked | None:
    (country,) = scene.countries
    if country.continent not in CONTINENTS:
        return None
    continent = country.continent
    if rng.random() < 0.5:
        # As often as its countries are shown: or Africa would be a yes by its name alone.
        continent = rng.choice(
            [one.continent for one in scene.others if one.continent not in (continent, "", "Antarctica")]
        )
    return Asked(f"Is the country with this flag in {continent}?", said(continent == country.continent))


def _is_capital(rng: random.Random, scene: FlagScene) -> Asked | None:
    (country,) = scene.countries
    near = [other for other in _near(rng, scene, country) if other.capital]
    if not country.capital or not near:
        return None
    capital = country.capital if rng.random() < 0.5 else rng.choice(near).capital
    return Asked(f"Is {capital} the capital of the country with this flag?", said(capital == country.capital))


def _at(rng: random.Random, scene: FlagScene) -> Asked:
    place = rng.randrange(len(scene.countries))
    words, country = scene.places()[place], scene.countries[place]
    here = tuple(other.name for other in scene.countries if other != country)
    wrong = here if len(here) >= 2 else (*here, *(other.name for other in _near(rng, scene, country)))
    return Asked(
        f"Which country's flag is {'on' if len(scene.countries) == 2 else 'in'} the {words}?", country.name, wrong
    )


def _where(rng: random.Random, scene: FlagScene) -> Asked:
    place = rng.randrange(len(scene.countries))
    return Asked(f"Where is the flag of {scene.countries[place].name}?", scene.places()[place], tuple(scene.places()))


def _where_continent(rng: random.Random, scene: FlagScene) -> Asked | None:
    continents = [country.continent for country in scene.countries]
    single = [place for place, name in enumerate(continents) if continents.count(name) == 1 and name in CONTINENTS]
    if not single or len(scene.countries) == 1:
        return None
    place = rng.choice(single)
    text = f"Where is the flag of a country in {continents[place]}?"
    return Asked(text, scene.places()[place], tuple(scene.places()))


def _exists(rng: random.Random, scene: FlagScene) -> Asked:
    country = rng.choice(scene.countries)
    if rng.random() < 0.5:
        return Asked(f"Is the flag of {country.name} in the picture?", "yes")
    absent = [other for other in _near(rng, scene, country) if other not in scene.countries]
    return Asked(f"Is the flag of {rng.choice(absent).name} in the picture?", "no")


def _same_continent(rng: random.Random, scene: FlagScene) -> Asked | None:
    first, second = (country.continent for country in scene.countries)
    if first not in CONTINENTS or second not in CONTINENTS:
        return None
    # Two countries are seldom of one continent: of those that are not, most are left unasked.
    if first != second and rng.random() < 0.82:
        return None
    return Asked("Are both countries on the same continent?", said(first == second))


def _count_continent(rng: random.Random, scene: FlagScene) -> Asked | None:
    continents = [country.continent for country in scene.countries]
    number = rng.choice(sorted({continents.count(name) for name in CONTINENTS}))
    name = rng.choice([name for name in CONTINENTS if continents.count(name) == number])
    wrong = tuple(str(other) for other in range(len(scene.countries) + 1) if other != number)
    return Asked(f"How many of these flags are of countries in {name}?", str(number), wrong)


KINDS: dict[str, dict[str, Kind[FlagScene]]] = {
    # layout: kinds
    "single": {
        "flag_country": _country,
        "flag_capital": _capital,
        "flag_continent": _continent,
        "flag_is_it": _is_it,
        "flag_is_in": _is_in,
        "flag_is_capital": _is_capital,
    },
    "pair": {
        "flag_at": _at,
        "flag_where": _where,
        "flag_where_continent": _where_continent,
        "flag_exists": _exists,
        "flag_same_continent": _same_continent,
    },
    "mosaic": {
        "flag_at": _at,
        "flag_where": _where,
        "flag_where_continent": _where_continent,
        "flag_exists": _exists,
        "flag_count_continent": _count_continent,
    },
}
