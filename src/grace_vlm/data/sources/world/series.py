"""Real figures: series of numbers with labels from the tables inside ``vega-datasets``, read without importing it.

Left out: ``la-riots`` (people's deaths), ``anscombe`` and ``iris`` (no figures with names of their own), ``burtin``
(concentrations over six orders of magnitude).
"""

from __future__ import annotations

import csv
import io
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.data.sources.world.packages import Package, find_installed, read_json
from grace_vlm.errors import DataError

NAME = "vega-datasets"
LICENCE = "package MIT; tables of facts, each with its origin in the package's dataset_info.json"
_FOLDER = "_data/"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_STOCKS = {"MSFT": "Microsoft", "AMZN": "Amazon", "IBM": "IBM", "GOOG": "Google", "AAPL": "Apple"}
_SECTORS = (
    "construction", "manufacturing", "information", "retail_trade", "wholesale_trade", "utilities", "government",
    "financial_activities", "leisure_and_hospitality", "mining_and_logging", "transportation_and_warehousing",
)  # fmt: skip
_CAR_FIGURES = {
    "Miles_per_Gallon": "miles per gallon",
    "Horsepower": "horsepower",
    "Weight_in_lbs": "weight in pounds",
    "Displacement": "displacement in cubic inches",
}


@dataclass(frozen=True)
class Series:
    """Numbers with labels, in their order. ``is_time``: labels are years or months, and neighbours belong together;
    ``is_share``: numbers are parts of a whole."""

    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    is_time: bool = False
    is_share: bool = False


def find_package() -> Package:
    """The installed package.

    Raises:
        ConfigError: it is not installed.
    """
    return find_installed(NAME, LICENCE, (_FOLDER,))


