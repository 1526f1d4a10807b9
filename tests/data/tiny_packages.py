"""Small packages in the true layouts: emoji of one colour each, flags of two bands, digits; what the mix is made from.

Every emoji has a colour of its own, so a pixel tells what is where.
"""

from __future__ import annotations

import colorsys
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

ANIMALS = ("dog", "cat", "horse", "cow", "pig", "owl", "duck", "eagle", "crab", "shark", "otter", "bee", "ant", "frog")
FOODS = ("melon", "banana", "lemon", "pear", "peach", "taco", "pizza", "bagel", "waffle", "egg", "carrot", "onion")
VEHICLES = (
    "bus", "ambulance", "taxi", "tractor", "rocket", "airplane", "canoe", "ferry", "helicopter", "tram", "scooter",
    "minibus",
)  # fmt: skip
COUNTRIES = {
    # code: (name, capital, continent)
    "aa": ("Aland", "Alma", "Africa"),
    "ab": ("Borania", "Bora", "Africa"),
    "ac": ("Calia", "Caltown", "Africa"),
    "ad": ("Doria", "Dorset", "Asia"),
    "ae": ("Esteria", "Este", "Asia"),
    "af": ("Fenland", "Fenn", "Asia"),
    "ag": ("Gallia", "Gallo", "Europe"),
    "ah": ("Hestia", "Hest", "Europe"),
    "ai": ("Istria", "Isto", "Europe"),
    "aj": ("Jorland", "Jor", "North America"),
    "ak": ("Kelta", "Kel", "North America"),
    "al": ("Loria", "Lor", "South America"),
    "am": ("Mirland", "Mir", "South America"),
    "an": ("Norland", "Nor", "Oceania"),
    "ao": ("Opalia", "Opal", "Oceania"),
}


def color(number: int) -> tuple[int, int, int]:
    """Of the emoji or flag ``number``: far from each other and from white."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, (0.95, 0.6)[number % 2], (0.9, 0.65, 0.4)[number % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def emoji_records() -> list[dict[str, Any]]:
    """As ``emoji.json`` has them; the last has no picture of Google's, and one is a flag."""
    listing = (
        ("Animals & Nature", "animal-mammal", ANIMALS),
        ("Food & Drink", "food-fruit", FOODS),
        ("Travel & Places", "transport-ground", VEHICLES),
    )
    records = [
        {"name": name.upper(), "unified": f"{number:05X}", "image": f"{number:05x}.png", "short_name": name,
         "short_names": [name], "category": category, "subcategory": subcategory, "has_img_google": True}
        for number, (name, category, subcategory) in enumerate(
            (name, category, subcategory) for category, subcategory, names in listing for name in names
        )
    ]  # fmt: skip
    records.append({**records[0], "name": "NOTHING", "short_name": "nothing", "has_img_google": False})
    records.append({**records[0], "name": "FRANCE FLAG", "short_name": "fr", "subcategory": "country-flag"})
    return records


def disc(rgb: tuple[int, int, int]) -> bytes:
    """A picture of 64 x 64 with a disc, clear around it."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((2, 2, 61, 61), fill=(*rgb, 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def emoji_files() -> dict[str, bytes]:
    """The package emoji-datasource-google."""
    records = emoji_records()
    about = {"name": "emoji-datasource-google", "version": "0.0.1"}
    pictures = {f"img/google/64/{one['image']}": disc(color(number)) for number, one in enumerate(records[:-2])}
    return {"package.json": json.dumps(about).encode(), "emoji.json": json.dumps(records).encode(), **pictures}


def flag_files() -> dict[str, bytes]:
    """The package flag-icons."""
    about = {"name": "flag-icons", "version": "0.0.1"}
    records = [
        {"code": code, "name": name, "capital": capital, "continent": continent, "iso": True,
         "flag_4x3": f"flags/4x3/{code}.svg"}
        for code, (name, capital, continent) in COUNTRIES.items()
    ]  # fmt: skip
    records.append({"code": "zz", "name": "Unknown", "iso": False})
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 480"><path fill="rgb{}" d="M0 0h640v480H0z"/></svg>'
    flags = {f"flags/4x3/{code}.svg": svg.format(color(number)).encode() for number, code in enumerate(COUNTRIES)}
    return {"package.json": json.dumps(about).encode(), "country.json": json.dumps(records).encode(), **flags}


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    """As ``npm pack`` writes it: everything below ``package``."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """As it is unpacked."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_digits(site: Path) -> None:
    """scikit-learn's file of digits where ``site`` is on the path, and what makes it an installed package: 140 digits,
    each with as many inked pixels in its upper left corner as its value."""
    values = [number % 10 for number in range(140)]
    rows = [[*[16.0] * value, *[0.0] * (64 - value), float(value)] for value in values]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_folder(
        site,
        {
            "sklearn/__init__.py": b"raise AssertionError('read without importing it')\n",
            "sklearn/datasets/data/digits.csv.gz": gzip.compress(text.encode()),
            "scikit_learn-0.0.1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: scikit-learn\nVersion: 0.0.1\n",
        },
    )