def read_series(folder: Path) -> list[list[Series]]:
    """All series, those of one table together, in a fixed order.

    Raises:
        DataError: a table is missing or has other columns than it had.
    """
    data = folder / _FOLDER
    try:
        found = [
            _barley(_rows(data / "barley.json")),
            _cars(_rows(data / "cars.json")),
            _crimea(_rows(data / "crimea.json")),
            _driving(_rows(data / "driving.json")),
            _electricity(_rows(data / "iowa-electricity.csv")),
            _volatility(_rows(data / "ohlc.json")),
            _temperatures("Seattle", _rows(data / "seattle-temps.csv"))
            + _temperatures("San Francisco", _rows(data / "sf-temps.csv")),
            _weather(_rows(data / "seattle-weather.csv")),
            _stocks(_rows(data / "stocks.csv")),
            _employment(_rows(data / "us-employment.csv")),
            _wheat(_rows(data / "wheat.json")),
            _airports(_rows(data / "airports.csv")),
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{data} has a table with other columns than {NAME} 0.9; pip install {NAME}==0.9.0") from error
    return [[one for one in listing if len(one.labels) >= 3] for listing in found]


def _rows(path: Path) -> list[Mapping[str, Any]]:
    if path.suffix == ".json":
        records = read_json(path)
        return records if isinstance(records, list) else []
    try:
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise DataError(f"{path} cannot be read; pip install --force-reinstall {NAME}") from error


def _series(title: str, pairs: Sequence[tuple[str, float]], is_time: bool = False, is_share: bool = False) -> Series:
    return Series(title, tuple(label for label, _ in pairs), tuple(value for _, value in pairs), is_time, is_share)


def _counted(counts: Mapping[str, int]) -> list[tuple[str, float]]:
    return [(name, float(number)) for name, number in sorted(counts.items())]


def _barley(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    found = []
    for year in (1931, 1932):
        for site in sorted({row["site"] for row in rows}):
            pairs = [(r["variety"], float(r["yield"])) for r in rows if r["site"] == site and r["year"] == year]
            found.append(_series(f"barley, {site}, {year}", pairs))
        for variety in sorted({row["variety"] for row in rows}):
            pairs = [(r["site"], float(r["yield"])) for r in rows if r["variety"] == variety and r["year"] == year]
            found.append(_series(f"{variety} barley, {year}", pairs))
    return found


def _cars(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    found = []
    for column, title in _CAR_FIGURES.items():
        for origin in ("USA", "Europe", "Japan"):
            values: dict[str, float] = {}
            for row in rows:
                name = " ".join(str(row["Name"]).split()[:2])
                if row["Origin"] == origin and row[column] is not None and len(name) <= 16:
                    values.setdefault(name, float(row[column]))
            found.append(_series(f"{title}", list(values.items())))
    for origin_year in sorted({str(row["Year"])[:4] for row in rows}):
        counts = Counter(row["Origin"] for row in rows if str(row["Year"]).startswith(origin_year))
        found.append(_series(f"car models, {origin_year}", _counted(counts), is_share=True))
    return found


def _crimea(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    def month(row: Mapping[str, Any]) -> str:
        return f"{_MONTHS[int(row['date'][5:7]) - 1]} {row['date'][:4]}"

    return [
        _series(f"Crimean war: {words}", [(month(row), float(row[column])) for row in rows], is_time=True)
        for column, words in (("wounds", "wounds"), ("disease", "disease"), ("other", "other causes"))
    ]


def _driving(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    ordered = sorted(rows, key=lambda row: int(row["year"]))
    return [
        _series("miles driven a year", [(str(row["year"]), float(row["miles"])) for row in ordered], is_time=True),
        _series("gas price in dollars", [(str(row["year"]), float(row["gas"])) for row in ordered], is_time=True),
    ]


def _electricity(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    found = []
    for source in sorted({row["source"] for row in rows}):
        pairs = [(row["year"][:4], float(row["net_generation"])) for row in rows if row["source"] == source]
        found.append(_series(f"Iowa: {source.lower()}, GWh", pairs, is_time=True))
    for year in sorted({row["year"][:4] for row in rows}):
        pairs = [(row["source"], float(row["net_generation"])) for row in rows if row["year"].startswith(year)]
        found.append(_series(f"Iowa's electricity, {year}", pairs, is_share=True))
    return found


def _volatility(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    return [
        _series(
            f"VIX, {words}",
            [(f"{_MONTHS[int(row['date'][5:7]) - 1]} {int(row['date'][8:])}", float(row[words])) for row in rows],
            is_time=True,
        )
        for words in ("high", "low", "close")
    ]


def _temperatures(city: str, rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    by_month: dict[int, list[float]] = defaultdict(list)
    by_hour: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        by_month[int(row["date"][5:7])].append(float(row["temp"]))
        by_hour[int(row["date"][11:13])].append(float(row["temp"]))
    months = [(_MONTHS[month - 1], sum(v) / len(v)) for month, v in sorted(by_month.items())]
    hours = [(f"{hour}:00", sum(v) / len(v)) for hour, v in sorted(by_hour.items())]
    return [
        _series(f"{city}, mean °F", months, is_time=True),
        _series(f"{city} by hour, °F", hours, is_time=True),
    ]


def _weather(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    found = []
    for year in sorted({row["date"][:4] for row in rows}):
        mine = [row for row in rows if row["date"].startswith(year)]
        rain, hottest = dict.fromkeys(_MONTHS, 0.0), dict.fromkeys(_MONTHS, -99.0)
        for row in mine:
            month = _MONTHS[int(row["date"][5:7]) - 1]
            rain[month] += float(row["precipitation"])
            hottest[month] = max(hottest[month], float(row["temp_max"]))
        found.append(_series(f"Seattle, rain in mm, {year}", list(rain.items()), is_time=True))
        found.append(_series(f"Seattle, highest °C, {year}", list(hottest.items()), is_time=True))
        kinds = Counter(row["weather"] for row in mine)
        found.append(_series(f"Seattle, days in {year}", _counted(kinds), is_share=True))
    return found


def _stocks(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    found = []
    for symbol, name in _STOCKS.items():
        mine = [row for row in rows if row["symbol"] == symbol]
        for year in sorted({row["date"].split()[2] for row in mine}):
            pairs = [(row["date"].split()[0], float(row["price"])) for row in mine if row["date"].endswith(year)]
            found.append(_series(f"{name}, price in {year}", pairs, is_time=True))
    for date in sorted({row["date"] for row in rows}):
        pairs = [(_STOCKS[row["symbol"]], float(row["price"])) for row in rows if row["date"] == date]
        month, _, year = date.split()
        found.append(_series(f"stock prices, {month} {year}", pairs))
    return found


def _employment(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    found = []
    for row in rows:
        if row["month"][5:7] in ("01", "04", "07", "10"):
            pairs = [(sector.replace("_", " "), float(row[sector])) for sector in _SECTORS if len(sector) <= 16]
            month = _MONTHS[int(row["month"][5:7]) - 1]
            found.append(_series(f"US jobs, thousands, {month} {row['month'][:4]}", pairs))
    for sector in _SECTORS:
        pairs = [(row["month"][:4], float(row[sector])) for row in rows if row["month"][5:7] == "06"]
        found.append(_series(f"jobs: {sector.replace('_', ' ')}", pairs, is_time=True))
    return found


def _wheat(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    prices = [(str(row["year"]), float(row["wheat"])) for row in rows]
    wages = [(str(row["year"]), float(row["wages"])) for row in rows if row.get("wages") is not None]
    return [_series("price of wheat", prices, is_time=True), _series("weekly wages", wages, is_time=True)]


def _airports(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    counts = Counter(row["state"] for row in rows if len(row["state"]) == 2 and row["state"].isalpha())
    return [_series("airports by state", _counted(counts))]


def sample(rng: random.Random, series: Series, count: int) -> Series:
    """``count`` of the series' numbers: neighbours of a series in time, else any."""
    count = min(count, len(series.labels))
    if series.is_time:
        start = rng.randrange(len(series.labels) - count + 1)
        places: Sequence[int] = range(start, start + count)
    else:
        places = rng.sample(range(len(series.labels)), count)
    pairs = [(series.labels[place], series.values[place]) for place in places]
    return _series(series.title, pairs, series.is_time, series.is_share)
